# Two commands on a fresh machine (python3 >= 3.11 and make): `make demo` and `make test`. Each sets itself up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test check promises audit format docs lock clean

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

test: check
	@$(BIN)/python -m pytest

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
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
