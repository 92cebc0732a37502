# Every target sets up what it needs in .venv; done again, it takes a second.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.collegium-installed
export HF_HUB_OFFLINE := 1

.PHONY: demo test check bench bench-kernels setup clean
setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on -e '.[cpu,ray,dev]'
	touch $(STAMP)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest

clean:
	rm -rf $(VENV)

bench-kernels: $(STAMP)
	PYTHONPATH=kernels $(BIN)/python -m evals.kernels.bench --all-shapes
