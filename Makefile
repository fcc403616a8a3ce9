# `make demo` and `make test` are all you need; each installs into .venv first when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UPSTREAM := build/llama.cpp
QUANTIZER := $(UPSTREAM)/made/bin/llama-quantize

.PHONY: install demo test test-slow lint links bench bench-mac bench-quantisers bench-training clean

demo: install
	$(BIN)/ldrt-edge demo runs/demo

test: install lint
	$(BIN)/pytest -m "not slow"

test-slow: install $(QUANTIZER)
	PATH="$(CURDIR)/$(dir $(QUANTIZER)):$$PATH" $(BIN)/pytest -m slow

# llama.cpp's own quantiser, of the sources that the pinned llama-cpp-python is built from: ours is held against it.
$(QUANTIZER): constraints.txt | install
	rm -rf $(UPSTREAM) && mkdir -p $(UPSTREAM)
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(UPSTREAM) $$(grep ^llama-cpp-python== constraints.txt)
	tar xzf $(UPSTREAM)/llama_cpp_python-*.tar.gz -C $(UPSTREAM) --strip-components 1
	cmake -S $(UPSTREAM)/vendor/llama.cpp -B $(UPSTREAM)/made -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
	  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	cmake --build $(UPSTREAM)/made --target llama-quantize --parallel

bench: install
	$(BIN)/python -m ldrt_edge.bench.peers runs/demo/gguf-q4 --merged runs/demo/merged

# What only Apple silicon can say: MLX's speed beside llama.cpp's, and that both answer as the merged model does.
bench-mac: install
	@test "$$(uname -sm)" = "Darwin arm64" || { echo "make: bench-mac measures Apple silicon; this is $$(uname -sm)" >&2; exit 1; }
	$(BIN)/ldrt-edge quantize runs/demo/merged --to mlx --q4 --out runs/demo/mlx-q4
	$(BIN)/ldrt-edge parity runs/demo/merged runs/demo/gguf-q4 runs/demo/mlx-q4 --peers --out runs/demo/parity
	$(BIN)/ldrt-edge bench runs/demo/gguf-q4 --data runs/demo/phantom --reference runs/demo/merged --limit 200 --out runs/demo/mac-gguf
	$(BIN)/ldrt-edge bench runs/demo/mlx-q4 --data runs/demo/phantom --reference runs/demo/merged --limit 200 --out runs/demo/mac-mlx

# llama.cpp's presets, with and without importance, and MLX's, beside our plans at equal bytes: hours; a second run goes on.
bench-quantisers: install
	$(BIN)/python -m ldrt_edge.bench.quantisers runs/demo/merged --data runs/demo/phantom --out runs/demo/quantisers
	$(BIN)/python -m ldrt_edge.bench.quantisers runs/demo/merged --to mlx --data runs/demo/phantom --out runs/demo/quantisers

# Ours beside transformers' Trainer with peft and TRL, with six questions a picture and with one; DATA is a dataset.
bench-training: install
	$(BIN)/python -m ldrt_edge.bench.training --data $(DATA) --out runs/training --questions 6
	$(BIN)/python -m ldrt_edge.bench.training --data $(DATA) --out runs/training --questions 1

lint: install links
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v c++ >/dev/null || { echo "make: no C++ compiler (c++): llama-cpp-python is built from source; install g++ or clang" >&2; exit 1; }
	@command -v cmake >/dev/null || { echo "make: no cmake: llama-cpp-python is built from source; install cmake" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed (PYTHON=python3.11 make ...)" >&2; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch (CPU build)..."
	$(BIN)/pip install --quiet --constraint constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@echo "Installing the rest; llama-cpp-python builds from source, about 5 minutes on 2 cores..."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,mlx,starter,bench,peers,dev]'
	touch $(STAMP)

# Type checkers do not follow the editable install's hook: give them the four folders as one package.
links:
	rm -rf .links && mkdir -p .links/ldrt_edge
	for entry in ldrt_edge/*; do ln -sfn ../../$$entry .links/$$entry; done
	for room in train convert bench; do ln -sfn ../../$$room .links/ldrt_edge/$$room; done

clean:
	rm -rf $(VENV) .links build *.egg-info
