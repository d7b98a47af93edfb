# Thin: each target makes the environment first, then calls one tool.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help reproduce test test-slow lint docs mutants lock

help:
	@echo "make reproduce   environment from the lock, then the embedded experiment, end to end"
	@echo "make test        environment, then the whole test suite"
	@echo "make test-slow   kills, scale, Slurm, the image: needs root, slurm-wlm, munge, buildah, debootstrap, chromium"
	@echo "make lint        environment, then format, lint, spelling, types, import rules, workflow, documentation"
	@echo "make docs        the documentation as HTML, in build/docs"
	@echo "make mutants     change the numeric code bit by bit; list what no test notices (hours)"
	@echo "make lock        resolve requirements.lock again from pyproject.toml"

# The command `mochi` runs the code of the folder it is called in, as `python -m mochi` does: a copy of the project
# runs its own. An editable install would run the code of this folder there.
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
	python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.ready
	python -m pytest -o pythonpath=". .ci" -o timeout=2900 --durations=15 .ci

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
	mutmut run
	mutmut results

lock: $(VENV)/.ready
	pip --disable-pip-version-check install --quiet uv
	uv pip compile pyproject.toml --all-extras --universal --generate-hashes --python-version 3.11 \
	  --no-header --no-annotate --quiet -o requirements.lock
