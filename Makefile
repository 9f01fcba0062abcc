# Everything a newcomer needs: `make demo` and `make test`. `make` alone lists the rest.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check --no-input

.PHONY: help
help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' \
		| while IFS='|' read -r target does; do printf '%-18s%s\n' "$$target" "$$does"; done

# -- what it does --------------------------------------------------------------------------------

.PHONY: demo run test test-long test-package test-pythons test-lowest
.PHONY: lint format types bench bench-page docs docs-serve pictures test-site build
demo: $(READY)  ## Run the example application: real servers, some requests, how it started and stopped
	@cd docs/examples && ../../$(BIN)/python -m shortener.demo

run: $(READY)  ## Serve the example application until Ctrl-C
	@cd docs/examples && ../../$(BIN)/python -m shortener.demo --stay

test: $(READY)  ## Run the tests; ARGS goes to pytest: make test ARGS="-k example -x"
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-long: $(READY)  ## Run the tests that take minutes
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m long --timeout 1200 $(ARGS)

test-package: $(READY)  ## Build the package, install it alone and with each extra, and use it
	@$(BIN)/python -m pytest -m package $(ARGS) tests/package

test-pythons: $(READY)  ## Run the tests on each supported Python that is installed
	@$(BIN)/python -m tests.package pythons $(ARGS)

test-lowest: $(READY)  ## Run the tests with the oldest versions of all that is needed
	@$(BIN)/python -m tests.package lowest $(ARGS)

test-site: $(READY)  ## Read the documentation in Chromium, which Debian has as a package
	@$(BIN)/python -m pytest -m browser $(ARGS) tests/test_site.py

lint: $(READY)  ## Check style and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(READY)  ## Mend style and format where that can be done by itself
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

types: $(READY)  ## Check types with mypy and pyright, and that all public names have one
	@$(BIN)/mypy
	@$(BIN)/pyright
	@PATH="$(CURDIR)/$(BIN):$$PATH" pyright --verifytypes lifekit --ignoreexternal

bench: $(READY)  ## Measure lifekit beside its floors and other libraries; ARGS names a part
	@$(BIN)/python -m tests.benchmarks $(ARGS)

bench-page: $(READY)  ## Measure what docs/benchmarks.md shows, save it and draw it
	@$(BIN)/python -m tests.benchmarks --save $(ARGS)

docs: $(READY)  ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation is in site/index.html"

pictures: $(READY)  ## Draw the pictures of the documentation anew
	@PYTHONPATH=docs/examples $(BIN)/python -m tests.pictures

docs-serve: $(READY)  ## Serve the documentation, and again after each change
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

build: $(READY)  ## Build the wheel and the sdist into dist/
	@rm -rf dist
	@$(BIN)/python -m build --installer uv
	@$(BIN)/uv tool run twine check --strict dist/*

# -- where it does it ----------------------------------------------------------------------------

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lifekit needs Python 3.11 or later, which '$(PYTHON)' is not." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up .venv, which takes a minute ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]' || { \
		echo "pip failed. It says more by itself: $(BIN)/pip install -c constraints.txt -e '.[dev]'" >&2; \
		exit 1; }
	@touch $@

.PHONY: constraints clean
constraints:  ## Pin anew what the development environment consists of
	@rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	@build/fresh/bin/python $(PIP_INSTALL) '.[dev]'
	@{ grep '^#' constraints.txt; build/fresh/bin/python -m pip freeze | grep -v '^lifekit '; } \
		> build/pins
	@mv build/pins constraints.txt && rm -rf build/fresh

clean:  ## Remove all that was made, .venv too
	@rm -rf .venv site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
