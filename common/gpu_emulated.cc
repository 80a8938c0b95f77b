/* The device that common/emulate.h plays: host memory, everything done when it is asked for. For tests. */
#include "common/gpu.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/timer.h"

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
    return index == 0 ? kl_ok() : kl_error(KL_EDEVICE, "device: expected an index below 1, got cuda:%d", index);
}

int kl_gpu_multiprocessors(const kl_ctx *) { return 132; }
kl_status kl_gpu_open(kl_ctx *) { return kl_ok(); }
void kl_gpu_close(kl_ctx *) {}

kl_status kl_gpu_alloc(const kl_ctx *, void **memory, size_t bytes)
{
    *memory = bytes > SIZE_MAX - 256 ? NULL : aligned_alloc(256, (bytes + 256) / 256 * 256);
    return *memory ? kl_ok() : kl_error(KL_ENOMEM, "device memory: expected room for %zu bytes", bytes);
}

void kl_gpu_free(const kl_ctx *, void *memory) { free(memory); }

kl_status kl_gpu_memory(const kl_ctx *, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = (size_t)4 << 30;
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
