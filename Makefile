# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup quickstart quickstart-video check-curves test test-exhaustive test-fast test-triton collect lint docs schema clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a few minutes"
	@# torch by itself first: pip then never considers another build of it for a package that needs it
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[vae,video,text,table,http,quickstart,slurm,deepspeed,float8,docs,dev]'
	touch $@

setup: $(VENV)/.ready  ## the virtual environment

quickstart: setup  ## raw pictures -> shards -> training, kill, resume -> samples and curves, in minutes on a CPU
	$(BIN)/python -m pomscale.quickstart

quickstart-video: setup  ## moving digits: mp4 files -> shards -> training with texts -> long clips, in minutes on a CPU
	$(BIN)/python -m pomscale.quickstart.video

check-curves: setup  ## trains the smallest recipe and compares its curves with those that are shipped, in minutes
	$(BIN)/python -m pomscale.quickstart.curves

# Compiled modules are written, whatever the environment says: tests start hundreds of processes.
test: setup  ## all tests, five at a time: many of them wait for SLURM
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 5 --dist worksteal

test-exhaustive: setup  ## the rest: the same again, many more times or under more conditions
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m exhaustive

test-fast: setup  ## one process at a time: units, numerics, data; a few minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not exhaustive" tests/unit tests/numerics tests/data

# The oldest and the newest version that pyproject.toml allows; the interpreter of the oldest needs numpy below 2.4.
test-triton: setup  ## the Triton kernels with the oldest and the newest Triton, which come from PyPI; minutes
	for versions in triton==3.6.0\ numpy==2.3.5 triton==3.9.0; do \
	  folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(BIN)/pip install -q --no-deps --target $$folder $$versions && \
	  PYTHONPATH=$$folder $(BIN)/python -c 'import triton; print("triton", triton.__version__)' && \
	  PYTHONPATH=$$folder OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/numerics/test_pom_triton.py && \
	  rm -r $$folder || exit 1; \
	done

collect: setup  ## imports all tests and runs none; their compiled modules are kept for the workers of `make test`
	@said=$$(PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --collect-only --quiet) || { echo "$$said"; exit 1; }

lint: setup  ## style, types, who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: setup  ## the documentation as a site in build/site; a broken link fails
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/site

schema: setup  ## recipes/schema.json, after a change of pomscale/config
	$(BIN)/pomscale config schema > recipes/schema.json

clean:  ## the virtual environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
