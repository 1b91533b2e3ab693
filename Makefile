# Every target sets up .venv by itself. PYTHON names the interpreter that it is made with (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo depth-demo loop-ablation test test-all check bench clean

demo: $(READY)  ## train on 4 CPU ranks, kill the job, resume it, print a sample
	$(BIN)/python tools/demo.py

depth-demo: $(READY)  ## teach small models a task that needs depth, and see whether more loops help; a quarter of an hour
	$(BIN)/python tools/depth_demo.py

loop-ablation: $(READY)  ## each switch of the loops alone, at equal FLOPs; an hour or two
	$(BIN)/python tools/loop_ablation.py

# Drills and launches wait for each other most of the time: three workers keep two cores busy.
WORKERS ?= 3

test: $(READY)  ## all that a change needs; a quarter of an hour
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not long"

test-all: $(READY)  ## the long tests too; with MINUTES=20, the long ones only, as many as fit, others each day
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(if $(MINUTES),-m long --minutes $(MINUTES))

check: $(READY)  ## lint, types and the quick tests; a minute and a half
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright & types=$$!; \
	$(BIN)/python -m pytest --quiet --numprocesses 3 -m "not launch and not long"; tests=$$?; \
	wait $$types && exit $$tests

bench: $(READY)  ## against open-mythos, plain loops and the disk, and what loops and recomputation cost; wants an idle machine
	$(BIN)/python benchmarks/step_vs_open_mythos.py
	$(BIN)/python benchmarks/moe_layer.py
	$(BIN)/python benchmarks/loops.py
	$(BIN)/python benchmarks/recompute.py
	$(BIN)/python benchmarks/convert_shards.py --memory
	$(BIN)/python benchmarks/checkpoints.py

clean:  ## everything that the targets above made
	rm -rf .venv runs data/sample data/sample-source *.egg-info .pytest_cache .ruff_cache .hypothesis

# open-mythos is the tests' reference. Its own requirements pin an older torch, so it lies beside the environment and
# not in it, and `pip check` stays clean.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/reference open-mythos==0.5.0
	$(BIN)/python -m pip check
	touch $(READY)
