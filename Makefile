# `make demo`: install, then train, sample and score the digits, offline. `make test`: install, then every check.
PYTHON ?= python3
RUN := runs/digits
BIN := .venv/bin

.PHONY: demo test lint fast clean

demo: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $$($(BIN)/python -c "import torch; print(torch.get_num_threads())") train_dit.py
	$(BIN)/python -m iwin_dit.training.plot $(RUN)
	$(BIN)/python sample.py --model $(RUN) --out $(RUN)/samples --grid $(RUN)/samples.png
	$(BIN)/python evaluate_fid.py --model $(RUN)
	@echo "Look at $(RUN)/samples.png and $(RUN)/curves.png; the model is in $(RUN)/pipeline"

test: lint
	$(BIN)/pytest -m "slow or not slow" --durations 10

fast: .venv/installed
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv data/digits runs/digits

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
