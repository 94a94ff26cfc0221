# make help | reproduce | test | lint | style | notebooks | site | stability | bench | doctor | lock | clean; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= mini
DATASETS ?=
IMAGES ?=
OUT ?=
SEEDS ?=
FORCE ?=
NOTEBOOKS ?=
REVIEW ?=
# The exact versions that results and tests depend on; LOCK= installs the newest that pyproject.toml allows.
LOCK ?= requirements.lock
# A served vision model (OPENAI_API_KEY, OPENAI_BASE_URL) that is one more row of the tables.
ASK ?=
ASK_IMAGES ?=
MAX_COST ?=
PRICE ?=
N ?= 3
# CPU=1 installs torch without its CUDA libraries: 2 GB instead of 7.
CPU ?=

python := $(VENV)/bin/python
pip := $(python) -m pip install --disable-pip-version-check --quiet \
	$(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)
installed := $(VENV)/.installed
option = $(if $($(1)),--$(2) '$($(1))')
options = --profile '$(PROFILE)' $(call option,DATASETS,datasets) $(call option,IMAGES,images) \
	$(call option,OUT,out) $(call option,SEEDS,seeds) $(call option,FORCE,force) $(call option,NOTEBOOKS,notebooks) \
	$(call option,REVIEW,review)
asking = $(call option,ASK,ask) $(call option,ASK_IMAGES,ask-images) $(call option,MAX_COST,max-cost) \
	$(call option,PRICE,price)

.PHONY: help reproduce test lint style notebooks site stability bench doctor lock clean
.DEFAULT_GOAL := help

help:
	@echo 'make reproduce   every notebook, table and figure into build/$(PROFILE)'
	@echo '                 PROFILE=smoke|mini|photos|paper|paper-2b|FILE.yaml DATASETS=a,b IMAGES=folder'
	@echo '                 OUT=folder SEEDS=0,1,2 FORCE=stage NOTEBOOKS=01,02; CPU=1 LOCK= when installing'
	@echo '                 ASK=model (a served one as a row more) ASK_IMAGES=500 MAX_COST=25 PRICE=in,out'
	@echo '                 REVIEW=emonb-review.json, saved by the explorer: accuracies after that review of labels'
	@echo 'make test        unit tests, notebook tests, a small end-to-end run'
	@echo 'make lint        ruff: code and notebooks; make style corrects what it can'
	@echo 'make notebooks   run the mini profile and put the executed notebooks back into notebooks/'
	@echo 'make site        README, notebooks and docs as pages with search, and the report of a run, into build/site'
	@echo 'make stability   N=3 more runs with other seeds and test pictures: how often does each verdict come out?'
	@echo 'make bench       what is fast and by how much, into build/bench; nothing else should run'
	@echo 'make lock        the newest versions into requirements.lock (needs uv: pip install uv)'
	@echo 'make doctor      check this environment; make clean removes results and caches'

# The stamp is written last: an interrupted installation is begun anew, a changed list of packages updates it.
$(installed): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'emonb needs Python 3.11 or later: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; exit 1; }
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	@echo 'installing into $(VENV): some minutes and about $(if $(CPU),2,7) GB the first time'
	$(if $(LOCK),grep -vE '^($(if $(CPU),nvidia|cuda|triton|)#)' $(LOCK) >$(VENV)/locked.txt && \
		$(pip) -r $(VENV)/locked.txt && $(pip) --no-deps -e .,$(pip) -e '.[dev]')
	@touch $@

reproduce: $(installed)
	@$(python) -m emonb run $(options) $(asking)

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

# Needs the newest Sphinx, which changes nothing that is locked; a link that leads nowhere is an error.
site: reproduce
	@$(pip) $(if $(LOCK),-c $(VENV)/locked.txt) -e '.[site]'
	@rm -rf build/site
	$(python) -m sphinx --quiet --fail-on-warning -c docs/site -d build/.doctrees . build/site
	@mkdir build/site/report && cd $(or $(OUT),build/$(PROFILE)) && \
		cp -r index.html run.json figures notebooks predictions site tables $(CURDIR)/build/site/report

# Other seeds and other drawn test pictures each time; build/$(PROFILE) must be there.
stability: $(installed)
	@mkdir -p build/stability
	@for k in $$(seq $(N)); do \
		printf 'from: $(PROFILE)\nseeds: [%d, %d, %d]\nworld: {redraw: %d}\n' \
			$$((3 * k)) $$((3 * k + 1)) $$((3 * k + 2)) $$k >build/stability/$$k.yaml && \
		$(python) -m emonb run --profile build/stability/$$k.yaml --out build/stability/$$k || exit 1; done
	@$(python) -m emonb compare build/$(PROFILE) build/stability/*/; test $$? -le 1

bench: $(installed)
	@for part in where schedules limit scoring steps growth; do \
		echo "tools/bench/$$part.py" && $(python) -m tools.bench.$$part --out build/bench || exit 1; done
	@$(python) -m tools.bench.page --out build/bench

# torch stands at 2.14.1 with torchvision 0.29.1: some machines' pip offers nothing newer.
lock:
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' | uv pip compile --universal --python-version 3.11 --upgrade \
		--no-annotate --custom-compile-command 'make lock' --extra dev pyproject.toml - -o requirements.lock

doctor: $(installed)
	@$(python) -m emonb doctor

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find emonb tests tools -name __pycache__ -prune -exec rm -rf {} +
