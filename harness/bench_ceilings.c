#include <stdlib.h>
#include <string.h>

#include "common/blas.h"
#include "common/parallel.h"
#include "common/rng.h"
#include "common/simd.h"
#include "harness/bench.h"

enum { STREAM_BYTES = 256 << 20, TILE = 1 << 18, GEMM = 1024, RUNS = 5 };

static void copy_all(const kl_ctx *ctx, char *dst, const char *src)
{
#pragma omp parallel for num_threads(ctx->threads) schedule(static)
    for (int64_t t = 0; t < STREAM_BYTES / TILE; t++)
        memcpy(dst + t * TILE, src + t * TILE, TILE);
}

/* The sum keeps the reads from being dropped. */
static float read_all(const kl_ctx *ctx, const char *src)
{
    float total = 0.0f;
#pragma omp parallel for num_threads(ctx->threads) schedule(static) reduction(+ : total)
    for (int64_t t = 0; t < STREAM_BYTES / TILE; t++) {
        const float *x = (const float *)(src + t * TILE);
        kl_v sum[8] = {{0}};
        for (int64_t i = 0; i < TILE / 4; i += 8 * KL_LANES)
            for (int j = 0; j < 8; j++)
                sum[j] += kl_vload(x + i + j * KL_LANES);
        total += kl_vsum(sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7]);
    }
    return total;
}

static void measure_streams(const kl_ctx *ctx, char *a, char *b, kl_ceilings *c)
{
    double copy[RUNS], read[RUNS];
    volatile float sink;
#pragma omp parallel for num_threads(ctx->threads) schedule(static)
    for (int64_t t = 0; t < STREAM_BYTES / TILE; t++)
        memset(a + t * TILE, 0, TILE);
    copy_all(ctx, b, a);
    for (int i = 0; i < RUNS; i++) {
        double start = kl_now();
        copy_all(ctx, b, a);
        copy[i] = kl_now() - start;
        start = kl_now();
        sink = read_all(ctx, b);
        read[i] = kl_now() - start;
    }
    (void)sink;
    c->copy_gbps = 2e-9 * STREAM_BYTES / kl_spread_of(copy, RUNS).min;
    c->read_gbps = 1e-9 * STREAM_BYTES / kl_spread_of(read, RUNS).min;
}

static void measure_gemm(const kl_ctx *ctx, float *a, kl_ceilings *c)
{
    double seconds[RUNS];
    float *b = a + GEMM * GEMM, *y = b + GEMM * GEMM;
    kl_rng r = kl_rng_make(1, 0);
    kl_fill_normal(&r, a, 2 * (size_t)GEMM * GEMM, 0.0f, 1.0f);
    kl_gemm(ctx, KL_N, KL_N, GEMM, GEMM, GEMM, 1.0f, a, GEMM, b, GEMM, 0.0f, y, GEMM);
    for (int i = 0; i < RUNS; i++) {
        double start = kl_now();
        kl_gemm(ctx, KL_N, KL_N, GEMM, GEMM, GEMM, 1.0f, a, GEMM, b, GEMM, 0.0f, y, GEMM);
        seconds[i] = kl_now() - start;
    }
    c->gemm_tflops = 2e-12 * GEMM * GEMM * (double)GEMM / kl_spread_of(seconds, RUNS).min;
}

kl_status kl_ceilings_measure(kl_ctx *ctx, kl_ceilings *c)
{
    if (ctx->device == KL_CUDA)
        return kl_ceilings_measure_device(ctx, c);
    char *a = aligned_alloc(64, STREAM_BYTES), *b = aligned_alloc(64, STREAM_BYTES);
    if (a && b) {
        measure_streams(ctx, a, b, c);
        measure_gemm(ctx, (float *)(void *)a, c);
    }
    bool done = a && b;
    free(a);
    free(b);
    return done ? kl_ok() : kl_error(KL_ENOMEM, "ceilings: out of memory");
}
