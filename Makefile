# `make` lists the targets. Works with GNU Make 3.81 (macOS) and later.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.SUFFIXES:

# Interpreter for a new .venv, 3.11 to 3.13: `make setup PYTHON=/path/to/python3.12`.
PYTHON ?=
# Where else pip may look for torch, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu, which saves Linux machines
# without a GPU several GB of CUDA packages.
TORCH_INDEX ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -qq

SETUP := .venv/.installed
DEV := .venv/.installed-dev
# One's own Label Studio environment, named in GEOPRELABEL_LS_VENV, is left alone.
LABEL_STUDIO := $(if $(GEOPRELABEL_LS_VENV),,.venv-label-studio/installed-from.txt)

.PHONY: help
help:
	@sed -n 's/^## //p' $(firstword $(MAKEFILE_LIST))

## make setup                 install into .venv   (PYTHON=python3.12  TORCH_INDEX=https://download.pytorch.org/whl/cpu)
.PHONY: setup
setup: $(SETUP)

.venv/bin/python:
	@supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	if [ -n "$(PYTHON)" ]; then \
	    "$(PYTHON)" -c "$$supported" || { \
	        echo "PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1); GeoPrelabel needs Python 3.11, 3.12 or 3.13." >&2; exit 1; }; \
	    python="$(PYTHON)"; \
	else \
	    for python in python3.12 python3.11 python3.13 python3 none; do \
	        "$$python" -c "$$supported" 2>/dev/null && break; \
	    done; \
	    if [ "$$python" = none ]; then \
	        echo "No Python 3.11, 3.12 or 3.13 found (python3 is $$(python3 --version 2>&1)); name one: make setup PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	fi; \
	echo "Creating .venv with $$("$$python" --version)"; \
	"$$python" -m venv .venv

# torch comes first and by pip, which takes the build that suits the machine: a wheel from its find-links, the CPU build
# of TORCH_INDEX, or the registry's with the CUDA packages that this one asks for. The lock names none of those, so the
# second step leaves torch alone. `--no-deps`, because pip knows no overrides for label-studio-ml's pins. `compileall` uses
# all processors, where pip compiles on one; it ends with 1 for the few files that packages ship for other Pythons.
$(SETUP): requirements.txt pyproject.toml | .venv/bin/python
	@echo "Installing $$(grep '^torch==' requirements.txt) and $$(grep -c '^[a-z]' requirements.txt) packages into .venv"
	@$(PIP) install --no-compile $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") --constraint requirements.txt "$$(grep '^torch==' requirements.txt)"
	@$(PIP) install --no-compile --no-deps --requirement requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(PY) -m compileall -q -j 0 .venv/lib >/dev/null || true
	@touch $@

$(DEV): requirements-dev.txt $(SETUP)
	@echo "Installing what the tests need into .venv"
	@$(PIP) install --no-deps --requirement requirements-dev.txt
	@touch $@

## make label-studio          install Label Studio into .venv-label-studio
.PHONY: label-studio
label-studio: $(LABEL_STUDIO)

.venv-label-studio/installed-from.txt: requirements-label-studio.txt | .venv/bin/python
	@echo "Installing $$(grep '^label-studio==' requirements-label-studio.txt) into .venv-label-studio"
	@$(PY) -c 'from demo.label_studio import install; install()'
	@touch $@

## make demo                  Label Studio, the backend and a pre-labelled scene, until Ctrl-C   (SCENE=my.tif)
## make demo CHECK=1          the same to the end without a person: predict, click, accept, train, export, stop
.PHONY: demo
demo: $(SETUP) $(LABEL_STUDIO)
	@$(PY) -m demo.run $(if $(SCENE),--scene "$(SCENE)") $(if $(filter-out 0 no false,$(CHECK)),--check)

## make serve                 the ML backend alone, on port 9090
.PHONY: serve
serve: $(SETUP)
	@$(PY) -m backend serve

