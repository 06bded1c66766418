# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRANSFORMERS := 5.17.0
COMPAT := $(VENV)/transformers-$(OLDEST_TRANSFORMERS)

.PHONY: help setup demo test test-compat lint bench clean

help:  ## Show this help
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY)  ## Create .venv and install the project with its tested pins

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "dist-reg needs Python 3.11 to 3.13; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test,dev]'
	touch $(READY)

demo: $(READY)  ## Fine-tune MiniLM with and without HyPe on two processes (minutes)
	$(BIN)/dist-reg demo

test: $(READY)  ## Run every test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

$(COMPAT): $(READY)
	rm -rf $(COMPAT)
	grep -v -e '^transformers=' -e '^huggingface_hub=' constraints.txt > $(COMPAT).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(COMPAT).txt --target $(COMPAT) transformers==$(OLDEST_TRANSFORMERS)

test-compat: $(COMPAT)  ## Run the attach, parity and checkpointing tests on the oldest supported transformers
	PYTHONPATH=$(COMPAT) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m compat

lint: $(READY)  ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

bench: $(READY)  ## Measure what a step with HyPe costs
	$(BIN)/dist-reg bench step --methods hype

clean:  ## Remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache
