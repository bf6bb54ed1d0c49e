# `make demo` and `make test` need Python 3.11 or later and nothing else: each sets up its environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check setup

demo: .venv/run.stamp
	$(BIN)/python scripts/demo.py

test: .venv/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test

check: .venv/dev.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

setup: .venv/dev.stamp

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/dev.stamp: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@ .venv/run.stamp
