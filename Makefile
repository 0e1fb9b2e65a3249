# Everything sets itself up in .venv; a second call finds it ready.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-all lint format bench-toy clean

setup: $(READY)

# torch comes first and from constraints.txt, so that nothing else asks for another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/syncbn demo

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m '' --hypothesis-profile=thorough

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench-toy: $(READY)
	$(BIN)/python benchmarks/layer.py --shape 2,8,6,6 --rounds 5
	$(BIN)/python benchmarks/collectives.py --ranks 2 --rounds 5

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
