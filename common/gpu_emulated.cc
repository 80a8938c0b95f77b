/* The device that common/emulate.h plays: host memory, everything done when it is asked for. For tests. */
#include "common/gpu.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "common/device.cuh"
#include "common/timer.h"

/* The device that is played, and what of its memory is taken. */
static int capability = 90;
static size_t memory = (size_t)8 << 30;
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

/* As a build with CUDA_ARCHS="90a 80". */
static kl_status check_capability(int index, bool *hopper)
{
    static const int archs[] = {800, 900};
    return kl_gpu_check_capability(index, capability, archs, 2, hopper);
}

kl_status kl_gpu_check(int index)
{
    if (index != 0)
        return kl_error(KL_EDEVICE, "device: expected an index below 1, got cuda:%d", index);
    bool hopper;
    return check_capability(index, &hopper);
}

int kl_gpu_multiprocessors(const kl_ctx *) { return 9; }
/* As devices have it: 163 KB a block on 8.0, 99 KB on most others, 227 KB on 9.0 and 10.0. */
kl_status kl_gpu_open(kl_ctx *ctx)
{
    ctx->shared_most = (size_t)(capability == 80 ? 163 : capability < 90 || capability >= 120 ? 99 : 227) << 10;
    return check_capability(ctx->device_index, &ctx->hopper);
}
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

/* What cuBLASLt does elsewhere, element by element, the sums in float. */
kl_status kl_gpu_product(kl_ctx *ctx, const kl_product *p, float alpha, const void *a, const void *b, float beta, const void *c, void *y,
                         void *memory, size_t bytes)
{
    size_t size = kl_dtype_size(p->y_dtype);
    if (p->scattered) {
        kl_product one = *p;
        one.count = 0;
        one.scattered = false;
        for (int64_t i = 0; i < p->count; i++)
            kl_gpu_product(ctx, &one, alpha, ((const void *const *)a)[i], ((const void *const *)b)[i], 0.0f, NULL, ((void *const *)y)[i], memory, bytes);
        return kl_ok();
    }
    if (p->count > 1) {
        kl_product one = *p;
        one.count = 1;
        for (int64_t i = 0; i < p->count; i++)
            kl_gpu_product(ctx, &one, alpha, (const uint16_t *)a + i * p->a_next, (const uint16_t *)b + i * p->b_next, beta,
                           (const char *)c + (size_t)(i * p->y_next) * size, (char *)y + (size_t)(i * p->y_next) * size, memory, bytes);
        return kl_ok();
    }
    const uint16_t *left = (const uint16_t *)a, *right = (const uint16_t *)b;
    for (int64_t m = 0; m < p->M; m++)
        for (int64_t n = 0; n < p->N; n++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < p->K; k++)
                sum += kl_bf16_to_f32(left[p->a_transposed ? k * p->a_stride + m : m * p->a_stride + k]) *
                       kl_bf16_to_f32(right[p->b_transposed ? n * p->b_stride + k : k * p->b_stride + n]);
            int64_t at = m * p->y_stride + n;
            sum *= alpha;
            if (p->y_dtype == KL_F32)
                ((float *)y)[at] = sum + (beta != 0.0f ? beta * ((const float *)c)[at] : 0.0f);
            else
                ((uint16_t *)y)[at] = kl_f32_to_bf16(sum + (beta != 0.0f ? beta * kl_bf16_to_f32(((const uint16_t *)c)[at]) : 0.0f));
        }
    return kl_ok();
}
void kl_gpu_products_close(kl_ctx *) {}

size_t kl_gpu_sort_workspace(const kl_ctx *, int64_t, int) { return 0; }
kl_status kl_gpu_sort(kl_ctx *, int64_t n, int, const uint32_t *keys, uint32_t *sorted, const int32_t *values, int32_t *order, void *, size_t)
{
    std::vector<int64_t> at((size_t)n);
    std::iota(at.begin(), at.end(), (int64_t)0);
    std::stable_sort(at.begin(), at.end(), [=](int64_t i, int64_t j) { return keys[i] < keys[j]; });
    for (int64_t i = 0; i < n; i++) {
        sorted[i] = keys[at[(size_t)i]];
        order[i] = values[at[(size_t)i]];
    }
    return kl_ok();
}

void kl_gpu_range_push(const char *) {}
void kl_gpu_range_pop(void) {}
