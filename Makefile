# `make demo` and `make test` need only Python >= 3.9 and make; the rest they install into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Exactly this build of PyTorch is developed against; users may have any from 1.12 on.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench conformance clean
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
	$(BIN)/python benchmarks/running_stats.py

# Upstream Bagua's Python layer as published, without its native core: tests/conformance/bagua_core.py stands for that.
CONFORMANCE ?= .venv-conformance
BAGUA ?= bagua-cuda116==0.9.2

$(CONFORMANCE)/.made:
	$(PYTHON) -m venv $(CONFORMANCE)
	$(CONFORMANCE)/bin/python -m pip install --quiet --upgrade "pip>=23"
	$(CONFORMANCE)/bin/python -m pip install --quiet $(TORCH)
	$(CONFORMANCE)/bin/python -m pip install --quiet "pydantic<2" flask gevent requests scikit-optimize gorilla tqdm \
	    setuptools pytest pytest-timeout
	$(CONFORMANCE)/bin/python -m pip install --quiet --target $(CONFORMANCE)/wheel --no-deps --only-binary=:all: \
	    --python-version 3.9 --implementation cp --abi cp39 $(BAGUA)
	mkdir -p $(CONFORMANCE)/upstream
	mv $(CONFORMANCE)/wheel/bagua $(CONFORMANCE)/upstream/
	touch $@

conformance: $(CONFORMANCE)/.made ## the plugin on upstream Bagua's own Python layer
	PYTHONPATH=.:$(CONFORMANCE)/upstream:tests/conformance $(CONFORMANCE)/bin/python -m pytest \
	    -o python_functions='check_*' -o timeout=300 tests/conformance/check_upstream.py

clean:
	rm -rf $(VENV) $(CONFORMANCE) build dist *.egg-info
