# make quickstart   fresh machine -> venv, install, pretrain on text found on this machine, picture of the run
# make test         fresh machine -> venv, install, the whole test suite
# make setup        .venv alone;  make lint: style, types, import rule
SHELL := bash
PYTHON ?= python3
VENV := .venv
# Changes when the dependencies do: a second call installs nothing again.
STAMP := $(VENV)/.installed-$(shell cksum pyproject.toml | cut -d' ' -f1)

.PHONY: setup quickstart test lint clean
setup: $(STAMP)
	@echo "==> $(VENV) is ready"

$(STAMP):
	@echo "==> making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dist_transformer needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing torch (a CPU build where one is offered; minutes and gigabytes with CUDA)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "torch>=2.9,<2.14"
	@echo "==> installing dist_transformer and what it needs"
	@DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@rm -f $(VENV)/.installed-* && touch $@

quickstart: setup
	@launch/quickstart.sh

test: setup
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --durations 25

lint: setup
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
