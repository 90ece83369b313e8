# make demo    explain a sentence with the embedded classifier
# make test    run the tests
# make help    everything else

PYTHON ?= python3
VENV ?= .venv
export TEXT ?= A lovely film, full of wit, that never becomes dull.

BIN = $(VENV)/bin
FLOOR = .venv-floor
# Two processes, each of which leaves the other its core.
PARALLEL = OMP_NUM_THREADS=1
SETTINGS = setup.cfg pyproject.toml constraints.txt
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-floor lint docs wheel bench picture report clean

help:
	@echo "make demo        explain a sentence (TEXT=\"...\") with the embedded classifier"
	@echo "make test        run the tests"
	@echo "make test-floor  run the tests with the oldest supported dependencies"
	@echo "make lint        ruff and mypy"
	@echo "make docs        build the documentation, build/docs/index.html"
	@echo "make wheel       build the wheel and run it in a clean environment"
	@echo "make bench       measure the cost tables and the figure of long inputs (half an hour)"
	@echo "make picture     draw the picture of the README"
	@echo "make report      run the benchmark reports in docs/benchmark (an hour or more)"
	@echo "make clean       remove what the others made"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "captum_globenc needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python $(SETTINGS)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[test]"
	@touch $@

$(VENV)/installed-tools: $(VENV)/installed
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[bench,lint]"
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable ".[docs]"
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/captum-globenc explain -- "$$TEXT"

test: $(VENV)/installed-test
	$(PARALLEL) $(BIN)/python -m pytest -n 2

test-floor: constraints-floor.txt setup.cfg
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python $(PIP_INSTALL) --constraint constraints-floor.txt --editable ".[test]"
	$(PARALLEL) $(FLOOR)/bin/python -m pytest -n 2

lint: $(VENV)/installed-tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet \
		--doctree-dir build/doctrees docs build/docs
	@echo "Built build/docs/index.html"

wheel: $(VENV)/installed-test
	$(BIN)/python -m pytest -m wheel tests/test_wheel.py

bench: $(VENV)/installed-tools
	$(BIN)/python benchmarks/cost.py --output benchmarks/cost.json
	$(BIN)/python benchmarks/long_inputs.py --output benchmarks/long-inputs.json \
		--figure docs/images/long-inputs.svg

picture: $(VENV)/installed
	$(BIN)/python docs/make_picture.py

report: $(VENV)/installed-test
	test -d build/demo/six-layer-film-reviews || \
		$(BIN)/python tutorials/train_demo_classifier.py
	$(BIN)/python docs/make_report.py

clean:
	rm -rf $(VENV) $(FLOOR) build dist *.egg-info docs/tutorials/*.ipynb
