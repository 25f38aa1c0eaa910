# make demo   environment, two fine-tunings of the miniature, memorisation report; offline once installed, on a CPU
# make test   environment, lint, the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint clean slow

$(VENV)/.installed: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,test]'
	touch $@

# The noise key of the demonstration lies with it, and leaves your own folder of keys alone.
demo: export SDXL_AMBIENT_HOME := $(CURDIR)/$(DEMO)/home
demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml train_sdxl_ambient.py --config_file configs/mini_lora.yaml \
	  --t_n none --low_noise skip --output_dir $(DEMO)/lora_clean --resume_from_checkpoint latest
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml train_sdxl_ambient.py --config_file configs/mini_lora.yaml \
	  --output_dir $(DEMO)/lora_noisy --resume_from_checkpoint latest
	$(BIN)/python -m eval.memorization --config_file configs/mini_eval.yaml --output_dir $(DEMO)/report
	@echo "Report: $(DEMO)/report/index.html (figures: $(DEMO)/report/report.json)"

# Style, direction of imports, types.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# Two processes; the tests of a file stay in one, which trains what they share once.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
