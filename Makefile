# Each target installs the environment if it is missing or old, then calls the tools.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help reproduce test test-slow test-gpu lint docs mutants lock

help:
	@echo "make reproduce   install the locked environment, then run the embedded experiment end to end"
	@echo "make test        the test suite"
	@echo "make test-slow   slow tests; need root, slurm-wlm, munge, buildah, debootstrap, chromium"
	@echo "make test-gpu    tests of a real GPU; need one"
	@echo "make lint        format, lint, spelling, types, import contracts, workflow, documentation"
	@echo "make docs        build the documentation as HTML in build/docs"
	@echo "make mutants     mutation tests of the numeric code: list changes that no test detects (hours)"
	@echo "make lock        update requirements.lock from pyproject.toml"

# Like `python -m mochi`, the command `mochi` runs the code of the current folder, so a copy of the project runs its
# own code. With an editable install it would run the code of this folder.
$(VENV)/.ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, found " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	pip --disable-pip-version-check install --quiet --require-hashes -r requirements.lock
	printf '#!/bin/sh\nexec "$${0%%/*}/python" -m mochi "$$@"\n' > $(VENV)/bin/mochi
	chmod +x $(VENV)/bin/mochi
	touch $@

reproduce: $(VENV)/.ready
	snakemake --cores all

test: $(VENV)/.ready
	python -m pytest --numprocesses 3 --dist loadfile

test-slow: $(VENV)/.ready
	python -m pytest --numprocesses 2 --dist loadfile -o pythonpath=". .ci" -o timeout=2900 --durations=15 .ci

test-gpu: $(VENV)/.ready
	python -m pytest --gpu tests/gpu/test_real_gpu.py

lint: $(VENV)/.ready
	ruff format --check .
	ruff check .
	snakefmt --check Snakefile workflow
	mypy
	codespell
	lint-imports
	snakemake --lint
	sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

docs: $(VENV)/.ready
	sphinx-build --quiet docs build/docs
	@echo build/docs/index.html

mutants: $(VENV)/.ready
	mutmut run $(MUTANTS)
	mutmut results

lock: $(VENV)/.ready
	pip --disable-pip-version-check install --quiet uv
	uv pip compile pyproject.toml --all-extras --universal --generate-hashes --python-version 3.11 \
	  --no-header --no-annotate --quiet -o requirements.lock
