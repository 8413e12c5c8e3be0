# Everything is set up in .venv by the targets themselves; nothing has to be installed by hand.
#   make demo    prune a real model (SmolLM2-135M) and show the result
#   make test    the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py $(shell find csrc -type f)

.PHONY: demo test lint types check sanitize wheel bench clean

demo: $(VENV)/.built
	$(BIN)/adapt-pruner demo --output runs/demo

test: $(VENV)/.built
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.built
	$(BIN)/mypy

check: lint types test

# The CPU kernels under the address and undefined-behaviour sanitizers of g++; needs nothing else.
sanitize:
	$(PYTHON) tests/kernels/sanitized.py

# A CPU wheel in dist/cpu, and a CUDA wheel in dist/cuda where nvcc is found.
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
WHEEL := $(PIP) wheel --quiet --no-build-isolation --no-deps .

wheel: $(VENV)/.dependencies
	rm -rf build dist
	FORCE_CUDA=0 $(WHEEL) --wheel-dir dist/cpu
ifneq ($(NVCC),)
	rm -rf build
	FORCE_CUDA=1 $(WHEEL) --wheel-dir dist/cuda
else
	@echo "nvcc was not found: no CUDA wheel"
endif
	@ls -l dist/*

# Kernel times (`adapt-pruner bench kernels` has them beside the memory's bandwidth) and the cost of one iteration against a bare forward and backward pass.
bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-columns=min,median,max,rounds
	$(BIN)/python benchmarks/iteration.py

$(VENV)/.dependencies: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with the pinned dependencies of constraints.txt (a few minutes, once)"
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f'$(PYTHON) is Python {v[0]}.{v[1]}, expected 3.11 or later; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile -c constraints.txt torch setuptools wheel ninja pybind11
	ADAPT_PRUNER_NO_EXT=1 $(PIP) install --quiet --no-compile --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(NATIVE)
	@echo "Building the native ops (about a minute)"
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf build dist *.egg-info adapt_pruner/*.so
