/* What the tests of the CPU's table of operations share: the table, random arrays with a guard behind them, comparing. Include after
 * cmocka.h. */
#ifndef TESTS_OPS_SUPPORT_H
#define TESTS_OPS_SUPPORT_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/compare.h"
#include "common/rng.h"
#include "harness/ops.h"
#include "tests/contexts.h"
#include "tests/expect.h"

static const kl_ops *ops;
static kl_rng rng;

/* Opens the contexts, the table of operations and the random numbers. */
static inline int open_ops(void **state)
{
    ops = kl_ops_for(KL_CPU);
    const char *text = getenv("SEED");
    rng = kl_rng_make(text ? strtoull(text, NULL, 10) : 1, 0);
    print_message("SEED=%llu\n", (unsigned long long)rng.seed);
    return ops ? open_contexts(state) : -1;
}

/* ---- arrays ---- */

static inline float *floats(size_t n, float deviation)
{
    float *x = malloc((n + 1) * sizeof(float));
    kl_fill_normal(&rng, x, n, 0.0f, deviation);
    x[n] = 12345.0f; /* a guard */
    return x;
}

static inline float *poisoned(size_t n)
{
    float *x = malloc((n + 1) * sizeof(float));
    for (size_t i = 0; i < n; i++)
        x[i] = NAN;
    x[n] = 12345.0f;
    return x;
}

static inline float *ones(size_t n)
{
    float *x = poisoned(n);
    for (size_t i = 0; i < n; i++)
        x[i] = 1.0f;
    return x;
}

static inline double *exact(const float *x, size_t n)
{
    double *d = malloc((n + 1) * sizeof(double));
    for (size_t i = 0; i < n; i++)
        d[i] = (double)x[i];
    return d;
}

/* A random parameter of the given type, and the same numbers in double. */
static inline kl_param parameter(kl_dtype dtype, int64_t rows, int64_t columns, float deviation, double **values)
{
    size_t n = (size_t)(rows * columns);
    kl_param w = {malloc(n * kl_dtype_size(dtype) + 1), dtype, rows, columns};
    float *f = floats(n, deviation);
    kl_from_f32(w.data, dtype, f, n);
    kl_to_f32(f, w.data, dtype, n);
    *values = exact(f, n);
    free(f);
    return w;
}

static inline void close_to(const float *x, const double *reference, size_t n, double limit, const char *what)
{
    double err = kl_rel_err(x, reference, n);
    if (!kl_within(err, limit))
        fail_msg("%s: error %.3g over %zu elements, at most %.3g expected", what, err, n, limit);
    assert_true(x[n] == 12345.0f);
}

static const kl_dtype float_types[] = {KL_F32, KL_BF16, KL_F16};
enum { TYPES = 3 };
static const double FORWARD = 2e-6, GRADIENT = 5e-6; /* one sum of at most a few hundred products in float */

#endif
