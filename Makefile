# Each of these needs Python 3.11 or later and nothing else: it sets up its environment in $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs setup

demo: $(VENV)/run.stamp
	$(BIN)/python scripts/demo.py

test: $(VENV)/dev.stamp
	PATH="$(abspath $(BIN)):$$PATH" scripts/test

check: $(VENV)/dev.stamp
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

docs: $(VENV)/docs.stamp
	PATH="$(abspath $(BIN)):$$PATH" scripts/docs

setup: $(VENV)/dev.stamp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("expected Python 3.11 or later, got %d.%d: make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/run.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/dev.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ $(VENV)/run.stamp

$(VENV)/docs.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@ $(VENV)/run.stamp
