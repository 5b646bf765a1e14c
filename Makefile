# make demo and make test each work alone: they create .venv, install, and run.

PYTHON ?= python3
# whole files to each process, in the order of tests/conftest.py: those with slow tests first
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_CAMERAS := pan_right arc_left pan_right

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help:
	@echo "make demo       re-render a clip from three cameras with the embedded model"
	@echo "make demo-edit  edit a long clip by instruction with the embedded model"
	@echo "make test       run all tests"
	@echo "make bench      measure tiny-nvs on this CPU, some minutes; results, plot and tables follow"
	@echo "make gate       this checkout's hot paths against the baseline's, in one run"
	@echo "make check      lint, format, types, layering"
	@echo "make format     format the code"
	@echo "make venv       create $(VENV) with everything the above need"
	@echo "make clean      remove what the above made"

# A half-made environment would look finished to the next run, so a failure removes it.
$(RUN):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit( \
	  "Python 3.10 or newer is needed, $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % v[:2] \
	  if v < (3, 10) else 0)'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "cannot create $(VENV): install your system's python3-venv package" >&2; exit 1; }
	$(RUN) -m pip install --quiet --upgrade pip  # an old one takes three times as long to resolve

NATIVE := $(wildcard csrc/*.h csrc/*/*)

$(VENV)/.installed: pyproject.toml setup.py $(NATIVE) | $(RUN)
	$(RUN) -m pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py $(NATIVE) | $(RUN)
	$(RUN) -m pip install --no-compile -e '.[dev]'
	@$(RUN) -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; some files are templates
	@touch $(VENV)/.installed $@

.PHONY: venv
venv: $(VENV)/.installed-dev

demo/clip.mp4: | $(VENV)/.installed
	$(RUN) -m mv2v_engine.synthetic.demo_clip --out $@

.PHONY: demo
demo: $(VENV)/.installed demo/clip.mp4
	$(RUN) -m mv2v_engine.run novel-view demo/clip.mp4 \
	  $(addprefix --camera ,$(DEMO_CAMERAS)) --out demo/out --overwrite

demo/long.mp4: | $(VENV)/.installed
	$(RUN) -m mv2v_engine.synthetic.demo_clip --edit --out $@

.PHONY: demo-edit
demo-edit: $(VENV)/.installed demo/long.mp4
	$(RUN) -m mv2v_engine.run edit demo/long.mp4 --prompt "make the sphere red" \
	  --out demo/edited.mp4 --overwrite

# processes rather than threads, and those threads that a test asks for sleep while they wait: they
# would spin beside the other processes; many tests start Python, which is quicker where it finds
# the package compiled
.PHONY: test
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= \
	  $(RUN) -m pytest $(PYTEST_ARGS)

RESULTS := profiling/results
BENCH := $(RUN) profiling

.PHONY: bench
bench: $(VENV)/.installed-dev
	$(BENCH)/bench_memory.py --out $(RESULTS)/memory.jsonl
	$(BENCH)/compare_peers.py --out $(RESULTS)/peers.jsonl
	$(BENCH)/roofline.py --out $(RESULTS)/roofline.jsonl
	$(BENCH)/bench_engine.py --out $(RESULTS)/engine.jsonl
	$(BENCH)/bench_stages.py --engine $(RESULTS)/engine.jsonl --out $(RESULTS)/stages.jsonl
	$(RUN) -m pytest -q profiling/test_hot_paths.py --benchmark-json $(RESULTS)/hot_paths.json
	$(BENCH)/bench_finite.py --out $(RESULTS)/finite.jsonl
	$(BENCH)/bench_prope.py --out $(RESULTS)/prope.jsonl
	$(BENCH)/peak_memory.py --out $(RESULTS)/peak_memory.jsonl
	$(BENCH)/memory_plot.py
	$(BENCH)/readme_numbers.py --write

.PHONY: gate
gate: $(VENV)/.installed-dev
	$(BENCH)/gate.py

.PHONY: check
check: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_layering.py

.PHONY: format
format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: clean
clean:
	rm -rf $(VENV) build dist *.egg-info demo/clip.mp4 demo/out
	rm -rf demo/long.mp4 demo/edited.mp4 demo/edited.edit
	rm -f mv2v_engine/ops/libmv2v_*
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find mv2v_engine tests -name __pycache__ -type d -prune -exec rm -rf {} +
