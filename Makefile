# make demo   see the package at work on the scans in sample_data/
# make test   run every check, as continuous integration does
# make slow   run the tests that take minutes
#
# Each does its own set-up in .venv on a machine with Python 3.11 to 3.13; another one: make test PYTHON=python3.12
# On Linux, PyPI's torch brings several gigabytes of CUDA libraries. Without a GPU, the far smaller CPU build does:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test slow tools
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python pipelines/demo.py

test: $(VENV)/.installed-dev tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

slow: $(VENV)/.installed-dev tools
	$(BIN)/python -m pytest -m slow

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo 'medfusion needs Python 3.11 to 3.13, and "$(PYTHON)" is not: make $(MAKECMDGOALS) PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'Python lacks its venv module. On Debian or Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run quick; a change of dependencies renews the installation.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'Installing medfusion into $(VENV): a few minutes, once'
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'Installing medfusion and its checks into $(VENV): a few minutes, once'
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# What no Python package brings: a DICOM conformance checker, and a browser with its driver for the reports.
tools:
	@command -v dciodvfy >/dev/null && command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get -qq -o Acquire::http::Timeout=20 update >/dev/null 2>&1 && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends dicom3tools chromium \
	      chromium-driver >/dev/null 2>&1; } || \
	  echo 'dciodvfy, chromium or chromedriver is missing (Debian: dicom3tools, chromium, chromium-driver);' \
	    'the tests that need them are skipped'
