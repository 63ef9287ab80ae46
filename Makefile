# fedtune. `make` alone lists the targets.
#
#   make demo                       a federation on this machine, from nothing
#   make test PYTHON=python3.12     with another Python
#   make test ARGS="-k layout -x"   arguments for pytest
#   make test WORKERS=0             in one process (a debugger needs that)
#   make bench NAME=engine          one benchmark (all of them without NAME)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
NAME ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --progress-bar off -c constraints.txt
FOLDERS := fedtune server client privacy simulations tests

# Nothing here phones home, and nothing is fetched once the environment stands.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_DATASETS_OFFLINE=1 \
	TRANSFORMERS_OFFLINE=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
	FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 RAY_USAGE_STATS_ENABLED=0 \
	WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help demo test faults env check lint types doctest proto fmt bench clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-run ## Tune a small model over simulated clients, on this machine
	@echo "==> fedtune simulate simulations/experiments/demo.toml"
	@$(OFFLINE) $(BIN)/fedtune simulate simulations/experiments/demo.toml $(ARGS)

test: $(VENV)/.stamp-dev ## Run the tests, offline
	@echo "==> pytest $(ARGS)"
	@$(OFFLINE) $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

faults: $(VENV)/.stamp-dev ## Kill, cut off and fill up real processes (minutes)
	@echo "==> pytest -m faults $(ARGS)"
	@$(OFFLINE) $(BIN)/pytest -m faults tests/real $(ARGS)

env: $(VENV)/.stamp-dev ## Create .venv with everything that tests and checks need
	@echo "==> ready: source $(BIN)/activate"

check: lint types doctest ## Lint, formatting, types and the examples in docstrings

lint: $(VENV)/.stamp-dev
	@echo "==> ruff"
	@$(BIN)/ruff check $(FOLDERS)
	@$(BIN)/ruff format --check $(FOLDERS)

# The folders are mapped into one package, which mypy and doctest cannot know:
# both look at a fresh copy, laid out as a user gets it.
.PHONY: build/check
build/check: $(VENV)/.stamp-dev
	@rm -rf build/check build/lib build/bdist.*
	@$(PIP) install --quiet --no-deps --no-build-isolation --target build/check .
	@rm -rf build/lib build/bdist.*

types: build/check
	@echo "==> mypy --strict -p fedtune"
	@MYPYPATH=build/check $(BIN)/mypy --strict -p fedtune

doctest: build/check
	@echo "==> pytest --doctest-modules"
	@$(OFFLINE) PYTHONPATH=build/check $(BIN)/pytest --doctest-modules -q build/check/fedtune

proto: $(VENV)/.stamp-dev ## Make the generated code of the body service again
	@$(PIP) install --quiet --no-deps --target build/proto grpcio-tools==1.80.0
	@PYTHONPATH=build/proto $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
		fedtune/split/body.proto

fmt: $(VENV)/.stamp-dev ## Format the code and mend what can be mended
	@$(BIN)/ruff check --fix $(FOLDERS)
	@$(BIN)/ruff format $(FOLDERS)

bench: $(VENV)/.stamp-dev ## Run the benchmarks, short (NAME=... for one, ARGS= for full length)
	@for file in simulations/benchmarks/$(or $(NAME),[a-z]*).py; do \
		[ -f "$$file" ] || { echo "no benchmark $$file" >&2; exit 1; }; \
		name=$$(basename "$$file" .py); echo "==> $$name"; \
		$(OFFLINE) $(BIN)/python -m fedtune.simulations.benchmarks.$$name \
			$(if $(filter undefined file,$(origin ARGS)),--quick,$(ARGS)) || exit 1; \
	done

clean: ## Remove builds and caches; keep .venv and runs
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find $(FOLDERS) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	@rm -rf $(VENV)

# Stamps: a second call finds the environment as it should be and does nothing.

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedtune needs Python 3.11 or later: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "==> no ensurepip here: taking pip from $(PYTHON)"; \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@touch $@

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	@echo "==> installing fedtune and what it runs on (minutes, the first time)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	@echo "==> installing fedtune with what tests and checks need (minutes, the first time)"
	@$(INSTALL) -e '.[dev,bench,ray,minilm,pdf,postgres,tensorboard,mlflow,wandb]'
	@touch $(VENV)/.stamp-run $@
