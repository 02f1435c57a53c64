# Both targets do all the set-up themselves, into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Test processes that run side by side: one more than CI has cores, as many tests wait for a cluster or a connection.
JOBS ?= 3

.PHONY: tiny test check clean

tiny: .venv/.train  ## Fine-tune a tiny model on this machine, then align it with DPO.
	$(BIN)/nemotron steps run rl/nemo_rl/dpo -c tiny

test: .venv/.test check  ## Everything that CI checks.
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.train: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@

.venv/.test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[train,test]'
	touch $@ .venv/.train

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache
