# `make sweep` and `make test` set everything up by themselves; the rest is for developers. `make` alone only sets up.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO_COHORT ?= cohorts/phantom
DEMO_RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
# `:=`, because all commands of the demonstration write into one folder.
TISSUE_RUN := runs/tissue-$(shell date +%Y%m%d-%H%M%S)

# What `make coverage` has a line for: every room, and the files beside them.
ROOMS := $(patsubst %/__init__.py,%/*,$(sort $(wildcard core/*/__init__.py distributed/*/__init__.py))) \
	core/*.py distributed/*.py search_spaces/*

.PHONY: sweep sweep-tissue test one coverage campaign docs lint fix types bench

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job: 128 synthetic brains, and as much of a search as this machine does in about 3 minutes.
sweep: .venv/.installed
	$(BIN)/brainsweep demo --cohort $(DEMO_COHORT) --out $(DEMO_RUN)

# Another one, 5 minutes on 2 cores: learn the tissues of labelled synthetic brains, measure their volumes in other
# people, predict ages from these and from the images, and compare both on the same held-out people.
sweep-tissue: .venv/.installed
	$(BIN)/brainsweep phantom $(TISSUE_RUN)/labelled --kind tissue --channels t1w --subjects 48 --spacing 8
	$(BIN)/brainsweep sweep $(TISSUE_RUN)/labelled --task segmentation --out $(TISSUE_RUN)/segmentation \
		--trials 1 --folds 2 --set model.name=dynunet --set model.width=0.25 \
		--set objective.name=dice_cross_entropy --set optimiser.learning_rate=0.005 \
		--set training.steps=80 --set training.judge_every=80 --set training.batch_size=4
	$(BIN)/brainsweep phantom $(TISSUE_RUN)/people --kind tissue --channels t1w --subjects 96 --spacing 8 --seed 1
	$(BIN)/brainsweep derive $(TISSUE_RUN)/people --from $(TISSUE_RUN)/segmentation --volumes --name predicted
	$(BIN)/brainsweep sweep $(TISSUE_RUN)/people --task tissue_age --out $(TISSUE_RUN)/by-volumes --folds 2 --trials 8 \
		--set 'data.volumes=[predicted_csf_ml,predicted_gm_ml,predicted_wm_ml]'
	$(BIN)/brainsweep sweep $(TISSUE_RUN)/people --space cnn_age --out $(TISSUE_RUN)/by-cnn --folds 2 --trials 2 \
		--splits-from $(TISSUE_RUN)/by-volumes --set model.width=0.25 --set training.epochs=4 --set training.batch_size=8
	$(BIN)/brainsweep compare $(TISSUE_RUN)/by-volumes $(TISSUE_RUN)/by-cnn --out $(TISSUE_RUN)/comparison

# The default suite is measured; what its second processes and Ray's workers run is not counted.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not campaign and not gpu' --cov --cov-report=
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not campaign and not gpu'

# Some tests, of any tier: make one TEST=tests/test_cli.py, make one TEST='tests/test_cli.py -k name'.
one: .venv/.installed
	$(if $(TEST),,$(error say which: make one TEST=tests/test_cli.py))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST)

# How much of every room the default suite ran when `make test` was last called, in percent of the lines.
coverage: .venv/.installed
	@for files in $(foreach room,$(ROOMS),'$(room)'); do \
		percent=$$($(BIN)/coverage report --format=total --include="$$files") || { echo "$$percent"; exit 1; }; \
		printf '%-24s %3s %%\n' "$$files" "$$percent"; \
	done
	@printf '%-24s %3s %%\n' total $$($(BIN)/coverage report --format=total)

# Survival and populations for real: drivers, workers, nodes and disks that fail. Minutes each, on a quiet machine.
campaign: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'campaign and not gpu'

# The manual as a site, build/site/index.html, readable from the disk.
docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What of `make lint` can be put right without a person; it shows what is left.
fix: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.installed
	$(BIN)/mypy

# Speed as ratios measured side by side in one run.
bench: .venv/.installed
	$(BIN)/python -m benchmarks.losses
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.views
	$(BIN)/python -m benchmarks.slots
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.search --out $(DEMO_RUN)-search
