# Two commands are all one needs: `make demo` and `make check`. Both install what they use.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Extra arguments for one run, such as: make test PYTEST_ARGS="-k granite -x"
PYTEST_ARGS ?=
# The same for the coverage document: make coverage COVERAGE_ARGS="--only llama,gemma3 --jobs 4"
COVERAGE_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
# One target after the other, also under `make -j`: their output is meant to be read.
.NOTPARALLEL:
.PHONY: help venv demo check lint types layers test format coverage clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## create the virtual environment and install normfuse into it, once

$(STAMP): pyproject.toml constraints.txt tools/check_machine.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) must be on the PATH: install Python 3.10 or newer, or pass PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/check_machine.py
	@echo "==> installing into $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,hf]"
	@touch $@

demo: venv ## compile real model architectures with normfuse and compare them with eager
	$(BIN)/python examples/demo.py

check: venv lint types layers test ## everything that must pass before a commit
	@echo "==> all checks passed"

lint: venv ## formatting, lint rules and import rules
	@echo "==> lint"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/check_imports.py

types: venv ## mypy --strict on the package
	@echo "==> types"
	$(BIN)/mypy

layers: venv ## the layering of the package
	@echo "==> layers"
	$(BIN)/lint-imports

test: venv ## all tests
	@echo "==> tests"
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal $(PYTEST_ARGS)

format: venv ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

coverage: venv ## write docs/coverage.md: the norms of every transformers model type (half an hour)
	$(BIN)/python tools/coverage.py $(COVERAGE_ARGS)

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find normfuse tests examples benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
