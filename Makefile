# Everything runs from a virtual environment in .venv; nothing else on the machine is changed.
# `make setup` needs Python 3.10 or newer with venv, and a C++17 compiler.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10, \
  $(shell $(p) -c 'import sys, venv; print("$(p)" if sys.version_info >= (3, 10) else "")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
# The tools of the environment come first, so that every step uses the same CMake, Ninja and linters.
export PATH := $(CURDIR)/$(BIN):$(PATH)

DEPS_STAMP := $(VENV)/.dependencies
BUILD_STAMP := $(VENV)/.package
TOOLS_STAMP := .tools/.installed
STUBS := build/stubs
STUBS_STAMP := $(STUBS)/.generated
NATIVE_SOURCES := $(shell find native protos tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu')
PACKAGE_INPUTS := pyproject.toml service/tokenwire/_version.py \
  $(shell find CMakeLists.txt native protos -type f)

.PHONY: help cuda-library setup demo test test-native test-deploy test-node lint format bench serve tools docs compliance audit wheel sdist lock clean

help:
	@echo 'make setup   create $(VENV), install the locked dependencies, build and install the package'
	@echo 'make demo    serve a real model here and stream a haiku from it'
	@echo 'make test    all tests: native, unit, service, end to end'
	@echo 'make test-deploy   what deploy/ holds, run for real; needs haproxy and promtool'
	@echo 'make test-node   the examples in JavaScript; needs Node.js and npm'
	@echo 'make lint    style, types, proto and shell checks'
	@echo 'make bench   run the benchmarks'
	@echo 'make serve   serve SmolLM2 on 127.0.0.1:50051 (MODEL=... for another model)'
	@echo 'make wheel   build a wheel into dist/'
	@echo 'make docs    the documentation site, into build/site'
	@echo 'make compliance   the wheel in a clean environment: licences, bill of materials (make audit: advisories)'
	@echo 'make clean   remove what was built, $(VENV) included'

setup: $(BUILD_STAMP)

$(DEPS_STAMP): requirements/dev.txt
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.10 or newer with the venv module was found;' \
	  'install one (Debian: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'error: the virtual environment could not be made (Debian: apt-get install python3-venv)' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	@touch $@

$(BUILD_STAMP): $(DEPS_STAMP) $(PACKAGE_INPUTS)
	@command -v $${CXX:-c++} >/dev/null || { echo 'error: no C++ compiler was found' \
	  '(Debian: apt-get install g++); CXX names another' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup
	@$(BIN)/python scripts/demo.py

test: setup test-native
	$(BIN)/python -m pytest

test-native: $(DEPS_STAMP)
	$(BIN)/cmake -S . -B build/native-tests -G Ninja -DTOKENWIRE_TESTS=ON -DTOKENWIRE_PYTHON=OFF
	$(BIN)/cmake --build build/native-tests
	$(BIN)/ctest --test-dir build/native-tests --output-on-failure

# Debian: apt-get install haproxy prometheus
test-deploy: setup
	$(BIN)/python -m pytest -m deploy

# Debian: apt-get install nodejs npm
test-node: setup
	$(BIN)/python -m pytest -m node

# The CUDA library by itself; needs nvcc but no GPU. CUDA_ARCHITECTURES='80-real;90a-real' builds for those alone,
# CUDA_RACECHECK=ON for compute-sanitizer's racecheck.
CUDA_RACECHECK ?= OFF
CUDA_BUILD = build/cuda$(if $(filter ON,$(CUDA_RACECHECK)),-racecheck)
cuda-library: $(DEPS_STAMP)
	$(BIN)/cmake -S . -B $(CUDA_BUILD) -G Ninja -DTOKENWIRE_CUDA=ON -DTOKENWIRE_PYTHON=OFF \
	  -DTOKENWIRE_RACECHECK=$(CUDA_RACECHECK) \
	  $(if $(CUDA_ARCHITECTURES),-DCMAKE_CUDA_ARCHITECTURES='$(CUDA_ARCHITECTURES)')
	$(BIN)/cmake --build $(CUDA_BUILD) --target tokenwire_cuda

lint: $(DEPS_STAMP) $(STUBS_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	$(BIN)/buf lint protos
	$(BIN)/shellcheck .ci/run examples/shell/*.sh

# mypy reads the generated messages from here; the installed package has its own.
$(STUBS_STAMP): $(DEPS_STAMP) $(wildcard protos/tokenwire/v1/*.proto)
	@mkdir -p $(STUBS)
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(STUBS) --pyi_out=$(STUBS) --grpc_python_out=$(STUBS) \
	  $(wildcard protos/tokenwire/v1/*.proto)
	@touch $@

format: $(DEPS_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

MODEL ?= smollm2
serve: setup
	@$(BIN)/tokenwire pull $(MODEL) >/dev/null
	@exec $(BIN)/tokenwire serve --model $(MODEL) $(ARGS)

wheel: $(DEPS_STAMP)
	$(BIN)/python -m build --no-isolation --wheel

# Documentation, bill of materials, licences and audit, with tools of their own.
tools: $(TOOLS_STAMP)

$(TOOLS_STAMP): requirements/tools.txt
	@test -x .tools/bin/python || $(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet --require-hashes -r requirements/tools.txt
	@touch $@

docs: setup $(TOOLS_STAMP)
	$(BIN)/python scripts/make_site.py
	.tools/bin/mkdocs build --strict --quiet

# The wheel in an environment of its own, what is inside it, and under which licences.
compliance: $(TOOLS_STAMP) $(DEPS_STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --wheel
	$(BIN)/python scripts/compliance.py install dist/*.whl
	.tools/clean/bin/tokenwire --version
	$(BIN)/python scripts/compliance.py licences
	$(BIN)/python scripts/compliance.py sbom dist/*.whl --output dist/tokenwire.cdx.json

# Needs a source of advisories (PyPI's JSON interface); fails where it cannot be asked.
audit: $(TOOLS_STAMP)
	$(BIN)/python scripts/compliance.py audit

sdist: $(DEPS_STAMP)
	$(BIN)/python -m build --no-isolation --sdist

# dev: what `make setup` installs. runtime and build: what an image needs. tools: what `make tools` installs.
# Needs uv (https://docs.astral.sh/uv).
LOCK := uv pip compile --quiet --upgrade --generate-hashes --universal --python-version 3.10 \
  --custom-compile-command 'make lock'
lock:
	$(LOCK) --extra hub --extra otel --output-file requirements/dev.txt pyproject.toml requirements/dev.in
	$(LOCK) --extra otel --constraint requirements/dev.txt --output-file requirements/runtime.txt pyproject.toml
	$(LOCK) --constraint requirements/dev.txt --output-file requirements/build.txt requirements/build.in
	$(LOCK) --output-file requirements/tools.txt requirements/tools.in

clean:
	rm -rf $(VENV) .tools build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
