# Two commands to know: `make demo` and `make test`. Everything is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
ONEDL_VENV ?= .venv-onedl
DOWNSTREAM_VENV ?= .venv-downstream
WHEEL_VENV ?= .venv-wheel
BIN := $(VENV)/bin
RUN := PYTHONWARNINGS=ignore $(BIN)/python
REP := PYTHONWARNINGS=ignore $(BIN)/rep-plugin
# One thread a process and two processes: the tests are many small networks. A file's tests stay together.
JOBS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1
PYTEST := -m pytest -q --durations=10 --numprocesses $(JOBS) --dist loadfile
FUZZ_TESTS := test_trained_and_deployed_blocks_agree or test_merged_step_equals_running_the_branches
INSTALLED_TESTS := help or training or python or example or program or parts or arguments
TIMM_TESTS := test_model_ and not with_features_fx
DEMO_DIR := work_dirs/rep_mbv2_mini_cub
STOCK_RECORD := $(addprefix --stock-record ,$(wildcard docs/results/records/demo/stock_mobilenetv2_seed0.json))
FASHION := /usr/share/datasets/fashion-mnist

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.users: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/pip install --progress-bar off -e '.[openmmlab]'
	touch $@

$(VENV)/.developers: $(VENV)/.users
	$(BIN)/pip install --progress-bar off -e '.[openmmlab,export,test,docs]'
	touch $@

$(ONEDL_VENV)/.developers: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(ONEDL_VENV)
	$(ONEDL_VENV)/bin/pip install --quiet --upgrade pip
	$(ONEDL_VENV)/bin/pip install --progress-bar off -e '.[onedl,export,test]'
	touch $@

# mmdet and mmseg need mmcv's compiled operators, which come as source. The wheel stays in $(DOWNSTREAM_VENV)/wheels.
MMCV := onedl_mmcv-2.3.6
$(DOWNSTREAM_VENV)/wheels/.$(MMCV):
	$(PYTHON) -m venv $(DOWNSTREAM_VENV)
	$(DOWNSTREAM_VENV)/bin/pip install --quiet --upgrade pip
	$(DOWNSTREAM_VENV)/bin/pip install --progress-bar off 'setuptools<81' wheel ninja packaging torch torchvision
	mkdir -p $(DOWNSTREAM_VENV)/build
	cd $(DOWNSTREAM_VENV)/build && ../bin/pip download --no-deps --no-binary :all: --no-build-isolation onedl-mmcv==2.3.6 \
	  && tar xzf $(MMCV).tar.gz && sed -i 's/-std=c++1[47]/-std=c++20/' $(MMCV)/setup.py
	cd $(DOWNSTREAM_VENV)/build && PATH="$$PWD/../bin:$$PATH" MMCV_WITH_OPS=1 MAX_JOBS=$(JOBS) CFLAGS="-O1 -g0" \
	  ../bin/pip wheel --no-build-isolation --no-deps -w ../wheels ./$(MMCV)
	touch $@

$(DOWNSTREAM_VENV)/.developers: setup.cfg pyproject.toml $(DOWNSTREAM_VENV)/wheels/.$(MMCV)
	$(DOWNSTREAM_VENV)/bin/pip install --progress-bar off --no-deps $(DOWNSTREAM_VENV)/wheels/$(MMCV)-*.whl
	$(DOWNSTREAM_VENV)/bin/pip install --progress-bar off --no-build-isolation -e '.[onedl,downstream,test]'
	touch $@

install: $(VENV)/.users ## the package with mmpretrain, into .venv

# Rendered anew where the drawing changed; --overwrite replaces only what this script made.
BIRDS := tools/dataset_converters
data/mini_cub/mini_fgvc.json: $(BIRDS)/make_mini_fgvc.py $(BIRDS)/_birds.py | $(VENV)/.users
	$(RUN) $< --out data/mini_cub --overwrite

demo: $(VENV)/.users data/mini_cub/mini_fgvc.json ## render birds, train, deploy, prove, time, one table
	$(REP) train configs/rep_mbv2_mini_cub.py --work-dir $(DEMO_DIR)
	$(REP) compare configs/rep_mbv2_mini_cub.py $(DEMO_DIR) $(STOCK_RECORD)

test: $(VENV)/.developers fashion-mnist ## all tests on the official stack
	$(ONE_THREAD) $(BIN)/python $(PYTEST) $(TESTS)

fuzz: $(VENV)/.developers ## 2,000 random configurations for each property test of the blocks (ten minutes)
	FUZZ=2000 $(ONE_THREAD) $(BIN)/python $(PYTEST) tests/test_blocks -k "$(FUZZ_TESTS)"

SEQUENCES ?= 500
FIRST ?= 0
sequences: $(VENV)/.developers ## 500 random orders of verbs, saved and loaded (20 minutes); a failure names its seed: FIRST=
	SEQUENCES=$(SEQUENCES) FIRST=$(FIRST) $(ONE_THREAD) $(BIN)/python $(PYTEST) --dist load -v tests/test_sequences.py

# The long run is cumulative: units that passed are in the records of $(ATTACK) and are not repeated.
ATTACK ?= work_dirs/attack
PARTS ?=
ATTACK_LONG := --long --jobs $(JOBS) --record $(ATTACK) --summary $(ATTACK)/attack.json
attack: $(VENV)/.developers ## random networks and blocks, malicious files, kills, threads, wrong arguments; LONG=1: 5,000 networks (hours, resumable)
	$(ONE_THREAD) $(RUN) -m tests.attack $(PARTS) $(if $(LONG),$(ATTACK_LONG),--jobs $(JOBS))

test-onedl: $(ONEDL_VENV)/.developers fashion-mnist ## the same tests on the maintained fork
	$(ONE_THREAD) $(ONEDL_VENV)/bin/python $(PYTEST) $(TESTS)

