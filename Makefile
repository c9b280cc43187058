# One command each; `make` alone lists them. Everything happens in .venv and below runs/.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
IMAGES ?= demo
# One word of the shell, whatever spaces and quotes are in it.
quoted = '$(subst ','\'',$(1))'
# Of other pictures a run of its own, named after their folder.
NAME   := $(if $(filter-out demo,$(IMAGES)),-$(shell basename -- $(call quoted,$(IMAGES)) | tr -c 'A-Za-z0-9._\n-' _))
RUN    ?= runs/demo$(NAME)
CONFIG ?= configs/demo.toml
INPUTS ?= 1000000
# Files of tests that run side by side; each lane has a Ray of its own.
LANES  ?= 2
# All heavy lifting is in torch; pip's cache keeps a second set-up short.
BASE   := $(VENV)/.installed-base
SETUP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
          -c constraints.txt -c constraints-all.txt

.PHONY: help setup doctor demo test lint types layers check bench chaos fuzz lock audit clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(SETUP) ## make .venv with everything that demo, tests and checks need

# What users need: no tool of the tests may keep the demo from running.
$(BASE): pyproject.toml constraints.txt constraints-all.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[cpu,demo,report]'
	touch $@

$(SETUP): $(BASE)
	$(PIP) -e '.[dev]'
	$(PIP) -e '.[crf]' || echo "pydensecrf could not be installed (it needs a C++ compiler): going on without it"
	touch $@

doctor: $(BASE) ## check this machine, weights and Ray; FLAGS="--input URI --out URI" checks stores, too
	$(BIN)/python jobs/doctor.py $(FLAGS)

demo: $(BASE) ## train on pictures and look at the masks; IMAGES=<folder or URI> takes your own
	@echo "1/3 train: mine neighbours, distil a head, fit the clusters"
	$(BIN)/python jobs/train.py --config $(call quoted,$(CONFIG)) \
	  --data.root $(call quoted,$(IMAGES)) --out $(call quoted,$(RUN))
	@echo "2/3 segment every image"
	$(BIN)/python jobs/segment_bucket.py --config configs/demo-segment.toml \
	  --input $(call quoted,$(IMAGES)) --model $(call quoted,$(RUN)) \
	  --out $(call quoted,$(RUN)-masks) --overwrite
	@echo "3/3 report"
	$(BIN)/python jobs/report.py --masks $(call quoted,$(RUN)-masks) --model $(call quoted,$(RUN))
	@$(BIN)/python -m stego_core.viz.summary $(call quoted,$(RUN)) $(call quoted,$(RUN)-masks)

test: $(SETUP) ## the whole fast suite
	$(BIN)/python -m pytest --numprocesses $(LANES) --dist loadfile --no-loadscope-reorder

lint: $(SETUP) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(SETUP) ## mypy --strict
	$(BIN)/mypy

layers: $(SETUP) ## who may import whom
	$(BIN)/lint-imports

check: lint types layers test ## all that CI runs, but audit

bench: $(SETUP) demo ## every benchmark of docs/performance.md; DATA=<labelled data> adds the whole schedule
	$(BIN)/python -m benchmarks.run_all $(if $(DATA),--data $(call quoted,$(DATA)))

chaos: $(SETUP) ## kill drivers, workers, nodes and heads of a local cluster; FLAGS="--faults.rounds 9" for longer
	$(BIN)/python jobs/chaos.py $(FLAGS)

fuzz: $(SETUP) ## a million broken images for the decoder; SEEDS=<folder> adds real ones
	$(BIN)/python tests/fuzz/run.py --inputs $(INPUTS) $(if $(SEEDS),--seeds $(call quoted,$(SEEDS)))

lock: $(SETUP) ## pin what the packages of constraints.txt need in turn, as installed
	$(BIN)/python .ci/lock.py

audit: $(SETUP) ## fail if an advisory is known for a pinned package; says so where it can't ask
	$(PIP) 'pip-audit>=2.10' || true  # which then says that it could not ask
	$(BIN)/python .ci/audit.py

clean: ## delete .venv and runs/, with every model and mask in it
	rm -rf $(VENV) runs
