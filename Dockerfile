# The page and the API on a CPU. Compiled in one stage, so that the other needs no compiler.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir "setuptools>=77" wheel "pybind11>=2.12" "ninja>=1.10"
ARG TORCH=torch==2.13.0
# That index has builds without CUDA, which pip prefers to those of PyPI.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "$TORCH"
COPY . /src
# The second command fails where the C++ kernels could not be compiled, of which pip only warns.
RUN pip install --no-cache-dir --no-build-isolation "/src[serve,heif,deep]" \
    && python -c "from lgnet_fast import native; native.library()"

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 lgnet
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER lgnet
EXPOSE 8080
# http.client, because urllib would ask the proxy that Docker may put into a container's environment.
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import sys, http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, timeout=20); c.request('GET', '/v2/health/ready'); sys.exit(c.getresponse().status != 200)"]
# Other machines reach a container: a token is made up and printed, unless --token is given.
ENTRYPOINT ["lgnet-fast", "serve", "--host", "0.0.0.0"]
