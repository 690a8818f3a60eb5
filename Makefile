# `make demo` and `make test` are all that a newcomer needs; each prepares its own .venv and is quick the second time.

PYTHON ?= python3
BIN := .venv/bin

# Flower and Ray neither report home nor install anything while a run goes on.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/installed  ## six hospitals train one network on sample images and compare (4 to 8 minutes on 2 CPU cores)
	$(BIN)/tat simulate preset=demo

test: .venv/installed  ## the tests, without the long ones
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

test-all: .venv/installed  ## every test, one after the other: the long ones want the machine for themselves
	$(BIN)/python -m pytest -m ''

check: .venv/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and what tools left behind; runs/ and data/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip, not uv: it takes torch from wherever the machine's pip is pointed at (README, "Installing").
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got %d.%d; name one: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[simulation,dev]'
	@touch $@
