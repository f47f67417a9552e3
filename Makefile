PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

setup: .venv/installed ## make .venv from pyproject.toml; a second call reuses it

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: setup ## train a tiny EoMT on toy streets, adapt it with and without LoRA, print the table
	$(BIN)/python scripts/demo.py

test: setup ## run all tests but those of soak, two at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

soak: setup ## run the long tests that quick ones cover, 30 minutes at most
	timeout 1800 $(BIN)/python -m pytest -m soak -n 2 --durations=15

check: setup ## lint and format checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## mend what lint and format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches, keep outputs/
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
