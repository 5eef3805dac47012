# make demo             makes .venv, installs lilliput, shrinks a trained network and says where the report is
# make test             the same .venv with what the tests need, then the whole test suite
# make dist             wheel and source distribution into dist/, checked
# Settings: VENV=.venv  PYTHON=python3.12  ARGS="for the demo or for pytest"  JOBS=2 (processes that run the tests)
#           TORCH=torch==2.12.0 installs that one; TORCH= keeps the torch that .venv or PYTHON already has.

VENV ?= .venv
ARGS ?=
JOBS ?= 2
PINNED := $(shell grep '^torch==' constraints.txt)
# A torch chosen once stays the choice for this VENV.
CHOSEN := $(VENV)/torch.chosen
TORCH ?= $(if $(wildcard $(CHOSEN)),$(shell cat $(CHOSEN) 2>/dev/null),$(PINNED))
SCRIPTS := $(VENV)/bin
INSTALL = $(SCRIPTS)/python -m pip install --constraint $(VENV)/constraints.txt --editable

export OMP_NUM_THREADS = 1

.PHONY: demo test lint doctest examples evidence check-engine dist docs readme constraints clean

demo: $(VENV)/demo.installed
	$(SCRIPTS)/lilliput demo $(ARGS)

test: $(VENV)/dev.installed
	@$(SCRIPTS)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

ifneq ($(strip $(TORCH)),$(shell cat $(VENV)/torch.installed 2>/dev/null))
.PHONY: $(VENV)/torch.installed
endif

# torch is installed by its own rule, so that a constraint on it never undoes the user's choice.
$(VENV)/torch.installed: constraints.txt scripts/venv.sh
	@sh scripts/venv.sh "$(VENV)" "$(TORCH)" "$(PYTHON)"
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@rm -f $(CHOSEN)
	@if [ "$(TORCH)" != "$(PINNED)" ]; then echo "$(TORCH)" > $(CHOSEN); fi
	@echo "$(strip $(TORCH))" > $@

$(VENV)/%.installed: $(VENV)/torch.installed pyproject.toml
	$(INSTALL) ".[$*]"
	@touch $@

lint: $(VENV)/dev.installed
	$(SCRIPTS)/ruff format --check --quiet .
	$(SCRIPTS)/ruff check .
	$(SCRIPTS)/mypy
	$(SCRIPTS)/deptry src
	$(SCRIPTS)/deptry --ignore DEP002,DEP004 bench evidence examples scripts tests

doctest: $(VENV)/dev.installed
	$(SCRIPTS)/python -m pytest --numprocesses $(JOBS) --doctest-modules src/lilliput

examples: $(VENV)/dev.installed
	@set -e; for file in examples/*.py; do echo "$$file"; $(SCRIPTS)/python "$$file"; done

evidence: $(VENV)/dev.installed
	$(SCRIPTS)/lilliput evidence --quick --out build/evidence $(ARGS)

# Some minutes: other processors, sanitizers, threads, damaged files, DeepSparse. ARGS="fuzz --seconds 600" for one of them.
check-engine: $(VENV)/check.installed
	$(SCRIPTS)/python scripts/check_engine.py $(ARGS)

# What a release uploads, built by the pinned tools; without network once they are installed.
dist: $(VENV)/dev.installed
	rm -rf dist
	$(SCRIPTS)/python -m build --no-isolation
	$(SCRIPTS)/twine check --strict dist/*

docs: $(VENV)/docs.installed
	$(SCRIPTS)/mkdocs build --strict $(ARGS)

# The generated parts of README.md and RESULTS.md, from results/. ARGS=lilliput-demo/summary.json keeps that demo first.
readme: $(VENV)/docs.installed
	$(SCRIPTS)/python scripts/readme.py $(ARGS)
	$(SCRIPTS)/python scripts/results.py
	$(SCRIPTS)/python scripts/figures.py

# The oldest supported Python decides, since a version that it can install all the others can too.
constraints:
	sh scripts/constraints.sh "$(PYTHON)" > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache
