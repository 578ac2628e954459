# make demo | test | test-long | test-fast | matrix | lint | figures | audit | bench | docs | dist. Each sets up .venv first; PYTHON picks the
# interpreter.
PYTHON ?= python3
PY := .venv/bin/python
# The data sets of a checkout's neighbour, unless the user names a folder.
export TFDS_DATA_DIR ?= $(firstword $(wildcard ../shared/tfds) $(HOME)/tensorflow_datasets)

.PHONY: demo test test-long test-fast matrix lint figures audit bench docs dist format clean
# No bytecode ahead of time: most modules of these packages are never imported.
.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --no-compile --requirement requirements.txt
	$(PY) -m pip install --quiet --no-deps --editable .
	@touch $@

demo: .venv/.installed
	$(PY) -m experiments.demo --out=demo

test: .venv/.installed
	$(PY) -m pytest -n 2 --dist=worksteal --durations=15 -m "not long"

# What waits for minutes: Ray notices late that a driver was killed or a node is lost.
test-long: .venv/.installed
	$(PY) -m pytest -n 0 -m long tests

# For work on the core: delay, staleness, stability, models. No process, no real data.
test-fast: .venv/.installed
	$(PY) -m pytest -n 2 --dist=worksteal -m "not process and not realdata and not slow" \
		tests/transforms tests/delays tests/stability tests/models

# The core under every supported Python that is installed; VERSIONS="3.12 3.13" for some of them.
matrix:
	.ci/matrix $(VERSIONS)

# The site, in site/; runs the tutorials. `make docs ASGD_JAX_DOCS_RUN=0` only shows them.
docs: .venv/.installed
	PYTHONPATH=src:. NO_MKDOCS_2_WARNING=1 ASGD_JAX_DOCS_RUN=$(or $(ASGD_JAX_DOCS_RUN),1) $(PY) -m mkdocs build --strict

# The wheel and the sdist, in dist/.
dist: .venv/.installed
	rm -rf build dist
	$(PY) -m build

lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

figures: .venv/.installed
	$(PY) scripts/reproduce.py --figure=all --preset=cpu --out=results

# Every number of results/ again, from its records; fails where one differs.
audit: .venv/.installed
	$(PY) scripts/audit.py --out=results

# BENCH="--torch-python=PATH --only=ITEM,..." for a part, or PyTorch from another environment.
bench: .venv/.installed
	$(PY) scripts/bench.py --out=results/bench $(BENCH)

format: .venv/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .matrix build dist site demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
