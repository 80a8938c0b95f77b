/* The device that common/emulate.h plays: host memory, everything done when it is asked for. For tests. */
#include "common/gpu.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/device.cuh"
#include "common/timer.h"

/* The device that is played, and what of its memory is taken. */
static int capability = 90;
static size_t memory = (size_t)4 << 30;
static std::atomic<size_t> taken;

void kl_gpu_emulate(int as_capability, size_t as_memory, bool runs)
{
    capability = as_capability;
    memory = as_memory;
    kl_emulated_runs = runs;
}

struct kl_gpu_clock {
    double start;
};
struct kl_gpu_graph {
    int unused;
};

bool kl_gpu_compiled(void) { return true; }
bool kl_gpu_emulated(void) { return true; }
int kl_gpu_count(void) { return 1; }
const char *kl_gpu_toolkit(void) { return "emulated"; }
void kl_gpu_describe(int, char *text, size_t size) { snprintf(text, size, "emulated on the host"); }

kl_status kl_gpu_check(int index)
{
    if (index != 0)
        return kl_error(KL_EDEVICE, "device: expected an index below 1, got cuda:%d", index);
    return kl_gpu_check_capability(index, capability);
}

int kl_gpu_multiprocessors(const kl_ctx *) { return 9; }
kl_status kl_gpu_open(kl_ctx *) { return kl_ok(); }
void kl_gpu_close(kl_ctx *) {}

/* The size before every piece of memory, a guard behind it; the address sanitizer keeps kernels out of both. */
enum { BEFORE = 256, GUARD = 256 };

kl_status kl_gpu_alloc(const kl_ctx *, void **out, size_t bytes)
{
    *out = NULL;
    size_t room = (bytes / 256 + 1) * 256 + BEFORE + GUARD;
    unsigned char *block = bytes > memory - taken ? NULL : (unsigned char *)aligned_alloc(256, room);
    if (!block)
        return kl_error(KL_ENOMEM, "device memory: expected room for %zu bytes, %zu of %zu are free", bytes, memory - taken, memory);
    taken += bytes;
    memcpy(block, &bytes, sizeof bytes);
    memset(block + BEFORE + bytes, 0xa5, GUARD);
    *out = block + BEFORE;
    KL_POISON(block, BEFORE);
    KL_POISON(block + BEFORE + bytes, room - BEFORE - bytes);
    return kl_ok();
}

void kl_gpu_free(const kl_ctx *, void *out)
{
    if (!out)
        return;
    unsigned char *block = (unsigned char *)out - BEFORE;
    size_t bytes;
    KL_UNPOISON(block, BEFORE);
    memcpy(&bytes, block, sizeof bytes);
    KL_UNPOISON(block, (bytes / 256 + 1) * 256 + BEFORE + GUARD);
    for (int i = 0; i < GUARD; i++)
        if (block[BEFORE + bytes + (size_t)i] != 0xa5) {
            fprintf(stderr, "emulated device: a kernel wrote beyond a piece of memory of %zu bytes\n", bytes);
            abort();
        }
    taken -= bytes;
    free(block);
}

kl_status kl_gpu_memory(const kl_ctx *, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = memory - taken;
    *total_bytes = memory;
    return kl_ok();
}

kl_status kl_gpu_copy(const kl_ctx *, void *dst, const void *src, size_t bytes)
{
    if (bytes)
        memcpy(dst, src, bytes);
    return kl_ok();
}

kl_status kl_gpu_move(const kl_ctx *ctx, void *dst, const void *src, size_t bytes) { return kl_gpu_copy(ctx, dst, src, bytes); }

kl_status kl_gpu_fill(const kl_ctx *, void *dst, int byte, size_t bytes)
{
    if (bytes)
        memset(dst, byte, bytes);
    return kl_ok();
}

kl_status kl_gpu_sync(const kl_ctx *) { return kl_ok(); }

kl_status kl_gpu_clock_create(const kl_ctx *, kl_gpu_clock **clock)
{
    *clock = new (std::nothrow) kl_gpu_clock();
    return *clock ? kl_ok() : kl_error(KL_ENOMEM, "clock: out of memory");
}

void kl_gpu_clock_destroy(kl_gpu_clock *clock) { delete clock; }

kl_status kl_gpu_clock_start(const kl_ctx *, kl_gpu_clock *clock)
{
    clock->start = kl_now();
    return kl_ok();
}

kl_status kl_gpu_clock_stop(const kl_ctx *, kl_gpu_clock *clock, double *seconds)
{
    *seconds = kl_now() - clock->start;
    return kl_ok();
}

static kl_status no_graphs(void) { return kl_error(KL_EUNSUPPORTED, "graph: an emulated device records none"); }
kl_status kl_gpu_graph_begin(const kl_ctx *) { return no_graphs(); }
kl_status kl_gpu_graph_end(const kl_ctx *, kl_gpu_graph **graph) { return *graph = NULL, no_graphs(); }
kl_status kl_gpu_graph_launch(const kl_ctx *, kl_gpu_graph *) { return no_graphs(); }
void kl_gpu_graph_destroy(kl_gpu_graph *graph) { delete graph; }

kl_status kl_gpu_product_create(const kl_ctx *, kl_gpu_product **product, int64_t)
{
    *product = NULL;
    return kl_error(KL_EUNSUPPORTED, "product: an emulated device has no library");
}
kl_status kl_gpu_product_run(const kl_ctx *, const kl_gpu_product *, void *, const void *, const void *) { return kl_ok(); }
void kl_gpu_product_destroy(const kl_ctx *, kl_gpu_product *) {}

void kl_gpu_range_push(const char *) {}
void kl_gpu_range_pop(void) {}
