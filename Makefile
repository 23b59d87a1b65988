# `make demo` and `make test` need only Python >= 3.9 and make. They install their dependencies into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The version of PyTorch for development. Users need 1.12 or later.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test fuzz soak faults lint docs launches gpu-check bench conformance contract frameworks clean
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

demo: $(VENV)/.demo ## trains on real digits locally, synchronized and in one process; prints a table, draws a picture
	$(BIN)/python examples/train_digits.py --compare

test: $(VENV)/.test ## all tests
	$(BIN)/python -m pytest

# To repeat one case: make fuzz CASES=1 SEED=123
CASES ?= 2000
SEED ?= 0

fuzz: $(VENV)/.test ## random models and training loops against one process; 15 minutes at most
	$(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED)

soak: $(VENV)/.test ## 20,000 steps on 4 ranks: memory, descriptors, threads, two equal runs; 15 minutes at most
	timeout 900 $(BIN)/python benchmarks/soak.py

# Some faults only: make faults ONLY=SIGKILL
ONLY ?=

faults: $(VENV)/.test ## injected faults on both hosts, 10 minutes at most; writes docs/fault_table.md
	$(BIN)/python -m tests.faults --only "$(ONLY)"

$(VENV)/.docs: $(VENV)/.made setup.cfg
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs ## the documentation as HTML; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

lint: $(VENV)/.test ## formatting, lint rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

launches: $(VENV)/.test ## kernel launches and host waits on CUDA, counted without a GPU (needs g++); fails above the limits
	$(BIN)/python benchmarks/launches.py

# On a machine with a GPU, with the PyTorch build that is installed there.
gpu-check: ## everything that needs a GPU; writes benchmarks/results/gpu_*.json
	$(PYTHON) benchmarks/gpu_check.py

# The allocator must not return memory to the system: page faults, unevenly distributed over variants, would distort ratios.
bench: export MALLOC_MMAP_THRESHOLD_ = 1073741824
bench: export MALLOC_TRIM_THRESHOLD_ = 1073741824
bench: $(VENV)/.test ## all benchmarks; writes benchmarks/results/ and docs/measured.md
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/running_stats.py
	$(BIN)/python benchmarks/coalescing.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/prediction.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/tables.py

# Training frameworks. torchvision declares a CUDA build of PyTorch and MMEngine an OpenCV with a display, so both are
# installed without their dependencies.
FRAMEWORKS ?= .venv-frameworks
TORCHVISION ?= torchvision==0.28.0

$(FRAMEWORKS)/.made: setup.cfg
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --upgrade "pip>=23"
	$(FRAMEWORKS)/bin/python -m pip install --quiet $(TORCH)
	echo "$(TORCH)" > $(FRAMEWORKS)/constraints.txt
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint $(FRAMEWORKS)/constraints.txt --editable ".[frameworks]"
	$(FRAMEWORKS)/bin/python -m pip install --quiet --no-deps timm $(TORCHVISION) mmengine addict yapf platformdirs \
	    termcolor opencv-python-headless
	touch $@

frameworks: export PYTHONPATH = .:tests/frameworks/site
frameworks: $(FRAMEWORKS)/.made ## training frameworks on two ranks, 20 minutes at most; writes docs/frameworks.md
	timeout 300 $(FRAMEWORKS)/bin/python -m pytest -o pythonpath=tests tests/frameworks
	timeout 900 $(FRAMEWORKS)/bin/python benchmarks/frameworks.py --seconds 780

# Upstream Bagua's published Python layer. tests/conformance/bagua_core.py replaces its native core.
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

# Upstream Bagua's published wheel with its native core, on the versions of Python and PyTorch for which it was built. The
# wheels are large, so all checkouts share one environment.
CONTRACT ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bagua_syncbn_algo/contract
PYTHON39 ?= $(shell for p in python3.9 $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.9.*/bin/python; do \
    "$$p" -c "import sys; sys.exit(sys.version_info[:2] != (3, 9))" 2>/dev/null && echo "$$p" && break; done)
# The unit tests that need one process and no embedded host.
CONTRACT_TESTS = $(addprefix tests/test_,config.py convert.py host.py layer.py) tests/comm/test_channel.py \
    $(addprefix tests/ops/test_,gradients.py moments.py parity.py)

$(CONTRACT)/.made:
	$(PYTHON39) -m venv --clear $(CONTRACT)
	$(CONTRACT)/bin/python -m pip install --quiet --upgrade "pip>=23"
	$(CONTRACT)/bin/python -m pip install --quiet torch==1.12.1 $(BAGUA) "pydantic<2" "numpy<1.24" nvidia-nccl-cu11 \
	    pytest pytest-mock pytest-timeout hypothesis
	touch $@

contract: $(if $(PYTHON39),$(CONTRACT)/.made) ## the plugin with upstream Bagua's real wheel (needs Python 3.9)
ifeq ($(PYTHON39),)
	@echo "expected Python 3.9 for upstream Bagua's wheel (got none); install it, or set PYTHON39= to its path" >&2
	@test -z "$$CI"
else
	LD_LIBRARY_PATH=$$(echo $(CONTRACT)/lib/python3.9/site-packages/nvidia/nccl/lib) BAGUA_SYNCBN_HOST=upstream \
	    PYTHONPATH=. $(CONTRACT)/bin/python -m pytest -p no:benchmark -o python_functions='check_*' \
	    tests/contract/check_wheel.py
	PYTHONPATH=. $(CONTRACT)/bin/python -m pytest -p no:benchmark -m "not multirank" $(CONTRACT_TESTS)
endif

clean:
	rm -rf $(VENV) $(CONFORMANCE) $(FRAMEWORKS) build dist docs/_build *.egg-info
