# Each target does its own set-up: a fresh clone and a Python of 3.11 or later are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
DEMO   := runs/demo

.PHONY: demo test test-cluster test-kill test-gpu test-slow bench lint clean

# An environment that make has begun and not finished is begun anew: it may have another Python. One that is whole keeps
# its own, whichever `python3` is now: a mixture of two does not run. `venv --clear` would delete `begun` too early.
$(READY): pyproject.toml cmrhpc/nets/convolution.c
	@test -x $(BIN)/python -a ! -e $(VENV)/begun || $(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -e $(VENV) || { mkdir $(VENV); touch $(VENV)/begun; }
	@test ! -e $(VENV)/begun || find $(VENV) -mindepth 1 ! -path $(VENV)/begun -delete
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --editable '.[dev]'
	rm -f $(VENV)/begun
	touch $(READY)

# The main job on a simulated cohort. Run it again: what is done is not done again.
demo: $(READY)
	test -d $(DEMO)/raw || $(BIN)/cmrhpc phantom $(DEMO)/raw --patients 80 --seed 1
	test -f $(DEMO)/study.toml || $(BIN)/cmrhpc init $(DEMO) --study demo --raw $(DEMO)/raw
	$(BIN)/cmrhpc run $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow and (not cluster or smoke)"

test-cluster: $(READY)
	$(BIN)/python -m pytest -m "cluster and not slow"

# Hours: 200 kills, 20 races, file faults at every call of all stages, 30 stops. docs/reliability.md says how to shorten it.
test-kill: $(READY)
	$(BIN)/python -m pytest -m slow $(addprefix tests/reliability/test_,kill.py race.py file_faults.py stop.py)

# What holds on the CPU holds on a GPU too.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m device --device cuda

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# About ten minutes on two idle cores. Nothing else should run.
bench: $(READY)
	$(BIN)/cmrhpc bench

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info cmrhpc/nets/*.so .pytest_cache .mypy_cache .ruff_cache
