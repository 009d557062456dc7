# Two commands for a newcomer: `make demo` and `make test`. Both set up the same `.venv` first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.PHONY: demo test setup ffcv dali lint clean help

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
RUNS   ?= runs
DATA   ?= data
# A font cache that does not depend on a home folder that can be written.
export MPLCONFIGDIR ?= $(abspath $(VENV))/.matplotlib

help:
	@echo "make demo   install, fetch real data, convert it, train ERM and FixMatch on the same labels, compare, write a report"
	@echo "make test   install, then replay the golden numbers, lint (ruff, mypy) and run the test suite"
	@echo "make setup  install only (.venv; FFCV too where the machine allows)"
	@echo "make ffcv   try again to install FFCV     make dali   install NVIDIA DALI     make clean   remove .venv and caches"

setup: $(VENV)/.installed $(VENV)/.ffcv-tried

# A package list that changed means a new install; code changes do not (the install is editable).
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else "error: fastssl needs Python 3.10 to 3.13, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	# A Python without python3-venv leaves a folder with an interpreter and no pip behind: that is no environment yet.
	if ! $(BIN)/python -m pip --version > /dev/null 2>&1; then
	  if ! said="$$($(PYTHON) -m venv --clear $(VENV) 2>&1)"; then
	    rm -rf $(VENV)
	    if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv python3-pip > /dev/null
	      $(PYTHON) -m venv $(VENV)
	    else
	      echo "$$said"; echo "error: this Python cannot make a virtual environment; ask for the package python3-venv (sudo apt-get install python3-venv)" >&2; exit 1
	    fi
	  fi
	fi
	echo "[setup] installing fastssl and what it needs (PyTorch is large: some minutes the first time)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# FFCV is an extra that must be compiled. Where that is not possible the reader and writer of .beton files in fastssl work without it.
$(VENV)/.ffcv-tried: $(VENV)/.installed
	@$(MAKE) --no-print-directory ffcv FFCV_MAY_FAIL=yes
	touch $@

FFCV_APT := g++ pkg-config libopencv-dev libturbojpeg0-dev

ffcv:
	@give_up() {
	  echo "[setup] $$1"
	  if [ -n "$(FFCV_MAY_FAIL)" ]; then echo "[setup] going on without the ffcv package: fastssl itself writes and reads .beton files"; exit 0; fi
	  exit 1
	}
	if $(BIN)/python -c 'import ffcv' > /dev/null 2>&1; then echo "[setup] ffcv is already installed"; exit 0; fi
	have() { command -v g++ > /dev/null && command -v pkg-config > /dev/null && pkg-config --exists opencv4 libturbojpeg; }
	headers() { $(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; }
	if ! have || ! headers; then
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
	    echo "[setup] installing the system packages that FFCV is built with (about two minutes)"
	    packages="$(FFCV_APT)"; headers || packages="$$packages python3-dev"
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages > /dev/null; } || give_up "the system packages for FFCV could not be installed"
	  else
	    give_up "FFCV needs a compiler and two libraries that are missing here; for it: sudo apt-get install $(FFCV_APT) python3-dev, then: make ffcv"
	  fi
	fi
	echo "[setup] building ffcv"
	log="$$(mktemp)"; trap 'rm -f "$$log"' EXIT
	{ $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt numba opencv-python-headless fastargs pytorch_pfn_extras terminaltables assertpy pandas tqdm psutil setuptools \
	  && $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps ffcv \
	  && $(BIN)/python -c 'import ffcv'; } > "$$log" 2>&1 || { tail -n 15 "$$log"; give_up "the ffcv package could not be built (above: its last lines)"; }

dali: $(VENV)/.installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt 'nvidia-dali-cuda130'
	$(BIN)/python -c 'import nvidia.dali as d; print("DALI", d.__version__)'

demo: setup
	@$(BIN)/python recipes/demo/run.py --data $(DATA) --runs $(RUNS) $(DEMO_ARGS)

lint: $(VENV)/.installed
	@$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# pytest is last, so that its closing line is the last line.
test: setup
	@$(BIN)/python tests/golden/replay.py
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
