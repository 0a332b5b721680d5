# Every target depends on the virtual environment, so a fresh clone needs no other step.
TASKS := tsd lfr s2ap mmit rqen
PKG_tsd := detection_tsd
PKG_lfr := face_lfr
PKG_s2ap := face_s2ap
PKG_mmit := video_mmit
PKG_rqen := reid_rqen
PACKAGES := $(foreach t,$(TASKS),$(PKG_$(t)))
PRESENT := $(wildcard common $(PACKAGES))

BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NPROC ?= 1
ARGS ?=

# A restarted gloo or nccl group otherwise meets the addresses of the dead one (pytorch#167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE := 1
# One process keeps every core; several share them.
export OMP_NUM_THREADS ?= $(shell n=$$(($$(nproc) / $(NPROC))); echo $$((n > 0 ? n : 1)))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
RUN := $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(NPROC)

VERBS := train eval bench test demo claims reproduce
.PHONY: $(addprefix suite-,common $(PACKAGES)) setup lock test lint demo bench help $(foreach v,$(VERBS),$(addprefix $(v)-,$(TASKS)))

# A package that is not there fails loudly; nothing is skipped in silence.
NEED = @test -d $(PKG_$*) || { echo "error: $(PKG_$*): not in this repository yet: make $@" >&2; exit 2; }

help: ## this list
	@grep -hE '^[^#:]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/\$$\(addprefix ([a-z]+-),\$$\(TASKS\)\): [a-z]+-%:[^#]*/\1<task>:/; s/:.*## /\t/' | expand -t 20
	@echo; echo "<task>: $(TASKS)"

$(STAMP): pyproject.toml constraints.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: BASE_PYTHON: needs Python 3.11 or newer: $(BASE_PYTHON)" >&2; exit 2; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@$(PYTHON) -c 'import cv2' || { echo "error: opencv-python: cannot be imported (a slim image lacks libGL): apt-get install libgl1 libglib2.0-0" >&2; exit 2; }
	@touch $@

setup: $(STAMP) ## .venv with the pinned versions; no-op when nothing changed

lock: $(STAMP) ## write constraints.txt again from what is installed
	@{ head -2 constraints.txt; $(PYTHON) -m pip freeze --exclude-editable; } > constraints.tmp && mv constraints.tmp constraints.txt

# One process a package, TEST_JOBS at a time on a core each; their output comes package by package.
TEST_JOBS ?= 2
test: $(STAMP) ## the whole suite
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=$(TEST_JOBS) --output-sync=target --keep-going $(addprefix suite-,$(PRESENT))

$(addprefix suite-,common $(PACKAGES)): suite-%:
	$(PYTHON) -m pytest $* $(ARGS)

lint: $(STAMP) ## ruff (lint, format) and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

demo: $(STAMP) ## all five demos, one after another; a failed one does not stop the others
	@failed=; for t in $(TASKS); do $(MAKE) --no-print-directory demo-$$t || failed="$$failed $$t"; done; \
	if [ -n "$$failed" ]; then echo "error: demo: failed for:$$failed" >&2; exit 1; fi

bench: $(STAMP) ## all five benchmarks
	@failed=; for t in $(TASKS); do $(MAKE) --no-print-directory bench-$$t || failed="$$failed $$t"; done; \
	if [ -n "$$failed" ]; then echo "error: bench: failed for:$$failed" >&2; exit 1; fi

$(addprefix train-,$(TASKS)): train-%: $(STAMP) ## train-rqen NPROC=8 ARGS="experiment=..."
	$(NEED)
	$(RUN) -m $(PKG_$*).train $(ARGS)

$(addprefix eval-,$(TASKS)): eval-%: $(STAMP) ## eval-rqen ARGS="run_dir=..." or from files, NPROC as for train
	$(NEED)
	$(if $(filter 1,$(NPROC)),$(PYTHON),$(RUN)) -m $(PKG_$*).evaluate $(ARGS)

$(addprefix demo-,$(TASKS)): demo-%: $(STAMP) ## baseline against method on generated data, with report
	$(NEED)
	$(PYTHON) -m $(PKG_$*).demo out=runs/demo/$* $(ARGS)

$(addprefix claims-,$(TASKS)): claims-%: $(STAMP) ## every row and control over at least 3 seeds; resumable, hours
	$(NEED)
	$(PYTHON) -m $(PKG_$*).claims out=runs/claims/$* $(ARGS)

$(addprefix bench-,$(TASKS)): bench-%: $(STAMP) ## ratio tables against named peers, into <package>/benchmarks/results
	$(NEED)
	$(PYTHON) -m $(PKG_$*).benchmarks $(ARGS)

$(addprefix reproduce-,$(TASKS)): reproduce-%: $(STAMP) ## rows of benchmarks/expected.yaml whose data is present
	$(NEED)
	$(PYTHON) -m $(PKG_$*).benchmarks.accuracy $(ARGS) $(if $(ALLOW_EMPTY),allow_empty=true)

$(addprefix test-,$(TASKS)): test-%: $(STAMP) ## tests of one package
	$(NEED)
	$(PYTHON) -m pytest $(PKG_$*) $(ARGS)
