# make train | test | test-cluster | check | bench | gpu-bundle: each sets up .venv first, where pyproject.toml has changed since.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: train test test-cluster check bench gpu-bundle clean
train: .venv/ready
	$(BIN)/python -m trainer

test: .venv/ready
	$(BIN)/python -m pytest

test-cluster: .venv/ready  # on a real Slurm; needs the Debian packages slurm-wlm and munge
	$(BIN)/python -m pytest -n 0 -m cluster -rs

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; else echo "no hadolint for this platform"; fi

bench: .venv/ready
	$(BIN)/python -m benchmarks

gpu-bundle: .venv/ready  # what gpu/run.sh needs on a machine without a network
	PYTHON=$(BIN)/python bash gpu/bundle.sh

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is not on the PATH"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
