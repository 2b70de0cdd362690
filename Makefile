# Every target sets up what it needs; a second call finds it done.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PARITY := $(VENV)/.installed-parity
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

SHEET := demo/contact-sheet.png
# Held out of the training set.
DRAWN := penguin hamster birthday-cake bus taco violin crying-face nerd-face

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-s3 full-size parity bench lint format lock clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       train a LoRA on two processes, publish it, draw with it"
	@echo "make test       lint, types and the fast tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-s3    the registry on your own S3 server: ENDPOINT=https://... BUCKET=..."
	@echo "make full-size  SD 1.5 and 2.1 at full size, random weights (20 GB memory, 20 GB disk)"
	@echo "make parity     compare with PyTorch, diffusers and PEFT (Python 3.11 or 3.12)"
	@echo "make bench      the short benchmarks, beside PyTorch, diffusers and PEFT: half an hour"
	@echo "make lint       ruff and mypy;  make format  put the code in shape"
	@echo "make lock       pin the dependencies of pyproject.toml anew (needs uv)"
	@echo "make clean      remove $(VENV), caches and $(SHEET); runs/ and build/ stay"

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 13) or sys.exit( \
	    "error: MindSpore needs Python 3.10 to 3.12, $(PYTHON) is %d.%d; " \
	    "name another one: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Setting up $(VENV): 3 GB, of which 0.9 GB are downloaded the first time"
	@start=$$(date +%s) && \
	$(PYTHON) -m venv $(VENV) && \
	$(PIP) install --require-hashes -r requirements.lock && \
	$(PIP) install --no-deps --no-build-isolation --editable . && \
	echo "Set up in $$(($$(date +%s) - start)) s" && touch $@

$(PARITY): requirements-parity.txt $(INSTALLED)
	@echo "Adding PyTorch, diffusers, transformers and PEFT to $(VENV)"
	@start=$$(date +%s) && \
	$(PIP) install -r requirements-parity.txt && \
	echo "Added in $$(($$(date +%s) - start)) s" && touch $@

demo: $(INSTALLED)
	@start=$$(date +%s) && \
	$(BIN)/lora-launch --devices 2 configs/runs/emoji-ink.yaml && \
	$(BIN)/lora-sample --registry runs/registry --lora emoji-ink --compare --seed 0 --scale 3 \
	    $(foreach name,$(DRAWN),--prompt "ink emoji of $(subst -, ,$(name))") --batch 4 \
	    --out demo/pictures --sheet $(SHEET) --overwrite > /dev/null && \
	echo "Trained and drawn in $$(($$(date +%s) - start)) s: see $(SHEET)"

test: lint
	@$(BIN)/pytest -n 2 --dist loadgroup

test-slow: $(INSTALLED)
	@$(BIN)/pytest -m "slow and not parity" --timeout 3600 --ignore tests/full_size

full-size: $(INSTALLED)
	@$(BIN)/pytest -m slow -s tests/full_size

bench: $(PARITY)
	@$(BIN)/python -m bench

parity: $(PARITY)
	@$(BIN)/pytest -m parity --timeout 3600

test-s3: $(INSTALLED)
	@$(if $(and $(ENDPOINT),$(BUCKET)),,$(error give ENDPOINT=https://... and BUCKET=...))
	@$(BIN)/lora-registry doctor --registry s3://$(BUCKET)/lora-registry-test \
	    --endpoint-url $(ENDPOINT)
	@LORA_TEST_S3_ENDPOINT=$(ENDPOINT) LORA_TEST_S3_BUCKET=$(BUCKET) \
	    $(BIN)/pytest -m "" -q -k "own and not condition" tests/registry/test_registry_s3.py

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format .

lock:
	uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header \
	    --no-emit-index-url --extra test --extra recipe --group pyproject.toml:build \
	    --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find assets cluster configs diffusion launcher registry sampler tests trainer weights \
	    -name __pycache__ -prune -exec rm -rf {} +
