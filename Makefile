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

help:
	@echo "make demo   install, fetch real data, convert it, train ERM and FixMatch on the same labels, compare, write a report"
	@echo "make test   install, then run the whole test suite, ruff and mypy"
	@echo "make setup  install only (.venv; FFCV too where the machine allows)"
	@echo "make ffcv   try again to install FFCV     make dali   install NVIDIA DALI     make clean   remove .venv and caches"

setup: $(VENV)/.installed $(VENV)/.ffcv-tried

# A package list that changed means a new install; code changes do not (the install is editable).
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else "error: fastssl needs Python 3.10 to 3.13, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	if [ ! -x $(BIN)/python ]; then
	  if ! $(PYTHON) -m venv $(VENV) > /tmp/fastssl-venv.$$$$ 2>&1; then
	    if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv python3-pip > /dev/null
	      rm -rf $(VENV); $(PYTHON) -m venv $(VENV)
	    else
	      cat /tmp/fastssl-venv.$$$$; echo "error: this Python cannot make a virtual environment; ask for the package python3-venv (sudo apt-get install python3-venv)" >&2; exit 1
	    fi
	  fi
	  rm -f /tmp/fastssl-venv.$$$$
	fi
	echo "[setup] installing fastssl and what it needs (PyTorch is large: some minutes the first time)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# FFCV is an extra that must be compiled. Where that is not possible the reader and writer of .beton files in fastssl work without it.
$(VENV)/.ffcv-tried: $(VENV)/.installed
	@$(MAKE) --no-print-directory ffcv || echo "[setup] going on without the ffcv package: .beton files are still written and read by fastssl itself"
	touch $@

ffcv:
	@if $(BIN)/python -c 'import ffcv' > /dev/null 2>&1; then echo "[setup] ffcv is already installed"; exit 0; fi
	have() { command -v g++ > /dev/null && command -v pkg-config > /dev/null && pkg-config --exists opencv4 libturbojpeg; }
	headers() { $(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; }
	if ! have || ! headers; then
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
	    echo "[setup] installing the system packages that FFCV is built with (about two minutes)"
	    apt-get update -qq
	    packages="g++ pkg-config libopencv-dev libturbojpeg0-dev"; headers || packages="$$packages python3-dev"
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages > /dev/null || { echo "[setup] the system packages for FFCV could not be installed"; exit 1; }
	  else
	    echo "[setup] FFCV needs a compiler and two libraries that are missing here; as root: apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev, then: make ffcv"; exit 1
	  fi
	fi
	echo "[setup] building ffcv"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt numba opencv-python-headless fastargs pytorch_pfn_extras terminaltables assertpy pandas tqdm psutil setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps ffcv
	$(BIN)/python -c 'import ffcv'

dali: $(VENV)/.installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt 'nvidia-dali-cuda130'
	$(BIN)/python -c 'import nvidia.dali as d; print("DALI", d.__version__)'

demo: setup
	@$(BIN)/python recipes/demo/run.py --data $(DATA) --runs $(RUNS) $(DEMO_ARGS)

lint: $(VENV)/.installed
	@$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

test: setup lint
	@$(BIN)/python tests/golden/replay.py
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
