# make demo: environment, bundle and images. make test: every test; make test-unit: those that
# need no bundle, in a minute; make test-triton: those with NVIDIA's Triton Inference Server, which
# it downloads. make lint: style, types and docs; make docs: the pages as a site.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := engines/demo/manifest.json

.PHONY: demo test test-unit test-triton lint docs benchmark clean
.DELETE_ON_ERROR:

demo: $(DEMO)
	rm -rf images/demo
	$(BIN)/lpd-export run engines/demo --class all --temperature 0.8 --out images/demo
	@echo
	@echo "Look at images/demo/contact_sheet.png. Then try"
	@echo "  $(BIN)/lpd-export run engines/demo --class heart --trace --out images/steps    # how an image fills in"
	@echo "  $(BIN)/lpd-export inspect engines/demo --classes                               # what it can draw"
	@echo "  $(BIN)/lpd-export verify engines/demo                                          # is it still the model?"
	@echo "  $(BIN)/lpd-export build --help                                                 # a bundle of a published model"

$(DEMO): $(READY) engines/demo.toml $(wildcard models/lpd-emoji/*.safetensors) $(shell find lpd_export reference -name '*.py')
	$(BIN)/lpd-export build engines/demo.toml --force

# In as many processes as there are cores; the slowest tests are named at the end.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 10

test: $(READY)
	$(PYTEST)

test-unit: $(READY)
	$(PYTEST) -m unit

# The server is in a wheel whose own Python part wants other versions than ours: it and the clients
# are kept apart, without what they depend on.
TRITON := build/triton
TRITON_SERVER := nvidia-pytriton==0.7.0
TRITON_CLIENTS := tritonclient==2.73.0 grpcio==1.85.3 geventhttpclient==2.6.1 gevent==26.9.0 \
  zope.event==6.2 zope.interface==8.7 brotli==1.2.1 python-rapidjson==1.25

test-triton: $(TRITON)/.ready
	$(BIN)/python -m pytest -m triton

$(TRITON)/.ready: Makefile $(READY)
	rm -rf $(TRITON)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON)/server $(TRITON_SERVER)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON)/client $(TRITON_CLIENTS)
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*Dockerfile
	$(MKDOCS) --quiet

# A link or a reference that leads nowhere is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs: $(READY)
	$(MKDOCS)
	@echo "Look at build/docs/index.html"

benchmark: $(READY)
	$(BIN)/python scripts/benchmark.py

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) images engines/*/ build *.egg-info
