# Every target except clean creates .venv if needed. PYTHON is the interpreter that creates it (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo chat-demo depth-demo hop-demo long-demo retrofit-demo loop-baseline loop-ablation
.PHONY: loop-stability optimizer-study
.PHONY: test test-all check docs notebook bench constraints clean

demo: $(READY)  ## train on 4 CPU ranks, kill the job, resume it, print a sample
	$(BIN)/mythos demo

chat-demo: $(READY)  ## tune a small model on conversations, and ask it what none of them contains; 3 minutes
	$(BIN)/python tools/chat_demo.py

depth-demo: $(READY)  ## train small models on a task that needs depth, to see whether more loops help; 7 to 11 minutes
	$(BIN)/python tools/depth_demo.py

hop-demo: $(READY)  ## train small models on stories with questions of 4 hops, and ask them for 8 with more loops; 8 minutes
	$(BIN)/python tools/hop_demo.py

long-demo: $(READY)  ## train a small model on 256 tokens and stretch it to 1,024 by YaRN; 10 minutes
	$(BIN)/python tools/long_demo.py

retrofit-demo: $(READY)  ## a pretrained model that continues with loops or without, at equal FLOPs; 25 minutes
	$(BIN)/python tools/retrofit_demo.py

loop-baseline: $(READY)  ## a looped model against plain ones of equal depth, parameters or FLOPs; 25 minutes
	$(BIN)/mythos sample-data
	$(BIN)/python tools/loop_baseline.py

loop-stability: $(READY)  ## which loops train at which learning rate, by switch; hours
	$(BIN)/mythos sample-data
	$(BIN)/python tools/loop_stability.py

loop-ablation: $(READY)  ## ablate each loop setting alone, at equal FLOPs; 2 h 20 min
	$(BIN)/python tools/loop_ablation.py

optimizer-study: $(READY)  ## AdamW and Muon, schedules, averages of the weights, at equal FLOPs; 1 hour
	$(BIN)/mythos sample-data
	$(BIN)/python tools/optimizer_study.py

# Ranks and daemons of the tests wait most of the time: three workers keep two cores busy.
WORKERS ?= 3

# Else every test process would compile all of the package and of the tests, 5 CPU seconds.
unexport PYTHONDONTWRITEBYTECODE

test: $(READY)  ## all tests except the long ones; 30 minutes
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not long"

test-all: $(READY)  ## all tests; with MINUTES=20: long tests only, as many as fit, in an order that depends on the date
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(if $(MINUTES),-m long --minutes $(MINUTES))

check: $(READY)  ## lint, types and the quick tests; 2 minutes
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright & types=$$!; \
	$(BIN)/python -m pytest --quiet --numprocesses 2 --hypothesis-profile quick -m "not launch and not long"; tests=$$?; \
	wait $$types && exit $$tests

notebook: $(READY)  ## run the notebook, and store its results in it; minutes
	$(BIN)/python docs/site_build/notebook.py

docs: $(READY)  ## build the documentation site, site/index.html; warnings and links that lead nowhere are errors
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs site
	@echo "open site/index.html"

bench: $(READY)  ## compare with open-mythos, plain loops and the disk; cost of loops and recomputation; needs an idle machine
	$(BIN)/python benchmarks/step_vs_open_mythos.py
	$(BIN)/python benchmarks/moe_layer.py
	$(BIN)/python benchmarks/loops.py
	$(BIN)/python benchmarks/recompute.py
	$(BIN)/python benchmarks/context_exchange.py
	$(BIN)/python benchmarks/convert_shards.py --memory
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/remote_shards.py
	$(BIN)/python benchmarks/remote_checkpoints.py

constraints: $(READY)  ## pin what pyproject.toml newly requires; with UPGRADE=1: the newest releases of everything
	$(BIN)/python -m pip install --quiet uv
	cp constraints.txt .venv/pins.txt
	$(BIN)/uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.10 --no-annotate --no-header \
		$(if $(UPGRADE),--upgrade) --output-file .venv/pins.txt
	{ grep '^#' constraints.txt; grep -Ev '^(nvidia|cuda)-|^triton=|^(httpx2-jsfetch|pywin32)=' .venv/pins.txt; } > .venv/new.txt
	mv .venv/new.txt constraints.txt

clean:  ## delete everything that the targets above created
	rm -rf .venv runs site docs/reference data/sample data/sample-source *.egg-info .pytest_cache .ruff_cache .hypothesis

# open-mythos is the tests' reference. It pins an older torch, so it is installed outside the environment's packages and
# without its requirements; `pip check` then reports no conflict.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/reference open-mythos==0.5.0
	$(BIN)/python -m pip check
	touch $(READY)
