# Everything runs in .venv; `make demo` and `make test` need nothing but Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-all lint coverage coverage-subset code-coverage bench docs clean

setup: $(STAMP)

# torch first and alone: the constraint pins the version that everything is tested with.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("llmx needs Python 3.11 or newer; set PYTHON=python3.11 (this is %s)" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,export,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/llmx export --model artifacts/checkpoints/demo --force
	$(BIN)/llmx run --onnx artifacts/demo --prompt "ROMEO:" --seed 4

test: setup
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: setup
	$(BIN)/python -m pytest -q -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/llmx && for p in export runtime serve bench cli; do ln -sfn ../../../$$p build/types/llmx/$$p; done
	$(BIN)/mypy -p llmx.runtime -p llmx.export -p llmx.serve -p llmx.bench -p llmx.cli
	$(BIN)/python benchmarks/page.py --check

# Every architecture that transformers has: docs/coverage.md. Resumable; `sweep.py --again TYPE …` runs some once more.
coverage: setup
	$(BIN)/python tests/zoo/sweep.py

# What CI runs of it: each family of models and each layout of state, every kind of hyper-parameter (part of `make test`;
# 8.5 minutes on two cores).
coverage-subset: setup
	$(BIN)/python -m pytest -q -m "not slow" $(addprefix tests/export/test_,parity.py grid.py rope.py traps.py experts.py shims.py \
		lengths.py prediction_heads.py carried_export.py recurrences.py hidden_states.py seq2seq.py transcribe.py spm.py encoder.py) \
		tests/runtime/test_carried_traffic.py

code-coverage: setup
	$(BIN)/python -m pytest -q -n 2 -m "not slow" --cov --cov-report=term

# The peers' environments (llama.cpp compiles for some minutes), then every benchmark on the 135M shape.
bench: setup
	$(BIN)/python benchmarks/peers.py setup
	for dtype in fp32 int8 int4; do $(BIN)/python benchmarks/decode.py --shape smollm2-135m --dtype $$dtype || exit 1; done
	$(BIN)/python benchmarks/coldstart.py --shape smollm2-135m --dtype int4
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/host.py
	for part in closed peer rates; do $(BIN)/python benchmarks/serving.py $$part || exit 1; done
	$(BIN)/python benchmarks/export.py --shape smollm2-135m
	$(BIN)/python benchmarks/memory.py --shape smollm2-135m
	$(BIN)/python benchmarks/page.py

docs: setup
	$(BIN)/python -m pip install --quiet mkdocs-material
	$(BIN)/mkdocs build --strict --site-dir site

clean:
	rm -rf .venv build dist site *.egg-info
