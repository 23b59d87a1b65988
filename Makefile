# `make demo` and `make test` need only Python >= 3.9 and make; the rest they install into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Exactly this build of PyTorch is developed against; users may have any from 1.12 on.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.made setup.cfg
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.made setup.cfg
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/.demo ## local, synchronized and single-process training on real digits: table and picture
	$(BIN)/python examples/train_digits.py --compare

test: $(VENV)/.test ## all tests
	$(BIN)/python -m pytest

lint: $(VENV)/.test ## formatting, lint rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The allocator keeps what it has: else page faults, more of them for whichever variant it pleases, decide the ratios.
bench: export MALLOC_MMAP_THRESHOLD_ = 1073741824
bench: export MALLOC_TRIM_THRESHOLD_ = 1073741824
bench: $(VENV)/.test ## all benchmarks; writes benchmarks/results/
	$(BIN)/python benchmarks/kernels.py

clean:
	rm -rf $(VENV) build dist *.egg-info
