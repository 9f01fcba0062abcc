# Everything a newcomer needs: `make demo` and `make test`. `make` alone lists the rest.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP_INSTALL := -m pip install --disable-pip-version-check --no-input
SILENT := --quiet --quiet
# Many tests start programs, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
# uv reads no pip.conf: where that says how to reach an index, pip itself installs.
PIP_KNOWS_MORE := '\.(index-url|no-index|proxy|trusted-host|client-cert)='

.PHONY: help
help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' \
		| while IFS='|' read -r target does; do printf '%-18s%s\n' "$$target" "$$does"; done

# -- what it does --------------------------------------------------------------------------------

.PHONY: demo run test test-long test-proofs test-package test-pythons test-lowest test-newest
.PHONY: fuzz lint format types bench bench-page docs docs-serve pictures test-site build
demo: $(READY)  ## Run the example application: real servers, some requests, how it started and stopped
	@echo "Starting PostgreSQL, Valkey and the example: a few seconds."
	@cd docs/examples && ../../$(BIN)/python -m shortener.demo

run: $(READY)  ## Serve the example application until Ctrl-C
	@cd docs/examples && ../../$(BIN)/python -m shortener.demo --stay

test: $(READY)  ## Run the tests; ARGS goes to pytest: make test ARGS="-k example -x"
	@$(if $(ARGS),,echo "Running more than 6000 tests in two processes: about three minutes on two idle cores.")
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-long: $(READY)  ## Run the tests that take minutes; TIMES=10 for ten times as many random ones
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m long --timeout 1200 $(ARGS)

test-proofs: $(READY)  ## Run what is run before a release: other libraries' suites, random applications
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m proof --timeout 1200 $(ARGS)

test-package: $(READY)  ## Build the package, install it alone and with each extra, and use it
	@$(BIN)/python -m pytest -m package $(ARGS) tests/package

test-pythons: $(READY)  ## Run the tests on each supported Python that is installed
	@$(BIN)/python -m tests.package pythons $(ARGS)

test-lowest: $(READY)  ## Run the tests with the oldest versions of all that is needed
	@$(BIN)/python -m tests.package lowest $(ARGS)

test-newest: $(READY)  ## Run the tests with the newest versions of all, whatever constraints.txt says
	@$(BIN)/python -m tests.package newest $(ARGS)

fuzz: $(READY)  ## Say random bytes to the gateway for a minute; ARGS="--seconds 3600" for longer
	@$(BIN)/python -m tests.sandbox.postgres.fuzz $(ARGS)

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
	@echo "Setting up .venv, once: about half a minute."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing Python packages from PyPI ..."
	@{ ! $(BIN)/python -m pip config list | grep -Eq $(PIP_KNOWS_MORE) \
		&& $(BIN)/python $(PIP_INSTALL) $(SILENT) -c constraints.txt uv \
		&& $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'; } 2>/dev/null || { \
		echo "Now with pip, which takes about two minutes:"; \
		$(BIN)/python $(PIP_INSTALL) --progress-bar off -c constraints.txt -e '.[dev]'; }
	@touch $@

.PHONY: constraints clean
constraints:  ## Pin anew what the development environment consists of
	@rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	@build/fresh/bin/python $(PIP_INSTALL) $(SILENT) '.[dev]'
	@{ grep '^#' constraints.txt; build/fresh/bin/python -m pip freeze | grep -v '^lifekit '; } \
		> build/pins
	@mv build/pins constraints.txt && rm -rf build/fresh

clean:  ## Remove all that was made, .venv too
	@rm -rf .venv site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
