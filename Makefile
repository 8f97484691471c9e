# `make ptq` and `make test` are all there is to know; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# Only the modules that are used are compiled, as they are used: --no-compile. Who waits sees what pip does; a CI's log
# is spared it.
PIP := $(BIN)/pip --disable-pip-version-check install --no-compile $(if $(CI),--quiet --quiet)
# Images of containers set it; a process that compiles what it imports anew takes 38 s to begin, instead of 14.
export PYTHONDONTWRITEBYTECODE :=
SPREAD := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=20
BY_CPU := tests/kernels tests/formats tests/quant tests/wan/test_footprint.py tests/wan/test_products.py \
	tests/qat/test_loop.py tests/qat/test_blockwise.py \
	tests/qat/test_estimate.py --ignore tests/kernels/test_cuda_compiles.py -k "not (killed or processes or interpreter)"

.PHONY: ptq test test-avx2 lint docs clean

ptq: .venv/installed
	$(BIN)/python ptq.py protect=boundary

test: .venv/installed-dev
	@echo "tests: on 2 processes, without those marked slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(SPREAD)

# What depends on the CPU's instructions once more, as AVX2 sees it, with OpenMP's own number of threads; where the CPU
# has nothing newer, `make test` was that.
test-avx2: .venv/installed-dev
	$(BIN)/python tools/as_avx2.py --if-other $(BIN)/python -m pytest -m "not slow" $(SPREAD) $(BY_CPU)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages of docs/ as a site in site/; a link that leads nowhere fails.
docs: .venv/installed-docs
	$(BIN)/mkdocs build

.venv/bin/python:
	@echo "set-up 1: a virtual environment in .venv"
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "set-up 2: wanquant and what it needs; torch's own packages are 3 GB to download, minutes in all"
	$(PIP) --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "set-up 2: wanquant, what it needs and the tests' tools; torch's own packages are 3 GB to download, minutes in all"
	$(PIP) --editable '.[dev]'
	@echo "set-up 3: VBench, beside current versions of what it pins"
	$(PIP) --no-deps vbench==0.1.5 pyiqa==0.1.16
	touch $@ .venv/installed

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
