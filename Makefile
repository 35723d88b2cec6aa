# Two commands matter: `make serve` and `make test`. Each does all of the set-up that is missing, and nothing twice.

PYTHON ?= python3
ARGS ?=
PYTHONS ?= python3.11 python3.12 python3.13
# Empty, the tests take two thirds of the time.
COVERAGE ?= --cov --cov-report=term

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
EXTRAS := server,test,lint
# In contiguous halves, so that what a module's tests share is mostly made once; who is done takes from the other.
SIDE_BY_SIDE := -n 2 --dist worksteal

VERSION_OF = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

ifneq ($(wildcard $(VENV)),)
ifneq ($(MAKECMDGOALS),clean)
made_with := $(call VERSION_OF,$(BIN)/python)
ifeq ($(made_with),)
# Its interpreter is gone (an upgrade, another machine): it is as good as none.
$(shell rm -rf $(VENV))
else ifneq ($(origin PYTHON),file)
ifneq ($(made_with),$(call VERSION_OF,$(PYTHON)))
$(error $(VENV) was made with Python $(made_with), and PYTHON=$(PYTHON) is another: run `make clean` first)
endif
endif
endif
endif

.DEFAULT_GOAL := help
.PHONY: help serve test test-long test-all lint bench bench-here setup clean

help:
	@echo 'make serve   set up what is missing, then serve on port 2000 (options: make serve ARGS="--port 0 -v")'
	@echo 'make test    set up what is missing, then run the tests      (options: make test ARGS="-k framing")'
	@echo 'make test-long  the tests that take long, which `make test` leaves out'
	@echo 'make test-all  both with every Python of PYTHONS="$(PYTHONS)" that is here'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   measure, beside others (options: make bench ARGS="--quick"; see bench/README.md)'
	@echo 'make setup   only the set-up'
	@echo 'make clean   remove all that make made'
	@echo 'PYTHON=/path/to/python3.x chooses the interpreter that .venv is made with (3.11 or newer).'

# `exec`: the server is make's own child, so Ctrl-C and SIGTERM reach it and its exit status is the recipe's.
serve: $(STAMPS)/os-serve $(STAMPS)/built
	@exec $(BIN)/triosspi serve $(ARGS)

test: $(STAMPS)/os-test $(STAMPS)/built $(STAMPS)/peers
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not long' $(COVERAGE) $(ARGS)

test-long: $(STAMPS)/os-test $(STAMPS)/built $(STAMPS)/peers
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m long $(ARGS)

# Each interpreter gets an environment of its own. With pyenv, PYENV_VERSION=3.11.7:3.12.1 brings them on the PATH.
test-all:
	@ran=; for python in $(PYTHONS); do \
	    version=`$$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null` || { \
	        echo "no $$python here: not tested" >&2; continue; }; \
	    echo "== Python $$version"; \
	    $(MAKE) --no-print-directory $(if $(ARGS),test,test test-long) PYTHON="$$python" VENV=".venvs/$$version" \
	        ARGS="$(ARGS)" || exit 1; \
	    ran="$$ran $$version"; \
	done; \
	[ -n "$$ran" ] || { echo "none of $(PYTHONS) is here" >&2; exit 1; }; \
	echo "tested with Python$$ran"

lint: $(STAMPS)/os-serve $(STAMPS)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In an environment of its own: the tests' gssapi is unoptimised, and would make the others slow.
bench:
	@$(MAKE) --no-print-directory bench-here VENV=.venvs/bench EXTRAS=server,test,bench ARGS="$(ARGS)"

bench-here: $(STAMPS)/os-test $(STAMPS)/built $(STAMPS)/bench-others
	$(BIN)/python bench/run.py $(ARGS)

setup: $(STAMPS)/os-serve $(STAMPS)/built

clean:
	rm -rf $(VENV) .venvs build dist src/*.egg-info src/*.c src/triosspi/*.so .coverage .coverage.* htmlcov
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the set-up, in the order in which it happens; a stamp is newer than all that it was made from ----

# Before anything else: Python is there and new enough.
define CHECK_PYTHON
@command -v $(PYTHON) >/dev/null 2>&1 || PYTHON=$(PYTHON) sh scripts/os-packages.sh serve
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "triosspi needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) -V 2>&1`. Choose another: make PYTHON=/path/to/python3.x" >&2; \
	exit 1; }
endef

$(STAMPS)/os-serve $(STAMPS)/os-test: $(STAMPS)/os-%: scripts/os-packages.sh
	$(CHECK_PYTHON)
	@PYTHON=$(PYTHON) sh scripts/os-packages.sh $*
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/venv: | $(STAMPS)/os-serve
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(STAMPS)/installed: pyproject.toml setup.py | $(STAMPS)/venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[$(EXTRAS)]'
	@touch $@

# The installation has built the extensions; after a change of their sources alone this rebuilds them, without the network.
$(STAMPS)/built: $(wildcard src/*.pyx src/shared/*.pxi src/sealing/*.pxi) $(STAMPS)/installed
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# Implementations by others, which the tests meet. gssapi is built from source: unoptimised, since nobody measures it
# here, in 16 s instead of 41, and not from or into pip's cache, since whoever installs it for use wants the other one.
# Outside of CI a peer that cannot be had is a skipped test, and is asked for again by the next `make test`.
$(STAMPS)/peers: tests/peers/requirements.txt tests/peers/requirements-no-deps.txt $(STAMPS)/os-test | $(STAMPS)/venv
	@if CFLAGS='-O0 -g0' $(BIN)/python -m pip install --disable-pip-version-check -q --no-cache-dir -r $< && \
	    $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r tests/peers/requirements-no-deps.txt; \
	then touch $@; \
	else case "$$CI" in '' | 0 | false | no) echo 'some tests will be skipped, for want of that' >&2;; *) exit 1;; esac; fi

# Without them the rows of Kerberos and of .NET are missing.
$(STAMPS)/bench-others: $(STAMPS)/installed tests/peers/requirements-no-deps.txt
	@$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[kerberos]' || \
	    echo 'Kerberos will not be measured, for want of that' >&2
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r tests/peers/requirements-no-deps.txt || \
	    echo '.NET will not be measured, for want of that' >&2
	@touch $@
