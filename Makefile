# Everything here needs make and Python >= 3.10 with its venv module, and nothing else.
#
#   PYTHON    the interpreter that the environment is made from. If it has torch, the environment
#             takes that torch; else pip installs the one that constraints.txt names. The
#             environments of test-oldest and test-newest never take it.
#   PIP_ARGS  handed to pip install, such as an index that holds another build of torch.
#   MINUTES   how long `make demo` trains.
#   CALLS     how many calls of the operations `make fuzz` draws, INTERPRETED_CALLS how many of
#             backend triton, BATCHES how many batches for whole models, and SEED from where.
#   GPU_PATH  a folder of packages that PYTHON lacks, for `make gpu`, which installs nothing.
#             `make gpu-packages` fills it for a Python GPU_PYTHON on Linux x86-64.
#   GPU_WORKERS  processes of `make gpu-tests`, where pytest-xdist is there; one compiles while
#             another computes. GPU_SECONDS: `make gpu-bench` begins no row after that long.
#             GPU_TESTS and GPU_BENCH are further options of the two.
#   OLD       the src folder that `make bench-paired` compares with, and ROUNDS how often.

PYTHON ?= python3
PIP_ARGS ?=
MINUTES ?= 3
CALLS ?= 10000
INTERPRETED_CALLS ?= 1000
BATCHES ?= 2000
SEED ?=
OLD ?=
ROUNDS ?= 9
GPU_PATH ?= build/gpu-packages
GPU_PYTHON ?= 3.12
GPU_WORKERS ?= 8
GPU_SECONDS ?= inf
GPU_TESTS ?=
GPU_BENCH ?=

# The environment, and the files that pin what is in it. The first file that names a package counts.
# test-oldest and test-newest have environments of their own.
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.colonnade-stamp
UNFINISHED := $(VENV)/.colonnade-unfinished
RUN := runs/demo
# In the order of the folders: by default the files with the fewest tests come last, which take long.
SIDE_BY_SIDE := -n auto --dist loadfile --no-loadscope-reorder

# The oldest torch that pyproject.toml accepts, as (major, minor).
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
FOLDER := import pathlib; print(pathlib.Path(torch.__file__).parents[1])
OUTSIDE := import sys; assert not torch.__file__.startswith(sys.prefix + "/")

# What the sanitizers' libraries need: to be there before Python is, and not to count what Python
# itself never frees.
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
CXX ?= c++
CPP_SOURCES := $(wildcard src/colonnade/backends/native/csrc/*)

.PHONY: help install demo bench bench-short bench-packed bench-decoding bench-dropout bench-paired gpu gpu-tests gpu-bench gpu-packages gpu-code structure test test-oldest test-newest test-slow fuzz sanitize lint format clean

help:
	@echo 'make install    make .venv, with every extra and the tools for development'
	@echo 'make demo       train a small model for MINUTES=$(MINUTES), then evaluate, sample and draw it'
	@echo 'make bench      time attention against what others offer; hours'
	@echo 'make bench-short  time short sequences against dense attention; a few minutes'
	@echo 'make bench-dropout  time dropout against none; a few minutes'
	@echo 'make bench-packed  time packed documents against a batch; a minute or two'
	@echo 'make bench-decoding  time the cache, and generation with it; a quarter of an hour'
	@echo 'make bench-paired  time this checkout against the src folder OLD=, ROUNDS=$(ROUNDS) in turns'
	@echo 'make gpu        on a machine with a GPU, without installing anything: gpu-tests, then gpu-bench'
	@echo 'make gpu-tests  the tests marked gpu'
	@echo 'make gpu-bench  time attention on the GPU against what others offer'
	@echo 'make gpu-packages  collect what these need in $(GPU_PATH), to be carried there'
	@echo 'make gpu-code   compile every Triton kernel for GPUs that are not there; 25 minutes'
	@echo 'make structure  count the files that a call goes through, and statements'
	@echo 'make test       the test suite: with run-time type checks, then the tests marked plain and interpreted'
	@echo 'make test-oldest  the same with the oldest torch and transformers, in .venv-oldest'
	@echo 'make test-newest  the same with the newest release of everything, in .venv-newest'
	@echo 'make test-slow  the tests marked slow'
	@echo 'make fuzz       CALLS=$(CALLS) drawn calls and BATCHES=$(BATCHES) batches of whole models against the'
	@echo '                definition, then INTERPRETED_CALLS=$(INTERPRETED_CALLS) of backend triton; SEED= repeats a run'
	@echo 'make sanitize   the tests of the C++ with AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make lint       formatting, lint and types'
	@echo 'make format     reformat Python and C++, and fix what ruff can fix'
	@echo 'make clean      remove environments and caches; runs/ stays'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON), MINUTES=$(MINUTES), and PIP_ARGS for pip install.'

install: $(STAMP)

# The stamp comes last, so an interrupted installation is taken up again. What it left may be
# damaged, hence --clear; an environment that somebody else made and finished is used as it is.
# --system-site-packages does not reach into an environment that PYTHON belongs to: a .pth does.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v '$(PYTHON)' >/dev/null || \
	    { echo 'colonnade: there is no "$(PYTHON)" here. Name a Python: make PYTHON=python3.12' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "colonnade: Python must be 3.10 or newer, got $$('$(PYTHON)' --version 2>&1) from \"$(PYTHON)\". Name another: make PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo 'colonnade: "$(PYTHON)" has no venv module. Install it (Debian, Ubuntu: apt install python3-venv) or name another: make PYTHON=python3.12' >&2; exit 1; }
	@set -e; \
	if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    site=; torch=; \
	    if torch=$$('$(PYTHON)' -c '$(HAS_TORCH); $(FOLDER)' 2>/dev/null); then site=--system-site-packages; fi; \
	    echo "Making $(VENV) with $$('$(PYTHON)' --version)"; \
	    '$(PYTHON)' -m venv --clear $$site $(VENV); \
	    if [ -d "$$torch" ] && ! $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then \
	        echo "$$torch" >"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-folder.pth"; \
	    fi; \
	fi; \
	touch $(UNFINISHED); \
	taken=; \
	if $(BIN)/python -c '$(HAS_TORCH); $(OUTSIDE)' 2>/dev/null; then \
	    echo 'Taking the torch that is installed'; \
	    taken=torch; \
	fi; \
	awk -F== -v taken=$$taken 'BEGIN { seen[taken] = 1; seen[taken ? "triton" : ""] = 1 } !/^#/ && !seen[$$1]++' $(CONSTRAINTS) >$(VENV)/constraints.txt; \
	$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt $(PIP_ARGS) -e '.[all,dev]'; \
	rm $(UNFINISHED); \
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/colonnade train --preset demo --minutes $(MINUTES) --out $(RUN) --overwrite
	$(BIN)/colonnade eval $(RUN)
	$(BIN)/colonnade sample $(RUN) --bytes 400
	$(BIN)/colonnade show --stride 64 --summary 8 --length 512 --out $(RUN)/pattern.png

bench: $(STAMP)
	$(BIN)/python benchmarks/attention.py

bench-short: $(STAMP)
	$(BIN)/python benchmarks/short.py

bench-packed: $(STAMP)
	$(BIN)/python benchmarks/packed.py

bench-decoding: $(STAMP)
	$(BIN)/python benchmarks/decoding.py

bench-dropout: $(STAMP)
	$(BIN)/python benchmarks/dropout.py

bench-paired: $(STAMP)
	$(BIN)/python benchmarks/paired.py --old '$(OLD)' --new src --rounds $(ROUNDS)

# These run by PYTHON itself, which has a torch for its GPU, and not by .venv: there may be no
# package index. A faulty kernel is timed as well, so that one run says everything.
ON_GPU := PYTHONPATH="$(CURDIR)/src:$(abspath $(GPU_PATH))$${PYTHONPATH:+:$$PYTHONPATH}" '$(PYTHON)'

gpu:
	@$(ON_GPU) tests/gpu/needs.py
	@code=0; \
	$(MAKE) gpu-tests || code=$$?; \
	$(MAKE) gpu-bench || code=$$?; \
	exit $$code

# A release that these tests never met may warn of something; here that hides nothing. Some tests
# compile fifty kernels, which takes minutes where several processes share few cores.
gpu-tests:
	@$(ON_GPU) tests/gpu/needs.py
	@workers=; if $(ON_GPU) -c 'import xdist' 2>/dev/null; then workers='-n $(GPU_WORKERS)'; fi; \
	set -x; $(ON_GPU) -m pytest -m gpu -W default --timeout 900 $$workers $(GPU_TESTS) tests/gpu

gpu-bench:
	@$(ON_GPU) tests/gpu/needs.py
	$(ON_GPU) benchmarks/gpu.py --seconds $(GPU_SECONDS) $(GPU_BENCH)

# Pure Python and small libraries alone; torch, triton and transformers have to be there already.
gpu-packages: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target '$(GPU_PATH)' \
	    --python-version $(GPU_PYTHON) --implementation cp --only-binary :all: \
	    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 \
	    -c $(CONSTRAINTS) $(PIP_ARGS) $$($(BIN)/python tests/gpu/needs.py --small)

gpu-code: $(STAMP)
	$(BIN)/python benchmarks/gpu_code.py

structure: $(STAMP)
	$(BIN)/python benchmarks/structure.py

# Run-time type checks would refuse bad input before our own errors could, and stand in a
# compiler's way: the tests of both are marked plain and run without. Each file runs in one process:
# a test has one thread, and what a file prepares is prepared once. Triton chooses its interpreter
# when it is imported, for a whole process: hence the third.
test: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --jaxtyping-packages=colonnade,beartype.beartype -m 'not plain and not slow and not gpu and not interpreted'
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'plain and not slow and not gpu'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m interpreted tests/backends tests/gpu

# Both ends of what pyproject.toml accepts, each in an environment of its own, which takes no torch
# from PYTHON. --always-make looks for newer releases in every run.
test-oldest:
	$(MAKE) test VENV=.venv-oldest HAS_TORCH='assert False' CONSTRAINTS='constraints-oldest.txt constraints.txt'

test-newest:
	$(MAKE) --always-make test VENV=.venv-newest HAS_TORCH='assert False' CONSTRAINTS=/dev/null PIP_ARGS='--upgrade --upgrade-strategy eager $(PIP_ARGS)'

# pytest exits with 5 when it has nothing to run.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow || \
	    { code=$$?; [ $$code -eq 5 ] || exit $$code; echo 'No test is marked slow.'; }

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --calls $(CALLS) --batches $(BATCHES) $(if $(SEED),--seed $(SEED))
	TRITON_INTERPRET=1 $(BIN)/python -m tests.fuzz --backend triton --calls $(INTERPRETED_CALLS) $(if $(SEED),--seed $(SEED))

sanitize: $(STAMP)
	COLONNADE_CACHE=build/sanitize COLONNADE_CXXFLAGS='$(SANITIZE)' ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    $(BIN)/python -m pytest -p no:cacheprovider --timeout 1200 -m 'not plain' tests/backends/test_native.py tests/backends/test_native_decode.py tests/ops/test_dropped_positions.py

lint: $(STAMP)
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .mypy_cache .pytest_cache .ruff_cache .hypothesis build src/colonnade.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
