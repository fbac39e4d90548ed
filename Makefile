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

# Every method of ours and of every peer, into benchmarks/results: hours. It resumes when it is killed. It first builds
# an environment for each peer under build/peers: some 10 GB and, for llama.cpp, a compiler. BENCH names another model:
# make bench-peers BENCH="--name mine --model DIR --calibration TEXT --text TEXT"
bench-peers: setup
	$(BIN)/python benchmarks/methods.py --name demo-model $(BENCH)
