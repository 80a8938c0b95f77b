#include <stdlib.h>
#include <string.h>

#include "common/parallel.h"
#include "harness/cpu/ops_cpu.h"

enum { ADD_BLOCK = 1 << 14 };

kl_status cpu_alloc(kl_ctx *ctx, void **p, size_t bytes)
{
    (void)ctx;
    KL_REQUIRE(p, "alloc: p: expected a place for the pointer, got NULL");
    *p = NULL;
    if (bytes <= SIZE_MAX - 127)
        *p = aligned_alloc(64, (bytes + (bytes == 0) + 63) & ~(size_t)63);
    if (!*p)
        return kl_error(KL_ENOMEM, "alloc: out of memory for %zu bytes", bytes);
    return kl_ok();
}

void cpu_release(kl_ctx *ctx, void *p)
{
    (void)ctx;
    free(p);
}

kl_status cpu_copy(kl_ctx *ctx, void *dst, const void *src, size_t bytes)
{
    (void)ctx;
    if (bytes == 0)
        return kl_ok();
    KL_REQUIRE(dst && src, "copy: %s: expected %zu bytes, got NULL", dst ? "src" : "dst", bytes);
    memmove(dst, src, bytes);
    return kl_ok();
}

kl_status cpu_zero(kl_ctx *ctx, void *p, size_t bytes)
{
    (void)ctx;
    if (bytes == 0)
        return kl_ok();
    KL_REQUIRE(p, "zero: p: expected %zu bytes, got NULL", bytes);
    memset(p, 0, bytes);
    return kl_ok();
}

kl_status cpu_add(kl_ctx *ctx, float *y, const float *x, size_t n)
{
    KL_TRY(check_tokens("add", ctx, 0));
    if (n == 0)
        return kl_ok();
    KL_REQUIRE(y && x, "add: %s: expected %zu floats, got NULL", y ? "x" : "y", n);
    size_t blocks = (n + ADD_BLOCK - 1) / ADD_BLOCK;
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (blocks > 4)
    for (size_t b = 0; b < blocks; b++) {
        size_t end = (b + 1) * ADD_BLOCK < n ? (b + 1) * ADD_BLOCK : n;
        for (size_t i = b * ADD_BLOCK; i < end; i++)
            y[i] += x[i];
    }
    return kl_ok();
}