test-wheel: ## the wheel in a new virtual environment, away from the checkout: commands and snippets (ten minutes, 6 GB)
	rm -rf build $(WHEEL_VENV) && $(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/pip install --quiet --upgrade pip
	$(WHEEL_VENV)/bin/pip wheel --quiet --no-deps -w $(WHEEL_VENV)/wheel .
	wheel=$$(ls $(abspath $(WHEEL_VENV))/wheel/*.whl) && \
	  $(WHEEL_VENV)/bin/pip install --progress-bar off "$$wheel[openmmlab,export]" pytest hypothesis segmentation-models-pytorch
	mkdir $(WHEEL_VENV)/away && cp -r tests docs configs *.md Makefile mkdocs.yml $(WHEEL_VENV)/away
	cd $(WHEEL_VENV)/away && INSTALLED=1 $(ONE_THREAD) PYTHONWARNINGS=ignore ../bin/python -m pytest -q --durations=10 \
	  tests/test_wheel.py tests/test_docs.py -k "$(INSTALLED_TESTS)"

test-timm: $(VENV)/.developers ## timm's own tests of models on our names: TIMM=a checkout of pytorch-image-models (15 minutes)
	PYTHONPATH=tests $(ONE_THREAD) $(RUN) -m pytest -q -rs -p timm_names -p no:cacheprovider -k "$(TIMM_TESTS)" $(TIMM)/tests/test_models.py

test-downstream: $(DOWNSTREAM_VENV)/.developers ## detectors and segmentors; builds mmcv's operators once (12 to 30 minutes)
	$(ONE_THREAD) PYTHONWARNINGS=ignore $(DOWNSTREAM_VENV)/bin/python -m pytest -q --durations=10 tests/downstream

lint: $(VENV)/.developers ## ruff (rules, format) and mypy, as .pre-commit-config.yaml lists them
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pre-commit run --all-files

docs: $(VENV)/.developers ## README, pages, API and commands as a site: site/index.html; links and anchors are checked
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/.developers ## the site on http://127.0.0.1:8000, rebuilt where a file changes
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs serve

format: $(VENV)/.developers ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Debian's package where apt is there; otherwise mmpretrain's loader downloads the images itself.
fashion-mnist: ## Fashion-MNIST for configs/rep_mbv2_fashion_mnist.py
	@test -d $(FASHION) || { command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y dataset-fashion-mnist; } \
	  || echo "no apt here: the loader will download the images on first use"
	@mkdir -p data/fashion_mnist
	@for file in $(FASHION)/*.gz; do test -f "$$file" && gunzip -c "$$file" > data/fashion_mnist/$$(basename "$$file" .gz); done; \
	  ls -l data/fashion_mnist

# Sets that are not done go on where they were: the same command again. MINUTES ends them cleanly.
SETS ?= $(basename $(notdir $(wildcard configs/experiments/[a-z]*.py))) $(wildcard benchmarks/experiments/*.py)
MINUTES ?= 100000
experiments: $(VENV)/.developers fashion-mnist data/mini_cub/mini_fgvc.json ## train SETS and record every run (days; go on later: MINUTES=60)
	for name in $(SETS); do \
	  PYTHONPATH=benchmarks $(REP) experiments $$name --budget-minutes $(MINUTES) --records docs/results/records || exit 1; \
	done

results: $(VENV)/.users ## tables and plots of docs/results/ from the records (a minute)
	$(RUN) docs/results.py

bench-latency: $(VENV)/.developers ## deployed against stock MobileNetV2 in four runtimes
	$(RUN) benchmarks/latency.py

bench-bilinear: $(VENV)/.developers ## bilinear pooling: time and memory against plain references
	$(RUN) benchmarks/bilinear.py

bench-prune-zoo: $(VENV)/.developers ## prune 30 % of 17 networks, each proven equal to its masked form
	$(RUN) benchmarks/prune_zoo.py

bench-coverage: $(VENV)/.developers ## prune 30 % of one network of each family, by us and by Torch-Pruning (hours; goes on where it was ended)
	$(ONE_THREAD) $(RUN) benchmarks/prune_coverage.py

bench-prune-speed: $(VENV)/.developers ## seconds that pruning takes, against Torch-Pruning; a bilinear classifier
	$(RUN) benchmarks/prune_speed.py

bench-sparsity-cost: $(VENV)/.users ## a training step with and without the terms of sparse training
	$(RUN) benchmarks/sparsity_cost.py

bench-prune-latency: $(VENV)/.developers ## plans by measured latency against plans by multiply-adds (ten minutes)
	$(RUN) benchmarks/prune_latency.py

bench-pruned-widths: $(VENV)/.developers ## pruned networks with and without rounded widths, in ONNX Runtime and OpenVINO (ten minutes)
	$(RUN) benchmarks/pruned_widths.py

bench-training-cost: $(VENV)/.users ## a training step of multi-branch networks: time and memory, ours and others'
	$(ONE_THREAD) $(RUN) benchmarks/training_cost.py

bench-expand: $(VENV)/.users ## expand, train, merge back: equality at every step
	$(ONE_THREAD) $(RUN) benchmarks/expand.py

kill-loop: $(VENV)/.developers ## kill -9 trainings that prune, 20 times each, resume, compare with trainings nobody killed (ten minutes)
	$(ONE_THREAD) $(RUN) -m tests.test_openmmlab.test_hooks.kill_loop --kills 20

bench-foreign: $(VENV)/.developers ## every multi-branch model of timm and mmpretrain, merged and proven (20 minutes)
	$(ONE_THREAD) $(RUN) benchmarks/foreign_models.py

bench-export: $(VENV)/.developers data/mini_cub/mini_fgvc.json ## ONNX Runtime and OpenVINO against PyTorch, on images (two minutes)
	$(ONE_THREAD) $(RUN) benchmarks/export.py

clean:
	rm -rf $(VENV) $(ONEDL_VENV) $(DOWNSTREAM_VENV) $(WHEEL_VENV) build site *.egg-info