## make test                  the whole test suite   (PYTEST_ARGS="-k tile -x")
.PHONY: test
test: $(DEV) $(LABEL_STUDIO)
	@$(PY) -m pytest $(PYTEST_ARGS)

## make lint                  ruff and mypy
.PHONY: lint
lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict backend

## make format                put the code into shape
.PHONY: format
format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

## make fuzz                  attack the routes and readers for longer than the tests do   (FUZZ_S=60, seconds for each fuzzer)
FUZZ_S ?= 60
.PHONY: fuzz
fuzz: $(DEV)
	@GEOPRELABEL_FUZZ_S=$(FUZZ_S) $(PY) -m pytest tests/security/test_openapi.py tests/fuzz -q

## make bench                 the benchmarks, one after another   (BENCH=benchmarks/tiles.py)
BENCH ?= $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))
.PHONY: bench
bench: $(DEV)
	@set -e; for script in $(BENCH); do echo "== $$script"; $(PY) "$$script"; done

## make docs                  docs/ as a site in site/; fails on a broken link or a stale page
.PHONY: docs
docs: $(DEV)
	@$(PY) -B -m docs.reference.generate --check
	@NO_MKDOCS_2_WARNING=1 $(PY) -B -m mkdocs build --quiet --strict && echo "site/index.html is built"

## make reference             write the pages of docs/ that are made from the code
.PHONY: reference
reference: $(DEV)
	@$(PY) -B -m docs.reference.generate

## make screenshots           take the tutorial's pictures anew, from a real Label Studio in a real browser
.PHONY: screenshots
screenshots: $(DEV) $(LABEL_STUDIO)
	@$(PY) -B -m docs.screenshots

## make sbom                  the bill of materials of the lock, CycloneDX: sbom.cdx.json
.PHONY: sbom
sbom: $(DEV)
	@.venv/bin/cyclonedx-py requirements requirements.txt --pyproject pyproject.toml --output-reproducible \
	    --output-format JSON --output-file sbom.cdx.json

## make licences              docs/reference/licences.md; fails on a licence that is neither permissive nor explained
.PHONY: licences
licences: $(DEV)
	@$(PY) -B -m docs.reference.licences

## make audit                 known holes of the locked packages; says so where it could not ask
.PHONY: audit
audit: $(DEV)
	@$(PY) .ci/audit.py

## make weights DATA=folder   train the shipped weights anew   (WEIGHTS_ARGS="--minutes 120 --resume")
.PHONY: weights data-is-given
weights: data-is-given $(DEV)
	@$(PY) model_weights/train.py --data "$(DATA)" $(WEIGHTS_ARGS)
	@$(PY) model_weights/calibrate.py --data "$(DATA)"

data-is-given:
	@if [ -z "$(DATA)" ]; then \
	    echo "make weights needs DATA=folder: a folder of folders of labelled imagery (model_weights/train.py says what is read)" >&2; \
	    exit 2; \
	fi

## make lock                  choose versions anew for the three locks; kept where they still fit   (LOCK_ARGS=--upgrade)
CUDA := cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13 triton
COMPILE := UV_CUSTOM_COMPILE_COMMAND="make lock" $(PY) -m uv pip compile --quiet --universal --python-version 3.11 $(LOCK_ARGS)
.PHONY: lock
lock: $(DEV)
	printf '%s\n' $(CUDA) | $(COMPILE) --excludes /dev/stdin requirements.in --output-file requirements.txt >/dev/null
	$(COMPILE) requirements-dev.in --output-file requirements-dev.txt >/dev/null
	$(COMPILE) --no-config requirements-label-studio.in --output-file requirements-label-studio.txt >/dev/null

## make clean                 remove what tools left behind
.PHONY: clean
clean:
	rm -rf build dist site sbom.cdx.json *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

## make distclean             remove the environments too
.PHONY: distclean
distclean: clean
	rm -rf .venv .venv-label-studio
