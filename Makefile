# llm_trainer: `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUDGET ?= 90m
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-avx2 test-slow quick types lint export notebooks docs readme torture soak bench clean
.DEFAULT_GOAL := help

help:            ## List the targets
	@grep -hE '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt --editable .
	touch $@

$(BIN)/.dev: $(BIN)/.core
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[dev]'
	touch $@

demo: $(BIN)/.core   ## Install, train the quickstart profile on the built-in corpus (minutes on 2 cores), generate
	llm-trainer train --config quickstart --within 10
	llm-trainer generate --prompt "This module provides" --max-new-tokens 110 --temperature 0.6 --num-samples 3 --seed 1
	@echo
	@echo "That text was written by the model you just trained. Next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  llm-trainer generate --interactive       # prompt it yourself"
	@echo "  llm-trainer watch                        # every run, live"
	@echo "  llm-trainer resume --more-epochs 2       # train it further"
	@echo "  llm-trainer train --background           # the default profile, on WikiText-2"

test test-avx2 test-slow quick: export OMP_NUM_THREADS = 1  # two processes on two cores: more threads would wait for each other
test test-avx2 test-slow quick: export PYTHONDONTWRITEBYTECODE =  # or each of a thousand processes would compile the library anew

test: $(BIN)/.dev    ## Lint, exported modules = notebooks, every notebook, every test
	ruff check .
	$(PYTHON) dev/check_export.py
	nbdev-test --n-workers 2
	pytest -n 2 --dist loadgroup

test-avx2: $(BIN)/.dev  ## Every test as on a CPU that has AVX2 and no more
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 pytest -n 2 --dist loadgroup

test-slow: $(BIN)/.dev  ## The tests that `make test` has no time for
	pytest -m slow -n 2 --dist loadgroup

quick: $(BIN)/.dev   ## In seconds: lint, exported modules, layers, a run from its text to a sample
	ruff check .
	$(PYTHON) dev/check_export.py
	pytest -x tests/test_layers.py tests/test_tiny.py

types: $(BIN)/.dev   ## The types that py.typed promises
	mypy

lint: $(BIN)/.dev    ## ruff, and whether modules equal their notebooks
	ruff check .
	$(PYTHON) dev/check_export.py

export: $(BIN)/.dev  ## Notebooks to modules, cleaned
	nbdev-export
	nbdev-clean

notebooks: $(BIN)/.dev  ## Run every notebook and keep its outputs
	nbdev-export
	nbdev-test --n-workers 1 --save
	nbdev-clean

docs: $(BIN)/.dev    ## The site, into _docs/
	$(PYTHON) dev/site.py

readme: $(BIN)/.dev  ## README.md from nbs/index.ipynb
	$(PYTHON) dev/readme.py

torture: $(BIN)/.dev ## The whole fault battery for BUDGET (90m), a process a core; adds to RELIABILITY.md
	$(PYTHON) -m tests.torture --budget $(BUDGET)

soak: $(BIN)/.dev    ## The battery for a day
	$(PYTHON) -m tests.torture --budget 24h

bench: $(BIN)/.dev   ## Every figure of the README, measured on this machine
	for b in cli save load generate resume; do $(PYTHON) bench/$$b.py; done
	$(PYTHON) bench/train.py --avx2

clean:           ## Remove what can be made again; runs, checkpoints and data stay
	rm -rf build dist *.egg-info _proc _docs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
