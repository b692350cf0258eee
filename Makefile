# The verbs of this project. `make demo` shows it working, `make test` proves it.
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
TORCH := torch>=2.9
GPU_SETUP := $(if $(filter $(VENV)/%,$(PY)),setup)

.PHONY: demo setup check fmt test test-slow test-all test-asan fuzz campaign test-gpu bench-gpu gpu rehearse-gpu bench bench-avx2 docs \
	package wheel clean

# What an hour of training gives, beside the minute of the demo: the model of MNIST, if it ships.
SHIPPED := $(notdir $(patsubst %/,%,$(dir $(lastword $(wildcard $(foreach m,digits mnist,ncsn_fast/assets/$(m)/config.json))))))

demo: setup runs/demo                ## train for a minute, then sample: PNG grids in demo/
	$(PY) -m ncsn_fast.sample --model $(SHIPPED) --n 64 --method fast --out demo/shipped.png
	$(PY) -m ncsn_fast.sample --model runs/demo --n 64 --method cas --out demo/trained.png
	@echo "64 samples of the $(SHIPPED) model, which ships: $(CURDIR)/demo/shipped.png"
	@echo "64 samples of the run just trained: $(CURDIR)/demo/trained.png"

runs/demo: | $(READY)
	$(PY) -m ncsn_fast.train --name demo --steps 200

setup: $(READY)                      ## virtual environment with the package, its extension, and all tools

# torch first: the CPU wheel of a local pip folder if there is one, else what the index has.
$(READY): pyproject.toml setup.py CMakeLists.txt $(shell find csrc cmake -type f | grep -v ' ')
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --no-index --no-deps "torch==2.13.0" 2>/dev/null || true
	$(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q -e ".[dev]"
	@$(PY) -c "from ncsn_fast import ops; print('extension:', ops.available())"
	@touch $@

check: setup                         ## lint and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/write_results.py --check
	$(PY) tools/write_readme.py --check
	$(PY) tools/write_quality.py --check
	$(PY) tools/write_cards.py --check
	$(PY) tools/write_commands.py --check
	$(PY) tools/write_reliability.py --check
	$(PY) tools/write_tutorial.py --check

fmt: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# One process a core, one thread a process: OpenMP's threads of two processes would fight. Where a
# test asks for more, those that wait sleep, for a waiting loop would keep a core from another test.
SUITE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n auto --dist worksteal

test: setup                          ## the suite but for the tests marked slow: minutes on two cores
	$(SUITE) -m "not slow"

test-slow: setup                     ## the tests that make test leaves out
	$(SUITE) -m slow

test-all: setup                      ## the whole suite: README's commands, compilers, long statistics
	$(SUITE)

# A test marked slow does the same, so test-all includes it.
test-asan: setup                     ## the extension's tests under AddressSanitizer and UBSan
	$(PY) tools/sanitize.py

# The tests run a few hundred. It goes on where it was stopped: benchmarks/results/fuzz.json.
fuzz: setup                          ## a million damaged files (N=...), and everything that reads files
	OMP_NUM_THREADS=1 $(PY) tools/fuzz.py $(or $(N),1000000)

campaign: setup                      ## kills, threads and a soak; writes benchmarks/results/campaign.json
	OMP_NUM_THREADS=1 $(PY) tools/campaign.py

# On a machine whose Python has torch with CUDA already, without network: make gpu PY=python3
test-gpu: $(GPU_SETUP)               ## build for the GPU at hand, test and fuzz its kernels
	$(PY) tools/gpu_session.py test $(if $(OUT),--out "$(OUT)")

bench-gpu: $(GPU_SETUP)              ## build for the GPU at hand, measure: JSON and page in benchmarks/results/
	$(PY) tools/gpu_session.py bench $(if $(OUT),--out "$(OUT)")

gpu: $(GPU_SETUP)                    ## both, in less than ten minutes; measures even if a test fails
	$(PY) tools/gpu_session.py $(if $(OUT),--out "$(OUT)")

rehearse-gpu: $(GPU_SETUP)           ## the same plan on the CPU, with tiny sizes
	$(PY) tools/gpu_session.py --rehearse

bench: setup                         ## every benchmark, half an hour or more; then their tables and plot
	mkdir -p build
	$(PY) -m pytest benchmarks/ --benchmark-only --benchmark-json=build/bench.json
	$(PY) tools/write_results.py build/bench.json
	$(PY) tools/write_readme.py

# As on a processor without AVX-512: the levels of our kernels, of oneDNN (PyTorch's and OpenVINO's) and
# of PyTorch's own kernels. Nothing limits ONNX Runtime and torch.compile, so they stay away, as do the
# others' bfloat16, which is slower than their float32 there.
AVX2 := NCSN_FAST_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

bench-avx2: setup                    ## the networks with AVX2 forced, in ten minutes; then their tables
	mkdir -p build
	$(AVX2) $(PY) -m pytest benchmarks/bench_network.py benchmarks/bench_unet.py --benchmark-only \
		-k "(cifar10-b1 or cifar10-b8 or unet) and not ort and not inductor and not direct and not eager-bf16 and not openvino-bf16" --no-peak-memory \
		--benchmark-json=build/bench-avx2.json
	$(PY) tools/write_results.py build/bench-avx2.json

docs: setup                          ## the site, into build/site/; a broken link or name fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

wheel: setup                         ## a wheel of this Python without CUDA, repaired, into dist/wheels/
	$(PY) tools/build_wheel.py

package: setup                       ## sdist and wheel, built in isolation, into dist/
	rm -rf dist
	$(PY) -m build
	$(PY) tools/check_wheel.py dist/*.whl

clean:
	rm -rf build dist $(VENV) *.egg-info ncsn_fast/_C*.so
