# `make ptq` and `make test` are all there is to know; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# Only the modules that are used are compiled, as they are used: --no-compile.
.PHONY: ptq test lint clean

ptq: .venv/installed
	$(BIN)/python ptq.py protect=boundary

test: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	$(BIN)/pip install --quiet --no-compile --no-deps vbench==0.1.5
	touch $@ .venv/installed

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
