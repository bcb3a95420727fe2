# Everything lives in .venv; a bare machine needs python3 (3.10 or newer) with venv, and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo chromium test trust bench fast check clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,sample]'
	touch $@

# A real sample pool, the demo recipe on it, the funnel and the report.
demo: $(STAMP)
	test -d demo/pool || $(BIN)/pairsieve sample demo/pool
	$(BIN)/pairsieve run conf/recipes/demo.yaml --run demo/run --machine conf/machines/laptop.yaml

# Draws reports in tests.
chromium:
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium)

# All that CI runs.
test: $(STAMP) check chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not campaign'

# Every goal of jobs/trust.py with its figure: hundreds of kills and storage faults, a cluster that loses a node.
trust: $(STAMP) chromium
	$(BIN)/python -m jobs.trust

# Against peers and the machine's limits: bench.json and bench.svg. Leave the machine alone meanwhile.
bench: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m jobs.bench

# The fast set alone.
fast: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo .venv
