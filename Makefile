# Everything installs itself: a machine with Python 3.11 or newer is enough.   make help
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
MARK   := $(VENV)/.installed-
DEMO   := runs/demo

.DEFAULT_GOAL := help
.PHONY: help test lint format demo bench goldens clean

help:  ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

test: $(MARK)dev  ## run all tests on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(MARK)dev  ## ruff, pyright (strict) and the order of the imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(MARK)dev  ## lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(MARK)train  ## derive a network, train it on image patches, compare it with ISTA and FISTA
	rm -rf $(DEMO)
	$(BIN)/unroll show specs/lista_patches.yaml
	OMP_NUM_THREADS=1 $(BIN)/unroll train specs/lista_patches.yaml --out $(DEMO)  # small matrices: one thread is as fast, and steady
	@echo "picture: $(DEMO)/curves.png"

bench: $(MARK)dev  ## measure what the README claims; writes benchmarks/results/
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

goldens: $(MARK)dev  ## write the texts in tests/goldens/ anew: read the difference before you commit it
	$(BIN)/python -m pytest tests/derivation/test_goldens.py --update-goldens

clean:  ## remove what was made, the environment too
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# An environment that holds [dev] holds [train] too; a change of either file installs anew.
$(MARK)%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[$*]"
	touch $@
