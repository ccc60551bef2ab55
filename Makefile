# Each verb sets itself up from a bare Python 3.10 or newer: nothing has to be run before it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHARDS := data/shapes/small/.complete
AUDIT := pip-audit@2.10.1
ARGS ?=
# parts/ are what experiments build on, devices/ overlays; encoders/ and scores/ are for other verbs
EXPERIMENTS := $(filter-out parts/% devices/% encoders/% scores/%,$(patsubst experiments/%.yaml,%,$(wildcard experiments/*/*.yaml)))
BENCHMARKS := shapes_detector derivative backbones self_check support_table feature_cache data_path training_step scale remote_shards cached_epoch token_sampling startup
SOURCES := src callbacks tests benchmarks docs/conf.py docs/_extensions

# the first Python that is new enough
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help venv demo own shards parent compare encoders encoders-claim curves test test-slow coverage test-oldest test-pythons lint types docs format bench reliability objectives lock audit clean
.PHONY: $(addprefix fit-,$(EXPERIMENTS))

help: ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo; echo "  experiments: $(EXPERIMENTS)"
	@echo "  options go into ARGS: make fit-shapes/emf ARGS='--trainer.max_steps 1000'"

venv: $(READY) ## install everything into .venv (2 minutes, 6 GB)

$(READY): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "make: needs Python 3.10 or newer; name one with PYTHON=..." >&2; exit 2; fi
	@[ -x $(BIN)/python ] || { echo "Setting up $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@# uv installs in a minute what takes pip five; it is the lock's own
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --require-hashes -r $(VENV)/uv.lock || true
	@# compiled at once: otherwise a Python that may not write its bytecode compiles torch again at each start
	@if [ -x $(BIN)/uv ]; then install="$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python"; \
	else install="$(BIN)/python -m pip install --quiet"; fi; \
	$$install --require-hashes -r requirements.lock && $$install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) $(SHARDS) ## watch a MeanFlow model learn to generate images in 1, 2 and 4 steps (5 minutes on 2 cores)
	$(BIN)/emf fit --config experiments/shapes/demo.yaml $(ARGS)

# the newest run of own_data/$(1)
own_run = $$(ls -td runs/own_data/$(1)/version_* | head -n 1)
own: $(READY) ## train on your own pictures, DATA=folder with a.jpg and a.txt: flow matching, MeanFlow from it, an export
	@if [ -z "$(DATA)" ]; then echo "make: name your pictures: make own DATA=folder (docs/how_to/own_data.md)" >&2; exit 2; fi
	$(BIN)/emf fit --config experiments/own_data/flow_matching.yaml --data.shards '$(DATA)' $(ARGS)
	$(BIN)/emf fit --config experiments/own_data/meanflow.yaml --data.shards '$(DATA)' \
		--model.init_args.net.init_args.pretrained "$(call own_run,flow_matching)/network" $(ARGS)
	$(BIN)/emf export --run "$(call own_run,meanflow)" --out "$(call own_run,meanflow)/export"

shards: $(SHARDS) ## write the small shapes world's caption-image shards

$(SHARDS): | $(READY)
	$(BIN)/emf shards --world small --count 50000 --seed 0 --out data/shapes/small/train --captions data/shapes/small/captions.txt
	$(BIN)/emf shards --world small --count 1000 --seed 1 --out data/shapes/small/validation
	@touch $@

parent: $(READY) $(SHARDS) ## train the flow-matching model that MeanFlow adapts, into experiments/shapes/parent (40 minutes on 2 cores)
	$(BIN)/emf shards --world small --count 200000 --seed 0 --out data/shapes/small/train_200000
	$(BIN)/emf fit --config experiments/shapes/flow_matching.yaml --data.shards data/shapes/small/train_200000 $(ARGS)
	network=$$(ls -td runs/shapes/flow_matching/version_*/network | head -n 1); \
	mkdir -p experiments/shapes/parent && cp "$$network"/* experiments/shapes/parent/

fit-%: ## train experiments/%.yaml, e.g. make fit-shapes/emf
	@echo "make: no file experiments/$*.yaml; there are: $(EXPERIMENTS)" >&2; exit 2

$(addprefix fit-,$(EXPERIMENTS)): fit-%: $(READY) $(SHARDS)
	$(BIN)/emf fit --config experiments/$*.yaml $(ARGS)

encoders: $(READY) ## study the text encoders of the shapes world, with controls (1 minute)
	$(BIN)/emf encoders --config experiments/encoders/shapes.yaml $(ARGS)

encoders-claim: $(READY) $(SHARDS) ## do few steps need better text features? (30 trainings, about 3 1/2 hours on 2 cores)
	$(BIN)/emf claim --jobs 2 $(ARGS)

COMMA := ,
# shapes experiments as a list for the command line
listed = [$(subst $() $(),$(COMMA),$(patsubst %,experiments/shapes/%.yaml,$(1)))]
OBJECTIVES := emf meanflow_released meanflow_paper improved_meanflow alpha_flow split_meanflow decoupled transition \
	rcgm twin_flow cmt refined flow_matching_continued
compare: $(READY) $(SHARDS) ## train all methods from the same parent for the same time, into runs/compare (15 x 30 minutes; ARGS='--minutes 10')
	$(BIN)/emf compare --out runs/compare --experiments "$(call listed,$(OBJECTIVES) fgm scflow)" $(ARGS)

objectives: $(READY) $(SHARDS) ## train all objectives for the same steps and the same time, 3 seeds, write docs/results/objectives.md (6 hours on 2 cores)
	$(BIN)/emf compare --out runs/objectives --experiments "$(call listed,$(OBJECTIVES))" \
		--overlays "[experiments/parts/short_comparison.yaml]" --steps 600 --minutes 5 --seeds "[0,1,2]" \
		--images_per_prompt 4 --jobs 2 $(ARGS)
	cp runs/objectives/comparison.md docs/results/objectives.md

curves: $(READY) ## start TensorBoard on all runs and print its address
	@echo "the scores: http://localhost:6006/?smoothing=0#timeseries&_smoothingWeight=0"
	$(BIN)/tensorboard --logdir runs $(ARGS)

# tests that run beside all others, in a second process: on two cores they take as long as the rest, and these alone
# need the process that tests/forked.py forks
BESIDE := tests/callbacks tests/cli tests/data/cache/test_feature_cache.py tests/faults tests/test_devices.py \
	tests/test_diagnose_verb.py tests/test_experiments.py tests/test_forked.py tests/test_own_pages.py tests/test_play.py \
	tests/test_resume.py
test: export PYTHONDONTWRITEBYTECODE :=  # the processes that tests start read what one of them has compiled
test: $(READY) ## run the tests (8 minutes on 2 cores)
ifeq ($(strip $(ARGS)),)
	@$(BIN)/pytest $(BESIDE) > $(VENV)/pytest-beside.log 2>&1 & beside=$$!; status=0; \
	$(BIN)/pytest $(addprefix --ignore=,$(BESIDE)) || status=$$?; \
	wait $$beside || status=$$?; cat $(VENV)/pytest-beside.log; exit $$status
else
	$(BIN)/pytest $(ARGS)
endif

test-slow: $(READY) ## run the tests that take minutes each
	$(BIN)/pytest -m slow $(ARGS)

coverage: $(READY) ## run the tests in one process and print which branches of each file they take (ARGS='tests/flow')
	@$(BIN)/coverage erase; status=0; $(BIN)/coverage run -m pytest $(ARGS) || status=$$?; \
	$(BIN)/coverage combine --quiet; $(BIN)/coverage report; exit $$status

# the interpreter of a version, if it is here: on the PATH, uv's own, or pyenv's
find_python = { $(BIN)/uv python find --no-python-downloads --system $(1) || \
	ls $(HOME)/.pyenv/versions/$(1).*/bin/python | tail -n 1; } 2>/dev/null
VERSIONS := 3.10 3.11 3.12 3.13

test-oldest: $(READY) ## run the tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	@python=$$($(call find_python,3.10)) || python=$(BIN)/python; \
	$(BIN)/uv venv --quiet --allow-existing --python "$$python" .venv-oldest
	@$(BIN)/uv pip compile pyproject.toml --extra dev --resolution lowest-direct --python .venv-oldest/bin/python \
		--no-annotate --no-header --no-emit-index-url --generate-hashes --quiet --output-file .venv-oldest/oldest.lock
	@$(call test_in,.venv-oldest,.venv-oldest/oldest.lock)

test-pythons: $(READY) ## run the tests on each Python from 3.10 to 3.13 that is here, in .venv-VERSION
	@$(foreach version,$(VERSIONS),if python=$$($(call find_python,$(version))); then echo "Python $(version): $$python"; \
		$(BIN)/uv venv --quiet --allow-existing --python "$$python" .venv-$(version); \
		$(call test_in,.venv-$(version),requirements.lock); \
	else echo "Python $(version): not here"; fi;)

# installs what a lock holds into an environment, and runs the tests in it
test_in = install="$(BIN)/uv pip install --quiet --compile-bytecode --python $(1)/bin/python"; \
	$$install --require-hashes -r $(2); $$install --no-deps --no-build-isolation -e .; $(1)/bin/pytest $(ARGS)

lint: $(READY) ## check style, types, layers and documentation
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory --jobs 2 --keep-going types docs

types: $(READY) ## check types alone
	$(BIN)/mypy

docs: $(READY) ## build the documentation site into docs/_build/html; a broken link or a missing reference is an error
	@rm -rf docs/api/generated  # pages of modules that are gone
	$(BIN)/python -m sphinx -b html --fresh-env -W --keep-going --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

reliability: $(READY) ## plant a thousand faults into runs and data, write docs/reliability.md (half an hour; ARGS='--tries 0.1 --no-page')
	$(BIN)/python -m benchmarks.reliability $(ARGS)

format: $(READY) ## put the sources into shape
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(READY) $(SHARDS) ## measure the detector, the derivative, caches and encoders, write docs/results/*.md (never asserted in tests)
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

lock: $(READY) ## renew requirements.lock: exact versions, with hashes, for Python 3.10 and newer
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra docs --universal --python-version 3.10 --upgrade \
		--no-annotate --no-header --no-emit-index-url --generate-hashes --quiet --output-file requirements.lock

audit: $(READY) ## look for known vulnerabilities in requirements.lock
	@status=0; said=$$($(BIN)/uv tool run $(AUDIT) --strict --require-hashes --disable-pip -r requirements.lock 2>&1) || status=$$?; \
	if [ $$status -ne 0 ] && ! grep -q "^Found" <<< "$$said"; then \
		echo "make: no audit: the tool or its advisory source cannot be reached ($$(tail -n 1 <<< "$$said"))" >&2; exit 2; \
	fi; echo "$$said"; exit $$status

clean: ## remove the environment and all caches; runs/ and data/ stay
	rm -rf $(VENV) .venv-* .coverage* docs/_build docs/api/generated .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build src/*.egg-info
	find src callbacks tests -name __pycache__ -type d -prune -exec rm -rf {} +
