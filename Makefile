# Everything runs in a virtual environment that the first call makes.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
# A worker that dies is not replaced: with --dist loadfile the new one may wait without an end.
WORKERS := -n 2 --max-worker-restart=0
PYTEST_ARGS ?= $(WORKERS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
SETTINGS := setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-oracles test-thorough check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/installed  ## install, and train a small model into WORKDIR
	$(BIN)/moe train --gin_file=quickstart.gin --workdir=$(WORKDIR)

test: $(VENV)/installed-test  ## run the tests, or some: PYTEST_ARGS="-k routing"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-oracles: $(VENV)/installed-oracle  ## compare with transformers (torch) and POT, which it installs
	$(BIN)/python -m pytest -m oracle

test-thorough: $(VENV)/installed-test  ## what takes minutes and tells little more
	$(BIN)/python -m pytest $(WORKERS) -m thorough

check: $(VENV)/installed-dev  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## remove the environment, caches and build leftovers; runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SETTINGS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/installed-test: $(SETTINGS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(SETTINGS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/installed $(VENV)/installed-test

$(VENV)/installed-oracle: $(SETTINGS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[oracle]'
	touch $@ $(VENV)/installed $(VENV)/installed-test
