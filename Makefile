# `make demo`: install, then train, sample and score the digits, offline; `make demo-video`: the same with moving digits.
# `make test`: install, then every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-video test lint fast clean

# $(1) is a configuration and its run, $(2) the picture of its samples.
define train_sample_score
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $$($(BIN)/python -c "import torch; print(torch.get_num_threads())") \
		train_dit.py --config configs/$(1).yaml
	$(BIN)/python -m iwin_dit.training.plot runs/$(1)
	$(BIN)/python sample.py --model runs/$(1) --out runs/$(1)/samples --grid runs/$(1)/$(2)
	$(BIN)/python evaluate_fid.py --model runs/$(1)
	@echo "Look at runs/$(1)/$(2) and runs/$(1)/curves.png; the model is in runs/$(1)/pipeline"
endef

demo: .venv/installed
	$(call train_sample_score,digits,samples.png)

demo-video: .venv/installed
	$(call train_sample_score,moving_digits,samples.gif)

test: lint
	$(BIN)/pytest -m "not demo" --numprocesses 2 --dist loadfile --durations 10
	$(BIN)/pytest -m demo --durations 5

fast: .venv/installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv data/digits runs/digits data/moving_digits runs/moving_digits

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
