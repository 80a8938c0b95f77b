/* What the tests of the operations around the recurrence share: each is run on the CPU, and again on a device or its emulation. Include
 * after cmocka.h. */
#ifndef TESTS_AROUND_SUPPORT_H
#define TESTS_AROUND_SUPPORT_H

#include <stdlib.h>
#include <string.h>

#include "common/compare.h"
#include "common/rng.h"
#include "reference/norm.h"
#include "tests/mirror.h"

/* Where the group of tests that is under way runs. */
static kl_device device;

static inline int on_cpu(void **state)
{
    (void)state;
    device = KL_CPU;
    return 0;
}
static inline int on_cuda(void **state)
{
    (void)state;
    device = KL_CUDA;
    return 0;
}

/* Skips the test where the group's device is not there. */
#define NEEDS_ITS_DEVICE()                              \
    do {                                                \
        (void)state;                                    \
        if (device == KL_CUDA && kl_gpu_count() == 0)   \
            skip();                                     \
    } while (0)

static inline kl_ctx *context(int threads)
{
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.device = device, .threads = threads}));
    return ctx;
}

/* ---- arrays ---- */

static inline float *poisoned(int64_t n)
{
    float *x = malloc((size_t)(n + 1) * sizeof *x);
    assert_non_null(x);
    memset(x, 0xff, (size_t)(n + 1) * sizeof *x);
    return x;
}
static inline float *normal(kl_rng *r, int64_t n)
{
    float *x = poisoned(n);
    kl_fill_normal(r, x, (size_t)n, 0.0f, 1.0f);
    return x;
}
static inline double *widen(const float *x, int64_t n)
{
    double *y = ref_zeros(n);
    for (int64_t i = 0; i < n; i++)
        y[i] = x[i];
    return y;
}

/* Rounds n floats where they lie and returns them as bf16. */
static inline uint16_t *rounded(float *x, int64_t n)
{
    uint16_t *y = malloc((size_t)(n + 1) * sizeof *y);
    assert_non_null(y);
    kl_from_f32(y, KL_BF16, x, (size_t)n);
    kl_to_f32(x, y, KL_BF16, (size_t)n);
    return y;
}
static inline void widened(float *x, void *y, int64_t n)
{
    kl_to_f32(x, y, KL_BF16, (size_t)n);
    free(y);
}

static inline void free_all(void *const *all, size_t count)
{
    for (size_t i = 0; i < count; i++)
        free(all[i]);
}
#define FREE_ALL(...) free_all((void *[]){__VA_ARGS__}, sizeof((void *[]){__VA_ARGS__}) / sizeof(void *))

/* ---- the workspace that a call asks for: NaN before, nothing written beyond it ---- */

enum { GUARD = 64 };

static inline unsigned char *open_workspace(size_t bytes)
{
    unsigned char *workspace = aligned_alloc(64, (bytes + GUARD + 63) / 64 * 64);
    assert_non_null(workspace);
    return memset(workspace, 0xff, bytes + GUARD);
}
static inline void close_workspace(unsigned char *workspace, size_t bytes)
{
    for (size_t i = 0; i < GUARD; i++)
        assert_int_equal(workspace[bytes + i], 0xff);
    free(workspace);
}

#endif
