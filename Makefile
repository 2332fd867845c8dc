# One verb each. Every verb that needs the packages installs them first; a repeated install costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKS := $(patsubst %/pyproject.toml,%,$(wildcard collie_*/pyproject.toml plugins/*/pyproject.toml))
SOURCES := $(wildcard $(PACKS:%=%/src))
STAMP := $(VENV)/.installed
JOBS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test everything matrix crash check format bench docs wheels constraints clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with the exact versions of constraints.txt and every pack, editable

# The constraints go in first and the packs without dependencies, so that nothing is resolved and nothing drifts;
# `pip check` then says whether the packs' own requirements are met.
$(STAMP): constraints.txt pyproject.toml $(PACKS:%=%/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --no-compile -r constraints.txt
	@# On every core, while pip would use one. Files that are no Python, such as templates, do not compile: as with pip.
	$(BIN)/python -m compileall -qq -j $(JOBS) $(VENV)/lib || true
	$(BIN)/python -m pip install --no-deps --no-build-isolation $(PACKS:%=-e %/) -e .
	$(BIN)/python -m pip check
	touch $@

quickstart: install ## Train a small llama from random weights on the shipped questions: a minute on two cores
	@# Threads that wait without spinning: a machine that does other things too stays quick.
	OMP_WAIT_POLICY=passive $(BIN)/collie train examples/quickstart.yaml

test: install ## All tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

everything: export COLLIE_TEST_ALL = 1
everything: test ## All tests, and combinations of which they take only a part

matrix: export COLLIE_MATRIX = 1
matrix: install ## Every family x optimizer x adapter x topology: hours
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/test_matrix.py $(ARGS)

crash: export COLLIE_CRASHES = 60
crash: install ## Sixty runs that are killed at any moment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/crash $(ARGS)

check: install ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

format: install ## Repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Every benchmark, one after the other
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

docs: export NO_MKDOCS_2_WARNING := 1
docs: install ## The pages that are generated from the code, and the site in build/site
	$(BIN)/python -m collie_core.config.reference docs/configuration.md
	$(BIN)/python -c 'from collie_core.config.rules import compatibility_page as page; print(page(), end="")' \
	  >docs/compatibility.md
	$(BIN)/python -m collie_testkit.reference >docs/checks.md
	$(BIN)/mkdocs build --quiet --strict

wheels: install ## An sdist and a wheel of every distribution, in dist
	rm -rf dist
	mkdir -p build
	set -e; for pack in $(PACKS) .; do $(BIN)/python -m build --no-isolation --outdir dist $$pack >build/wheel.log 2>&1 \
	  || { cat build/wheel.log; exit 1; }; done

constraints: ## Write constraints.txt anew from what .venv holds
	{ sed '/^[^#]/d' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable \
	  | sed -e '/^pip==/d' -e 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## Remove what was built; .venv and runs stay
	rm -rf build dist .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
