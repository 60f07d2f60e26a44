# make demo    builds everything, converts the bundled model, prints the comparison table and some generated text
# make test    every test
# make llama   the patched llama.cpp, in build/llama.cpp/bin/
# make cuda    nvcc from Python wheels, where there is no CUDA toolkit: the kernels are compiled, if not run
# make bench   criterion and llama-bench
# make test-cuda   what only an NVIDIA GPU can test (LLAMA_CMAKE_ARGS=-DGGML_CUDA=ON)
# make bench-cuda  llama-bench on an NVIDIA GPU (LLAMA_CMAKE_ARGS=-DGGML_CUDA=ON make llama first)
# make bench-attention  the decode kernels on an NVIDIA GPU beside PyTorch's
# make quality measures what each part of the converter is worth, and writes docs/quality.md (hours; resumable)
# make docs    regenerates the measured and generated parts of docs/

CARGO ?= cargo
PYTHON ?= python3
LIB := target/release/libpalu.a

.PHONY: all lib cuda llama demo test test-cuda bench bench-cuda bench-attention quality docs clean

all: llama

lib:
	$(CARGO) build --release

cuda:
	$(PYTHON) scripts/cuda.py

llama: lib
	$(PYTHON) scripts/llama.py build

demo: llama
	$(PYTHON) scripts/demo.py

# One test at a time: llama.cpp takes every core, and two of it at once wait for each other.
test: cuda
	$(MAKE) llama
	$(CARGO) test --release --no-fail-fast -- --test-threads 1

test-cuda: llama
	$(PYTHON) scripts/llama.py build test-backend-ops
	$(CARGO) build --release --example random_projection
	$(PYTHON) scripts/test_cuda.py

bench: llama
	$(CARGO) bench
	$(PYTHON) scripts/bench.py

bench-cuda:
	$(CARGO) build --release --example random_projection
	$(PYTHON) scripts/llama.py build llama-bench llama-batched-bench llama-completion
	$(PYTHON) scripts/bench_cuda.py

bench-attention:
	$(PYTHON) scripts/bench_attention.py --json build/attention.json --plot docs/attention.svg

quality: llama
	$(CARGO) build --release --example ablations
	$(PYTHON) scripts/llama.py build llama-quantize llama-perplexity-ablations
	$(PYTHON) scripts/quality.py

docs: llama
	PALU_WRITE_DOCS=1 $(CARGO) test --release --test architectures

clean:
	rm -rf build target
