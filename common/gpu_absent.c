#include "common/gpu.h"

#include <stdio.h>

bool kl_gpu_compiled(void) { return false; }
bool kl_gpu_emulated(void) { return false; }
bool kl_gpu_launched(int i, const char **name, size_t *shared) { return (void)i, *name = NULL, *shared = 0, false; }
void kl_gpu_emulate(int capability, size_t memory, bool runs) { (void)capability, (void)memory, (void)runs; }
int kl_gpu_count(void) { return 0; }
const char *kl_gpu_toolkit(void) { return "none"; }

void kl_gpu_describe(int index, char *text, size_t size)
{
    snprintf(text, size, "device %d: built without a CUDA toolkit", index);
}

kl_status kl_gpu_check(int index)
{
    return kl_error(KL_EDEVICE, "device: cuda:%d was asked for, but this build has no CUDA side (no nvcc when it was built); use --device cpu", index);
}

/* No context for a device is ever created in this build, so nothing below is reached with one. */
static kl_status absent(void) { return kl_gpu_check(0); }

int kl_gpu_multiprocessors(const kl_ctx *ctx) { return (void)ctx, 0; }
kl_status kl_gpu_open(kl_ctx *ctx) { return (void)ctx, absent(); }
void kl_gpu_close(kl_ctx *ctx) { (void)ctx; }
kl_status kl_gpu_alloc(const kl_ctx *ctx, void **memory, size_t bytes) { return (void)ctx, (void)bytes, *memory = NULL, absent(); }
void kl_gpu_free(const kl_ctx *ctx, void *memory) { (void)ctx, (void)memory; }
kl_status kl_gpu_memory(const kl_ctx *ctx, size_t *left, size_t *total) { return (void)ctx, *left = *total = 0, absent(); }
kl_status kl_gpu_copy(const kl_ctx *ctx, void *dst, const void *src, size_t bytes) { return (void)ctx, (void)dst, (void)src, (void)bytes, absent(); }
kl_status kl_gpu_move(const kl_ctx *ctx, void *dst, const void *src, size_t bytes) { return (void)ctx, (void)dst, (void)src, (void)bytes, absent(); }
kl_status kl_gpu_fill(const kl_ctx *ctx, void *dst, int byte, size_t bytes) { return (void)ctx, (void)dst, (void)byte, (void)bytes, absent(); }
kl_status kl_gpu_sync(const kl_ctx *ctx) { return (void)ctx, absent(); }
kl_status kl_gpu_clock_create(const kl_ctx *ctx, kl_gpu_clock **clock) { return (void)ctx, *clock = NULL, absent(); }
void kl_gpu_clock_destroy(kl_gpu_clock *clock) { (void)clock; }
kl_status kl_gpu_clock_start(const kl_ctx *ctx, kl_gpu_clock *clock) { return (void)ctx, (void)clock, absent(); }
kl_status kl_gpu_clock_stop(const kl_ctx *ctx, kl_gpu_clock *clock, double *seconds) { return (void)ctx, (void)clock, *seconds = 0.0, absent(); }
kl_status kl_gpu_graph_begin(const kl_ctx *ctx) { return (void)ctx, absent(); }
kl_status kl_gpu_graph_end(const kl_ctx *ctx, kl_gpu_graph **graph) { return (void)ctx, *graph = NULL, absent(); }
kl_status kl_gpu_graph_launch(const kl_ctx *ctx, kl_gpu_graph *graph) { return (void)ctx, (void)graph, absent(); }
void kl_gpu_graph_destroy(kl_gpu_graph *graph) { (void)graph; }
kl_status kl_gpu_product(kl_ctx *ctx, const kl_product *shape, float alpha, const void *a, const void *b, float beta, const void *c,
                         void *y, void *workspace, size_t bytes)
{
    return (void)ctx, (void)shape, (void)alpha, (void)a, (void)b, (void)beta, (void)c, (void)y, (void)workspace, (void)bytes, absent();
}
void kl_gpu_products_close(kl_ctx *ctx) { (void)ctx; }
size_t kl_gpu_sort_workspace(const kl_ctx *ctx, int64_t n, int bits) { return (void)ctx, (void)n, (void)bits, 0; }
kl_status kl_gpu_sort(kl_ctx *ctx, int64_t n, int bits, const uint32_t *keys, uint32_t *sorted, const int32_t *values, int32_t *order,
                      void *workspace, size_t bytes)
{
    return (void)ctx, (void)n, (void)bits, (void)keys, (void)sorted, (void)values, (void)order, (void)workspace, (void)bytes, absent();
}
void kl_gpu_range_push(const char *name) { (void)name; }
void kl_gpu_range_pop(void) {}
