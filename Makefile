# make sweep and make test set everything up; the rest is for developers.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO_COHORT := cohorts/phantom
DEMO_RUN ?= runs/demo

.PHONY: setup sweep test slow lint types bench clean

setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: setup
	$(BIN)/python -m pytest -m 'not slow and not gpu'
	$(BIN)/python -m pytest -m 'slow and not gpu'

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy
