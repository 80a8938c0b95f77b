# make help says what there is. Everything is built under $(BUILD); nothing is written elsewhere.
VERSION := 0.1.0
SAN     ?= 0
DEBUG   ?= 0
ARCH    ?= native
PREFIX  ?= /usr/local
EMULATE ?= 0
BUILD   ?= build$(if $(filter 1,$(SAN)),-san)$(if $(filter 1,$(DEBUG)),-debug)$(if $(filter 1,$(EMULATE)),-emulate)
V       ?= 0
Q       := $(if $(filter 1,$(V)),,@)
MAKEFLAGS += --no-builtin-rules
, := ,

# gcc 12 or newer, or CC=clang
ifeq ($(origin CC),default)
CC := gcc
endif
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
CUDA ?= $(if $(NVCC),1,0)
ifneq ($(filter 1,$(SAN) $(EMULATE)),)
override CUDA := 0
endif

LIBS     := libcjson libpcre2-8 openblas
DEP_CFLAGS = $(shell pkg-config --cflags $(LIBS) 2>/dev/null)
DEP_LIBS   = $(shell pkg-config --libs $(LIBS) 2>/dev/null || echo -lcjson -lpcre2-8 -lopenblas)

WARN    := -Wall -Wextra -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wno-unknown-pragmas
OPT     := -O3
ifeq ($(DEBUG),1)
OPT     := -O0
endif
ifeq ($(SAN),1)
OPT     := -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
endif
COMMIT  := $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
DIRTY   := $(shell git status --porcelain 2>/dev/null | grep -q . && echo 1 || echo 0)
CFLAGS  ?=
override CFLAGS += -std=gnu11 -g $(OPT) -march=$(ARCH) -fopenmp -fPIC -fno-math-errno $(WARN) -I.
CXX     := g++
CXXFLAGS := -std=c++17 -g $(subst -O3,-O2,$(OPT)) -march=$(ARCH) -fopenmp -fPIC -fno-math-errno -DKL_EMULATE -Wall -Wextra -Wno-unknown-pragmas -I.
NVFLAGS := -std=c++17 -O3 -lineinfo -Xptxas -v -cudart static -I. -Xcompiler -fPIC,-Wall
# 90a: machine code with Hopper's own instructions. 80 (any other): PTX without them, for that device and every newer one; of
# what needs Hopper in any case there is none. Like ARCH, for the devices of this machine; without any, for all.
ifeq ($(CUDA)$(origin CUDA_ARCHS),1undefined)
DEVICES    := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9]*\.[0-9]*$$')
CUDA_ARCHS := $(or $(strip $(if $(filter 9.0,$(DEVICES)),90a) $(if $(filter-out 9.0,$(DEVICES)),80)),90a 80)
endif
HOPPER     := -gencode arch=compute_90a$(,)code=sm_90a
PLAIN      := $(foreach a,$(filter-out 90a,$(CUDA_ARCHS)),-gencode arch=compute_$a$(,)code=compute_$a)
nvarch      = $(if $(filter mla/% moe/% tests/% kda/cuda/fused.cu,$1),$(HOPPER),$(if $(filter 90a,$(CUDA_ARCHS)),$(HOPPER)) $(PLAIN))
LDLIBS   = $(DEP_LIBS) -fopenmp -lm
ifeq ($(CUDA),1)
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
LDLIBS  += -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt -lpthread -lstdc++
endif

C_SRC   := $(wildcard common/*.c reference/*.c kda/*.c kda/cpu/*.c mla/*.c mla/cpu/*.c moe/*.c moe/cpu/*.c harness/*.c harness/cpu/*.c)
C_SRC   := $(filter-out harness/main.c,$(C_SRC))
CU_SRC  := $(wildcard common/*.cu kda/cuda/*.cu mla/cuda/*.cu moe/cuda/*.cu harness/cuda/*.cu)
ifeq ($(CUDA),1)
C_SRC   := $(filter-out %_absent.c,$(C_SRC))
else ifeq ($(EMULATE),1)
C_SRC   := $(filter-out %_absent.c,$(C_SRC))
CU_SRC  := $(filter-out common/gpu%,$(CU_SRC)) common/emulate.cc common/gpu_emulated.cc
LDLIBS  += -lstdc++
else
CU_SRC  :=
endif
ifneq ($(CU_SRC),)
override CFLAGS += -DKL_HAVE_CUDA
endif
# SHARE=dir: what does not ask for KL_HAVE_CUDA, itself or by a macro, is taken from that build
SHARE   ?= $(BUILD)
OWN_SRC := $(if $(filter-out $(SHARE),$(BUILD)),$(shell grep -lE "KL_HAVE_CUDA|KDA_ON_DEVICE" $(C_SRC)),$(C_SRC))
OBJ     := $(OWN_SRC:%.c=$(BUILD)/obj/%.o) $(patsubst %.c,$(SHARE)/obj/%.o,$(filter-out $(OWN_SRC),$(C_SRC))) $(CU_SRC:%=$(BUILD)/obj/%.o)
# Tests with kernels of their own need a compiler for them.
CU_TESTS := $(patsubst tests/%.cu,$(BUILD)/tests/%,$(wildcard tests/test_*.cu))
TESTS   := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c)) $(if $(CU_SRC),$(CU_TESTS))
# Those that ask for a device; they run on an emulated one too.
DEVICE_TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(shell grep -lE '"(common/gpu|tests/(device|device_case|mirror|around_support))\.h"' tests/test_*.c)) $(CU_TESTS)
FUZZERS := $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))
PUBLIC  := $(filter-out %internal.h common/emulate.h common/emulate_tensor.h,$(wildcard common/*.h kda/*.h mla/*.h moe/*.h harness/*.h))

.PHONY: all help report deps demo test fuzz install clean checklibs
all: checklibs $(BUILD)/kl $(BUILD)/libkl.so $(BUILD)/kl.pc report

help:
	@echo "make            build $(BUILD)/kl, libkl.a, libkl.so, and print what this machine offers"
	@echo "make demo       install what is missing, build (without kernels where no GPU is), verify every kernel family, generate text"
	@echo "make test       the test suite; SAN=1: under the address and undefined-behaviour sanitizers"
	@echo "make fuzz       libFuzzer on every file format, FUZZ_SECONDS=20 each (needs clang)"
	@echo "make install    headers, libraries, kl.pc and kl under PREFIX=/usr/local (DESTDIR honoured)"
	@echo "make deps       install the Debian packages that are missing"
	@echo "make clean      remove $(BUILD)"
	@echo "switches        ARCH=native|x86-64-v3|..., CC=gcc|clang, CUDA=0|1, CUDA_ARCHS=\"90a 80\" (the GPUs here, or both), EMULATE=1 (GPU kernels on the host, for tests), DEBUG=1, SAN=1, BUILD=dir, V=1"

checklibs:
	@command -v $(CC) >/dev/null || { echo "make: no C compiler '$(CC)': run 'make deps'"; exit 1; }
	@pkg-config --exists $(LIBS) 2>/dev/null || { echo "make: libraries missing (one of: $(LIBS)): run 'make deps'"; exit 1; }

$(BUILD)/obj/%.o: %.c
	@mkdir -p $(@D)
	@$(if $(Q),echo "  cc    $<")
	$(Q)$(CC) $(CFLAGS) $(DEP_CFLAGS) -MMD -MP -c $< -o $@

ifeq ($(EMULATE),1)
$(BUILD)/obj/%.cu.o: %.cu
	@mkdir -p $(@D)
	@$(if $(Q),echo "  c++   $<")
	$(Q)$(CXX) -x c++ $(CXXFLAGS) -MMD -MP -MF $(@:.o=.d) -c $< -o $@
$(BUILD)/obj/%.cc.o: %.cc
	@mkdir -p $(@D)
	@$(if $(Q),echo "  c++   $<")
	$(Q)$(CXX) $(CXXFLAGS) -MMD -MP -MF $(@:.o=.d) -c $< -o $@
else
# What the compiler says of each kernel's registers and spills is kept beside the object, for tests/test_kernels.c.
$(BUILD)/obj/%.cu.o: %.cu
	@mkdir -p $(@D)
	@$(if $(Q),echo "  nvcc  $<")
	$(Q)$(NVCC) $(NVFLAGS) $(call nvarch,$<) -MMD -MF $(@:.o=.d) -c $< -o $@ 2>$(@:.o=.report) || { cat $(@:.o=.report); exit 1; }
	@grep -v '^ptxas info\|bytes stack frame' $(@:.o=.report) || true
endif

# The build's own identity: rewritten only when it changes.
$(BUILD)/build_info.h: FORCE
	@mkdir -p $(@D)
	@printf '#define KL_VERSION "%s"\n#define KL_COMMIT "%s"\n#define KL_DIRTY %s\n#define KL_COMPILER "%s"\n#define KL_ARCH "%s"\n' \
		'$(VERSION)' '$(COMMIT)' '$(DIRTY)' "$$($(CC) --version 2>/dev/null | head -1 | tr -d '\"')" '$(ARCH)' > $@.tmp
	@cmp -s $@.tmp $@ && rm $@.tmp || mv $@.tmp $@
FORCE:
$(BUILD)/obj/harness/report.o: $(BUILD)/build_info.h
$(BUILD)/obj/harness/report.o: override CFLAGS += -I$(BUILD)

$(BUILD)/libkl.a: $(OBJ)
	@rm -f $@
	$(Q)ar rcs $@ $^

$(BUILD)/libkl.so: $(OBJ)
	$(Q)$(CC) $(CFLAGS) -shared -Wl,-soname,libkl.so.0 -o $@ $^ $(LDLIBS)
	@ln -sf libkl.so $(BUILD)/libkl.so.0

$(BUILD)/kl: $(SHARE)/obj/harness/main.o $(BUILD)/libkl.a
	$(Q)$(CC) $(CFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/kl.pc: Makefile
	@printf 'prefix=%s\nlibdir=$${prefix}/lib\nincludedir=$${prefix}/include/kl\n\nName: kl\nDescription: Kimi Linear kernel toolkit\nVersion: %s\nRequires.private: %s\nLibs: -L$${libdir} -lkl\nLibs.private: -fopenmp -lm\nCflags: -I$${includedir}\n' \
		'$(PREFIX)' '$(VERSION)' '$(LIBS)' > $@

report: $(BUILD)/kl
	@echo
	@echo "kl $(VERSION) ($(COMMIT)$(if $(filter 1,$(DIRTY)), with local changes))"
	@echo "  compiler  $$($(CC) --version | head -1), -march=$(ARCH)"
	@echo "  BLAS      OpenBLAS $$(pkg-config --modversion openblas)"
	@echo "  CUDA      $(if $(filter 1,$(CUDA)),yes: $$($(NVCC) --version | sed -n 's/.*release \([0-9.]*\).*/toolkit \1/p'),no: nvcc was not found or CUDA=0; the CPU side is complete without it)"
	@echo "  GPU       $$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | grep . || echo 'none found')"
	@echo "  built     $(BUILD)/kl, $(BUILD)/libkl.a, $(BUILD)/libkl.so"

# ---- tests ----
$(BUILD)/tests/%: tests/%.c $(BUILD)/libkl.a
	@mkdir -p $(@D)
	@$(if $(Q),echo "  test  $<")
	$(Q)$(CC) $(CFLAGS) $(DEP_CFLAGS) -MMD -MP -MF $@.d -o $@ $< $(BUILD)/libkl.a -lcmocka $(LDLIBS)

$(CU_TESTS): $(BUILD)/tests/%: $(BUILD)/obj/tests/%.cu.o $(BUILD)/libkl.a
	@mkdir -p $(@D)
	$(Q)$(CC) $(CFLAGS) $(DEP_CFLAGS) -o $@ $^ -lcmocka $(LDLIBS)

EMULATED := $(if $(filter 1,$(EMULATE)),,$(BUILD)/emulated)
test: checklibs $(BUILD)/kl $(BUILD)/libkl.so $(BUILD)/kl.pc $(TESTS)
	$(Q)$(if $(EMULATED),$(MAKE) --no-print-directory EMULATE=1 SHARE=$(BUILD) BUILD=$(EMULATED) device_tests)
	@BUILD=$(BUILD) SAN=$(SAN) CC=$(CC) sh tests/run.sh $(TESTS) $(if $(EMULATED),$(DEVICE_TESTS:$(BUILD)/%=$(EMULATED)/%))

.PHONY: device_tests
device_tests: $(DEVICE_TESTS)

# Only what reads files is instrumented: the kernels would take minutes to compile and no input reaches them.
FUZZ_SECONDS ?= 20
FUZZ_SAN     := -fsanitize=address,undefined -fno-sanitize-recover=all
fuzz:
	$(Q)$(MAKE) --no-print-directory BUILD=build-fuzz CC=clang CUDA=0 fuzzers
	@BUILD=build-fuzz sh tests/fuzz/run.sh $(FUZZ_SECONDS) $(patsubst $(BUILD)/%,build-fuzz/%,$(FUZZERS))

.PHONY: fuzzers
ifneq ($(filter fuzzers,$(MAKECMDGOALS)),)
OPT := -O1 -Wno-pass-failed
$(BUILD)/obj/harness/%.o: override CFLAGS += $(FUZZ_SAN) -fsanitize=fuzzer-no-link
endif
fuzzers: $(FUZZERS)
$(BUILD)/fuzz/%: tests/fuzz/%.c $(BUILD)/libkl.a
	@mkdir -p $(@D)
	@$(if $(Q),echo "  fuzz  $<")
	$(Q)$(CC) $(CFLAGS) $(DEP_CFLAGS) $(FUZZ_SAN) -fsanitize=fuzzer -o $@ $< $(BUILD)/libkl.a $(LDLIBS)

# ---- installing ----
PACKAGES := gcc g++ make git pkg-config libcjson-dev libpcre2-dev libopenblas-dev libcmocka-dev gnuplot-nox
deps:
	@missing=; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then echo "deps: nothing is missing"; exit 0; fi; \
	run=; [ "$$(id -u)" = 0 ] || run=sudo; \
	if ! command -v apt-get >/dev/null || { [ -n "$$run" ] && ! sudo -n true 2>/dev/null; }; then \
		echo "deps: missing:$$missing"; echo "deps: run: sudo apt-get update && sudo apt-get install -y$$missing"; exit 1; fi; \
	echo "deps: installing$$missing"; \
	$$run apt-get update -qq && $$run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null

install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 755 $(BUILD)/kl $(DESTDIR)$(PREFIX)/bin/kl
	install -m 644 $(BUILD)/libkl.a $(DESTDIR)$(PREFIX)/lib/libkl.a
	install -m 755 $(BUILD)/libkl.so $(DESTDIR)$(PREFIX)/lib/libkl.so.$(VERSION)
	ln -sf libkl.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libkl.so.0
	ln -sf libkl.so.0 $(DESTDIR)$(PREFIX)/lib/libkl.so
	sed 's|^prefix=.*|prefix=$(PREFIX)|' $(BUILD)/kl.pc > $(DESTDIR)$(PREFIX)/lib/pkgconfig/kl.pc
	for h in $(PUBLIC); do install -D -m 644 $$h $(DESTDIR)$(PREFIX)/include/kl/$$h; done

# Without a GPU there is nothing to run kernels on, and compiling them takes minutes.
ifneq ($(DEVICES),)
demo: deps
	$(Q)$(MAKE) --no-print-directory all
	@sh experiments/demo.sh $(BUILD)/kl
else
demo: deps
	$(Q)$(MAKE) --no-print-directory all CUDA=0 BUILD=build-cpu
	@sh experiments/demo.sh build-cpu/kl
endif

clean:
	rm -rf $(BUILD)

-include $(OBJ:.o=.d) $(BUILD)/obj/harness/main.d $(TESTS:=.d) $(CU_TESTS:$(BUILD)/%=$(BUILD)/obj/%.cu.d)
