# Two commands set up all that they need: `make demo` and `make test`. VENV names another virtual environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.bitwright-setup

.PHONY: setup demo test test-slow check docs bench bench-peers

setup: $(STAMP)

# torch first and alone: pip then never considers another release of it, each of which is gigabytes.
$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/bitwright demo

test: setup
	$(BIN)/python -m pytest -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: setup
	$(BIN)/python scripts/check_docs.py

bench: setup
	$(BIN)/python benchmarks/memory.py

# Builds an environment for every peer under build/peers first: some 10 GB and, for llama.cpp, a compiler.
bench-peers: setup
	$(BIN)/python benchmarks/peers/run.py
