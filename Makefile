# The course in three commands: `make run`, `make test`, `make lab`. Only Python 3.11+ and make are needed.

# One thread a client, as many clients side by side as there are cores. The same number of threads everywhere (here,
# tests/conftest.py, the kernels): digits of a training depend on it, and with one they do not depend on the cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export JUPYTER_PREFER_ENV_PATH = 1
export PYTHONUNBUFFERED = 1
export JUPYTER_PLATFORM_DIRS = 1
# More options for pip, for example PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu".
PIP_OPTIONS ?=

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	{ echo $$p; break; }; done)
BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup run pages test lab results bench notebooks hospitals demo clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/ready: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.11 or newer found. Install one, or run: make PYTHON=/path/to/python3"; exit 1; fi
	@echo "Setting up .venv with $(PYTHON) (some minutes, once)"
	@$(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -e ".[test]"
	@touch $@

# The engine (Flower) is an extra: the tests and the hospitals use it, the course does not need it.
.venv/engine: .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -e ".[test,engine]"
	@touch $@

setup: .venv/ready  ## install everything into .venv

run: setup  ## make the knees, execute every notebook, write the course as HTML, print the comparison
	@$(BIN)/python -m fedkd_utils course

pages: setup  ## write the committed notebooks as HTML pages, without executing anything
	@$(BIN)/python -m fedkd_utils pages

test: .venv/engine  ## lint, types, unit tests, then every notebook strictly against its committed outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile tests
	$(BIN)/python -m pytest -p no:xdist --nbval --nbval-current-env --nbval-cell-timeout=600 notebooks

lab: setup  ## open the course in JupyterLab
	@$(BIN)/jupyter lab notebooks/00_start_here.ipynb

results: setup  ## tune every row, run every grid of the reference profile and what notebooks compare with; some 50 core hours, stop any time
	@$(BIN)/python -m fedkd_utils tune --profile reference
	@for grid in rows beyond all rival_weights new_knees; do $(BIN)/python -m fedkd_utils run --profile reference --grid $$grid || exit; done
	@for grid in live project; do $(BIN)/python -m fedkd_utils run --profile quick --grid $$grid --seed 0 || exit; done
	@$(BIN)/python -m fedkd_utils seconds --profile reference
	@$(BIN)/python -m fedkd_utils results --profile reference

bench: .venv/engine  ## measure everything side by side into data/results/bench; leave the machine alone meanwhile
	@$(BIN)/python -m fedkd_utils bench

notebooks: setup  ## execute the committed notebooks in place, in order, and stamp them
	@$(BIN)/python -m fedkd_utils notebooks

hospitals: .venv/engine  ## three hospitals as processes of this machine: run, report, stop
	@$(BIN)/python -m fedkd_utils hospitals

demo: setup  ## write data/demo again
	@$(BIN)/python -m fedkd_utils demo

clean:  ## delete what was made (cohorts, teachers, runs, the HTML copy), keep .venv
	rm -rf data/cache build
