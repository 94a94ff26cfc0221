# make reproduce | test | lint | style | notebooks | bench | clean; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= mini
DATASETS ?=
IMAGES ?=
OUT ?=
SEEDS ?=
FORCE ?=
NOTEBOOKS ?=

python := $(VENV)/bin/python
installed := $(VENV)/.installed
option = $(if $($(1)),--$(2) '$($(1))')
options = --profile '$(PROFILE)' $(call option,DATASETS,datasets) $(call option,IMAGES,images) \
	$(call option,OUT,out) $(call option,SEEDS,seeds) $(call option,FORCE,force) $(call option,NOTEBOOKS,notebooks)

.PHONY: help reproduce test lint style notebooks bench doctor clean
.DEFAULT_GOAL := help

help:
	@echo 'make reproduce   every notebook, table and figure into build/$(PROFILE)'
	@echo '                 PROFILE=smoke|mini|paper DATASETS=a,b IMAGES=folder OUT=folder SEEDS=0,1,2 FORCE=stage'
	@echo 'make test        unit tests, notebook tests, a small end-to-end run'
	@echo 'make lint        ruff: code and notebooks; make style corrects what it can'
	@echo 'make notebooks   run the mini profile and put the executed notebooks back into notebooks/'
	@echo 'make bench       what is fast and by how much, into build/bench; nothing else should run'
	@echo 'make doctor      check this environment; make clean removes results and caches'

# The stamp is written last: an interrupted installation is begun anew, a changed pyproject.toml updates it.
$(installed): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'emonb needs Python 3.11 or later: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; exit 1; }
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@echo 'installing into $(VENV): some minutes and about 7 GB the first time'
	$(python) -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	@touch $@

reproduce: $(installed)
	@$(python) -m emonb run $(options)

test: $(installed)
	$(python) -m pytest

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .

style: $(installed)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

notebooks: $(installed)
	$(python) -m emonb run --profile mini
	$(python) -m emonb notebooks --out build/mini

bench: $(installed)
	@for part in where schedules limit scoring trainer steps growth; do \
		echo "bench/$$part.py" && $(python) bench/$$part.py --out build/bench || exit 1; done
	@$(python) bench/page.py --out build/bench

doctor: $(installed)
	@$(python) -m emonb doctor

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find emonb tests -name __pycache__ -prune -exec rm -rf {} +
