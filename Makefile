# make demo: from nothing to private synthetic digits and a report.  make test: from nothing to all tests.
VENV ?= .venv
JOBS ?= 2
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test compile prove bench lint clean

demo: $(INSTALLED)
	$(VENV)/bin/fastloda demo --run runs/demo

test: $(INSTALLED) compile
	$(PYTHON) -m pytest bench -q --bench-scale smoke --benchmark-disable
	$(PYTHON) -m pytest tests -q -n $(JOBS) --dist loadfile  # each on one thread: see tests/conftest.py

# Every Triton kernel, ahead of time and without a GPU, for three generations of cards.
compile: $(INSTALLED)
	$(PYTHON) scripts/compile_check.py

# The slow full counts of the privacy tests; their figures go to docs/results/prove.json.
prove: $(INSTALLED)
	$(PYTHON) -m pytest tests -q --prove

bench: $(INSTALLED)
	$(PYTHON) -m pytest bench -q

lint: $(INSTALLED)
	$(PYTHON) -m pip install -q ruff && $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

$(INSTALLED): setup.py constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[test,bench]'
	$(PYTHON) -m pip install -q -c constraints.txt --no-deps timm  # torchvision comes for CUDA alone, and breaks beside a CPU's PyTorch
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
