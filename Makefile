# make demo     see it: 4-bit activations with and without modulation, on the model that comes with the package
# make test     the whole test suite; make test ARGS="tests/core -x" a part of it
# make check    lint, format, types, import order
# make docs     the site in docs/_build/html; warnings are errors. make linkcheck asks the network for its external links
# make wheel    build the wheel, install it into a new environment, run `modiff demo --quick` there: some two minutes
# make golden   write the golden trajectories again; read the diff before you commit it
# make mutants  small faults that the tests of core, nn and checkpoint should notice; make mutants ARGS="--count 40 core"
# make lint-fix what ruff can repair
# make env      the environment of the developers, and nothing more
#
# Only Python 3.11 or 3.12 with pip is needed; everything goes into $(VENV). Another interpreter: make demo PYTHON=python3.12

.PHONY: demo test check docs wheel linkcheck golden mutants lint-fix env
.DEFAULT_GOAL := demo
.DELETE_ON_ERROR:

SUITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3; do $$p -c '$(SUITS)' 2>/dev/null && echo $$p && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
TORCH ?= $(shell grep '^torch==' constraints.txt)

demo: $(VENV)/.base
	$(BIN)/modiff demo $(ARGS)

# Two processes of one thread: half the time of one process. Options of yours replace them.
test: $(VENV)/.dev
	$(if $(strip $(ARGS)),,OMP_NUM_THREADS=1 )$(BIN)/python -m pytest $(or $(strip $(ARGS)),-n 2 --dist loadfile)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

linkcheck: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

wheel: $(VENV)/.base
	$(BIN)/python tools/wheel.py $(TORCH)

golden: $(VENV)/.dev
	$(BIN)/python -m tests.golden.write

mutants: $(VENV)/.dev
	$(BIN)/python tools/mutants.py $(ARGS)

lint-fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(VENV)/.dev

# A stamp is written only after its install went through, so an interrupted one starts again.
#
# torch goes first and alone: this step is then the only one that decides between a CPU and a CUDA build, and the next
# one finds torch installed and leaves it alone. `make demo TORCH=torch-2.13.0+cpu-....whl` takes a wheel from a file.
#
# Where the system's Python comes without ensurepip, its own pip fills the environment.
$(VENV)/.base: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: expected Python 3.11 or 3.12 on the PATH, got neither. Install one, or name it: make demo PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c '$(SUITS)' || { echo "make: expected PYTHON to be Python 3.11 or 3.12, got $(PYTHON). torch and modiff are tested on these two." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) $(TORCH)
	$(PIP) --editable .
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[dev]'
	@touch $@
