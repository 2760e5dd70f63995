# `make demo` and `make test` are all that a fresh clone needs; both install into .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# More arguments for pip: --extra-index-url https://download.pytorch.org/whl/cpu spares a machine
# without a GPU the CUDA libraries.
PIP_ARGS ?=
# The stamp says that what pyproject.toml and constraints.txt ask for is installed.
STAMP := $(VENV)/.installed
TESTED := unit conformance e2e faults

.PHONY: install demo test test-fast numerics check audit fuzz format conformance soak bench tiny clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo         generate the example images into out/demo"
	@echo "make test         all tests; make test-fast: without those that start Ray"
	@echo "make numerics     the tests that depend on CPU kernels, with simpler kernels"
	@echo "make check        ruff, mypy and the dependency direction; make format: apply ruff's"
	@echo "make audit        known vulnerabilities of the pinned packages; needs pypi.org"
	@echo "make fuzz         fuzz image loader and manifest reader with atheris, FUZZ_SECONDS each (120)"
	@echo "make conformance  against the published model's numbers (GOLDENS=DIR: another folder of them)"
	@echo "make soak         kill runs at random moments, SOAK_ROUNDS times on disk and on S3 (30)"
	@echo "make bench        benchmarks, minutes each"
	@echo "make tiny         train the embedded checkpoint again, which takes hours"
	@echo "make clean        remove .venv, caches and out/demo"

install: $(STAMP)

# setuptools comes first, pinned like the rest, because an isolated build would fetch its newest.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed.")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt setuptools
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[test,train,dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/wallaroo generate jobs/examples/prompts.jsonl out/demo

# Each folder in a process of its own: a Ray of one never meets that of another. Where none is started, two
# processes of a thread each take the files. The second argument is more options for pytest.
define run_tests
	@took=; failed=0; \
	for folder in $(1); do \
	    ls tests/$$folder/test_*.py >/dev/null 2>&1 || continue; \
	    start=$$(date +%s); \
	    case $$folder in \
	        unit|conformance) share="env OMP_NUM_THREADS=1" split="-n 2 --dist loadfile";; \
	        *) share= split=;; \
	    esac; \
	    $$share $(BIN)/python -m pytest -q --durations=5 $$split $(2) tests/$$folder || failed=1; \
	    took="$$took\n  tests/$$folder $$(( $$(date +%s) - start )) s"; \
	done; \
	printf "Took:$$took\n"; exit $$failed
endef

test: $(STAMP)
	$(call run_tests,$(TESTED))

test-fast: $(STAMP)
	$(call run_tests,unit conformance)

# What float32 sums come to depends on the kernels that torch, oneDNN and MKL choose by the CPU. Here they
# choose older ones: torch without vectors, the others with those of AVX2.
numerics: export ATEN_CPU_CAPABILITY ?= default
numerics: export ONEDNN_MAX_CPU_ISA ?= AVX2
numerics: export MKL_ENABLE_INSTRUCTIONS ?= AVX2
numerics: $(STAMP)
	$(call run_tests,unit conformance,-m numerics)

conformance: $(STAMP)
	@GOLDENS="$(GOLDENS)" $(BIN)/python -m pytest -q tests/conformance

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# In an environment of its own, since pip-audit needs other packages than the project.
audit:
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# What it finds is kept in out/fuzz, and ends it.
FUZZ_SECONDS ?= 120
fuzz: $(STAMP)
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt atheris
	mkdir -p out/fuzz
	for target in pictures manifests; do \
	    $(BIN)/python -m tests.fuzz $$target -max_total_time=$(FUZZ_SECONDS) \
	        -artifact_prefix=out/fuzz/ || exit 1; \
	done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

SOAK_ROUNDS ?= 30
soak: $(STAMP)
	KILL_ROUNDS=$(SOAK_ROUNDS) $(BIN)/python -m pytest -q tests/faults/test_kills.py -k random

bench: $(STAMP)
	$(BIN)/python -m wallaroo.model.bench --model mid
	@for script in tests/benchmarks/*.py; do \
	    echo "== $$script"; $(BIN)/python -m tests.benchmarks.$$(basename $$script .py) || exit 1; \
	done

tiny: $(STAMP)
	$(BIN)/python -m wallaroo.jobs.make_tiny

clean:
	rm -rf $(VENV) .venv-audit out/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
