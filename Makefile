# make demo: the quickstart. make test: lint, types, CPU tests. make test-gpu: the kernels on a GPU.
# make docs: the documentation's site, in site/.
# All make their own virtual environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process a core, each with one thread.
WORKERS ?= auto

.PHONY: demo test test-all test-gpu docs lint check-python clean
.DEFAULT_GOAL := test

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Needs Python 3.11 or newer as '$(PYTHON)'. Another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Needs Python's venv module. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }

# torch comes first: its CPU build where the package index offers one, so that nothing pulls CUDA later.
$(STAMP): pyproject.toml constraints.txt | check-python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples,test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

# With coverage, which costs the interpreter's tests a fifth of their time.
test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov=modelopt_sparse --cov=modelopt_sparse_cli --cov-fail-under=95
	VENV=$(VENV)-oldest PYTHON=$(PYTHON) bash tests/oldest.sh

# On a machine with a CUDA GPU, whose own build of torch is on the index. Cases that share kernels run together.
test-gpu: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu -n $(WORKERS) --dist loadgroup

# What is generated in pages is written first.
docs: $(STAMP)
	$(BIN)/python docs/reference.py
	$(BIN)/python -m modelopt_sparse.bench.tables --into docs/benchmarks.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-oldest site .pytest_cache .ruff_cache .mypy_cache .hypothesis
