# `make demo` and `make test` need Python 3.11 or later, make and a package index; nothing else.
# Another Python: make test PYTHON=/path/to/python3.12

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# Triton interprets kernels for a whole process or not at all, so those tests are a step of their own.
INTERPRET := $(if $(filter Linux,$(shell uname)),TRITON_INTERPRET=1 $(PYTEST))
CORE := mlstm step linear_attention states packed strides precision extreme operators errors \
	errors_states spec defaults

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-core lint docs notebooks hub clean

help:  ## this list
	@echo "make demo       train a small xLSTM, let it write, draw two plots (under 5 minutes on 2 cores)"
	@echo "make test       run the tests (about 7 minutes on 2 cores)"
	@echo "make test-core  run those of the operator alone (about a minute)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       build the site into build/site; open build/site/index.html"
	@echo "make hub        build/hub, a folder that the package kernels loads"
	@echo "make clean      remove $(VENV), builds and caches"

demo: $(VENV)/.installed-train
	$(BIN)/tfla demo

test: $(VENV)/.installed-dev
	$(PYTEST)
	$(if $(INTERPRET),$(INTERPRET) tests/interpreter)

test-core: $(VENV)/.installed-dev
	$(PYTEST) $(CORE:%=tests/test_%.py)
	$(if $(INTERPRET),$(INTERPRET) tests/interpreter/test_kernels.py)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/figures/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

# Run anew, with the outputs stored in them: after a change of a notebook.
notebooks: $(VENV)/.installed-docs
	$(PIP) install -c constraints.txt ipykernel
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace docs/notebooks/*.ipynb

hub: $(VENV)/.installed-train
	$(BIN)/python -m tfla.integrations.hub build/hub

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again only when what is to be installed has changed. torch goes first and alone: with the
# pin, the index decides which build of it that is, and nothing after it can replace it.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.12 python3.11 python3.13 python3.14 python; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		echo "$$python -m venv $(VENV)"; \
		"$$python" -m venv $(VENV) && exit 0; \
		rm -rf $(VENV); \
		echo "make: '$$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; \
	done; \
	echo "make: no Python 3.11 or later found; install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1
