# Every target makes its own .venv when it is missing. `make demo` and `make test` are all the
# set-up there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench blas clean

help:
	@echo "make demo      one question answered plainly, tersely and verbosely by a small model"
	@echo "make test      the fast tests          make test-all  all, with the slow comparisons"
	@echo "make lint      ruff and mypy           make format    ruff's formatting"
	@echo "make bench     the benchmark tables that take minutes"

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mlxsteer needs Python 3.11 or newer; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.testing: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install -q -e '.[test]'
	@touch $@ $(VENV)/.installed

# The Linux wheel of mlx carries a slow BLAS; mlxsteer loads a system OpenBLAS in its place.
blas:
	@if [ "$$(uname -s)" = Linux ] && ! ldconfig -p 2>/dev/null | grep -q libopenblas.so.0; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq libopenblas0-pthread >/dev/null; \
	  else \
	    echo "Hint: a system OpenBLAS makes mlx on Linux up to 40 times faster:"; \
	    echo "      sudo apt-get install libopenblas0-pthread   (or your distribution's package)"; \
	  fi; \
	fi

demo: blas $(VENV)/.installed
	$(BIN)/mlxsteer demo

test: blas $(VENV)/.testing
	$(BIN)/python -m pytest

test-all: blas $(VENV)/.testing
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/.testing
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.testing
	$(BIN)/ruff check --fix --output-format concise .
	$(BIN)/ruff format .

# Those that need nothing beside the project and take minutes; the others say how in their first
# lines (on two cores defaults takes 40 minutes, ship_vectors hours).
TABLES := steering_cost extraction serving v4_primitives v4_exactness convert_importance convert_report

bench: blas $(VENV)/.testing
	@set -e; for table in $(TABLES); do \
	  echo "== $$table"; $(BIN)/python -m benchmarks.$$table; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
