# Two commands on a fresh machine (python3 >= 3.11 and make): `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Tests run in so many processes of one thread each.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: install demo test test-all newest check promises audit format docs lock clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tunesmith needs python3 >= 3.11"; exit 2; }
	@echo "installing into $(VENV) (once, a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version, so that pip takes a CPU build where one is offered
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[dev]'
	@touch $(STAMP)

demo: install
	@$(BIN)/tunesmith demo

# The first tier, which every change has to pass.
test: check
	@$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow"

# Both tiers, and the contracts with the newest transformers, PEFT and TRL: before a change of the engine lands.
test-all: check
	@$(PYTEST) -n $(WORKERS) --dist worksteal
	@$(MAKE) newest

# An environment of its own, because the newest versions may be ahead of constraints.txt.
newest:
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy only-if-needed \
	  --editable '.[dev]' transformers peft trl accelerate
	@OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest tests/contracts tests/unit/test_adapter.py tests/invariant/test_blocks.py

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy

# The long versions of tests/promises, about an hour; their figures go into docs/promises.md.
promises: install
	@$(BIN)/python -m pytest tests/promises --timeout 5400 --promises benchmarks/results/promises.json
	@$(BIN)/python docs/generate.py

# Looks the pinned packages up in the advisory database (needs the network).
audit: install
	@$(PIP) pip-audit
	@$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: install
	@$(BIN)/python docs/generate.py

# Writes the versions that are installed now into constraints.txt, without local parts such as +cpu.
lock: install
	@$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' > constraints.tmp
	@mv constraints.tmp constraints.txt

clean:
	rm -rf $(VENV) .venv-newest runs .mypy_cache .ruff_cache .pytest_cache
