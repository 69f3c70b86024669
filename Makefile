# Everything a developer types. Each target works on a fresh machine: it makes .venv if it is missing.
#   make setup | demo | test | lint | bench | sanitize | gpu | clean
# PYTHON=python3.12 picks the interpreter, PIP_FLAGS adds to pip's command line (for instance
# PIP_FLAGS='--extra-index-url URL' for another build of torch), TESTS=tests/graph narrows the tests.

PYTHON ?= python3
PIP_FLAGS ?=
VENV ?= .venv
TESTS ?= tests
TEST_WORKERS ?= 2
DEMO_OUT ?= demo-output

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: the tests run two processes wide, structures of the demo are small, and two
# threads that wait for each other on a busy machine are a hundred times slower than one.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.DEFAULT_GOAL := setup
.PHONY: setup demo test lint bench sanitize gpu clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(ONE_THREAD) $(BIN)/mlip demo --out $(DEMO_OUT)

test: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(TESTS)

lint: setup
	$(BIN)/ruff check mlip tests scripts
	$(BIN)/mypy

bench: setup
	$(BIN)/python scripts/bench/import_time.py
	$(BIN)/python scripts/bench/node_update.py
	$(BIN)/python scripts/bench/convolution.py
	$(BIN)/python scripts/bench/time_model.py

# The CUDA text on the processor under ThreadSanitizer and AddressSanitizer; needs g++.
sanitize: setup
	$(ONE_THREAD) $(BIN)/python -m tests.ops.sanitize

# What only a GPU shows: tests, times, compute-sanitizer; a file for each step in gpu-output.
gpu: setup
	$(BIN)/python scripts/check_gpu.py

clean:
	rm -rf $(VENV) build dist mlip.egg-info .pytest_cache .ruff_cache .mypy_cache $(DEMO_OUT) gpu-output
