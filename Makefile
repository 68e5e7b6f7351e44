# `make` lists the commands. PYTHON=python3.12 make install: another interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
PIP := pip install -q --disable-pip-version-check -c constraints.txt
PYTEST := pytest -n 2 --dist loadscope --no-loadscope-reorder
WANTED := --no-build-isolation -e .[dev]

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export RAY_USAGE_STATS_ENABLED := 0
# Container images often set it. Every process would then compile torch and Ray again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo check lint test tests test-all faults coverage test-gpu sbom audit clean
.DEFAULT_GOAL := help

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED)  ## create .venv with the package versions in constraints.txt

# uv takes seconds where pip takes minutes, but it has to be told pip's mirror and does not know all of pip's settings.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	export UV_DEFAULT_INDEX=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$(pip config get global.index-url 2>/dev/null)}}; \
	test -z "$$PIP_NO_INDEX" && $(PIP) uv && uv pip install -q -p $(VENV) -c constraints.txt $(WANTED) || $(PIP) $(WANTED)
	touch $@

demo: install  ## the whole pipeline on this machine: synthetic X-rays, search, scores, one HTML page (a minute or two)
	python cluster/demo.py

lint: install  ## style and types
	ruff check .
	ruff format --check .
	basedpyright

check tests test-all faults coverage: export OMP_NUM_THREADS ?= 1

check: lint  ## lint, types, the fast tests
	$(PYTEST) -m "not ray and not slow and not gpu"

test: install  ## lint, types, all tests except slow ones and those that need a GPU
	$(MAKE) --no-print-directory -j 2 lint tests

tests: install
	$(PYTEST) -m "not slow and not gpu"

test-all: lint  ## the slow tests too
	$(PYTEST) -m "not gpu"

faults: install  ## tests that kill, stop and disturb jobs; their measurements make docs/reference/faults.md
	pytest tests/ray/test_faults_*.py tests/ray/test_killed_search.py
	python -m tests.ray.fault_table

coverage: install  ## the lines of cxr that the fast tests never run
	$(PYTEST) -m "not ray and not slow and not gpu" --cov=cxr --cov-report=term-missing:skip-covered

# Not from .venv, since a machine with a GPU may have packages of its own; these tests need no Ray.
test-gpu:  ## the tests that need a GPU, with the packages of PYTHON (takes minutes)
	$(PYTHON) -m pytest -m gpu tests/gpu

.venv-tools:  # the programs that list and audit packages
	$(PYTHON) -m venv $@
	$@/bin/pip install -q --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1

sbom: install .venv-tools  ## write sbom.json: the packages in .venv, with versions and licenses (CycloneDX)
	.venv-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.json $(VENV)

audit: .venv-tools  ## compare the versions in constraints.txt with known vulnerabilities (needs internet)
	@.venv-tools/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
		>audit.log 2>&1; code=$$?; cat audit.log; \
	if grep -qE 'ConnectionError|ServiceError|HTTPError|could not be audited' audit.log; then \
		echo "error: the list of vulnerabilities could not be read for all packages: run make audit with internet access" >&2; exit 2; \
	fi; exit $$code

.venv-swift:  # the S3 server of tests/servers
	$(PYTHON) -m venv $@
	$@/bin/pip install -q --disable-pip-version-check swift==2.38.3

clean:  ## remove .venv, runs and caches
	rm -rf $(VENV) .venv-swift .venv-tools sbom.json audit.log runs build *.egg-info .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
