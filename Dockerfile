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
RUN pip install --no-cache-dir --no-build-isolation "/src[serve,heif,deep]"

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 lgnet
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER lgnet
EXPOSE 8080
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v2/health/ready')"]
# Other machines reach a container: a token is made up and printed, unless --token is given.
ENTRYPOINT ["lgnet-fast", "serve", "--host", "0.0.0.0"]
