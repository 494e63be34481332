# Two commands for everyone: make run, make test. For developers: make check (what CI runs), make test-all, make format.
PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin
export EDGEJOULE_ENVIRONMENTS ?= $(CURDIR)/.venv/environments
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run test test-all check format lint types clean
.DEFAULT_GOAL := help

help:
	@echo "make run       install into .venv, then run the quickstart study (about 5 minutes after the install)"
	@echo "make test      install what the tests need, then run them"
	@echo "make check     format, lint, types, tests, docs: what CI runs"
	@echo "make test-all  the tests and the long studies too"

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "edgejoule needs Python 3.11 or newer: make PYTHON=python3.12 run"; exit 2; }
	@echo "== making .venv"
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment: install its venv package (Debian: apt-get install python3-venv)"; exit 2; }
	@touch $@

.venv/host: .venv/made pyproject.toml constraints.txt
	@echo "== installing edgejoule with torch, timm, onnxruntime and openvino into .venv (about 1 GB, a few minutes the first time)"
	$(PIP) install --constraint constraints.txt --editable '.[host]'
	@touch $@

.venv/test: .venv/host
	@echo "== installing what the tests need"
	$(PIP) install --constraint constraints.txt --editable '.[host,test,dev]'
	@touch $@

# LiteRT, ExecuTorch, ncnn, MNN and Core ML each in an environment of their own: their tests are skipped where it is missing.
.venv/environments/made: .venv/test src/edgejoule/environments.py
	@echo "== making the environments of LiteRT, ExecuTorch, ncnn, MNN and Core ML (about 1.2 GB, a few minutes the first time)"
	@$(BIN)/edgejoule doctor --install litert --install executorch --install ncnn --install mnn --install coreml
	@touch $@

run: .venv/host
	@echo "== running the quickstart study; stop it with Ctrl-C, run it again to resume"
	@$(BIN)/edgejoule run quickstart

test: .venv/test
	@echo "== running the tests (browser tests are skipped where Chromium is missing)"
	@$(BIN)/python -m pytest -m "not study" -rs -n $(PROCESSES) --dist loadfile
	@echo "== all green. Next: make run, or edgejoule --help (in .venv/bin)"

test-all: .venv/test .venv/environments/made
	@echo "== running all tests, the long studies too"
	@$(BIN)/python -m pytest -rs -n $(PROCESSES) --dist loadfile

check: .venv/test .venv/environments/made
	@echo "== format, lint, types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory test

format: .venv/test
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
