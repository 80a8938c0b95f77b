/* Random KDA inputs made in a device's memory, where copying them there would take longer than everything that is to be
 * measured, and slices of tensors back to the host for scoring. */
#ifndef KL_HARNESS_DEVICE_INPUTS_H
#define KL_HARNESS_DEVICE_INPUTS_H

#include "harness/problem.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fills q, k, v, g, beta, h0, A_log, dt_bias of the problem, and d_o, dht of the gradients (NULL: no gradients), as
 * kl_case_kda does for the host: the same distributions, other numbers. */
kl_status kl_device_inputs(const kl_ctx *ctx, const kda_problem *p, const kda_grads *g, kl_regime regime, uint64_t seed);
/* N(0, stddev). */
kl_status kl_device_normal(const kl_ctx *ctx, void *x, kl_dtype type, int64_t count, float stddev, uint64_t seed);
/* The general form of a problem with a log gate and plain beta, whose tensors d points to. */
kl_status kl_device_general(const kl_ctx *ctx, const kda_problem *p, const dplr_problem *d);

/* Some heads of a tensor [rows, heads, width], `pitch` elements from row to row: to dst [rows, count, width] as floats.
 * index (device memory, may be NULL): where each row lies. */
enum { KL_SLICE_HEADS = 8 };
typedef struct kl_slice {
    const void *tensor;
    kl_dtype dtype;
    int64_t rows, pitch, width;
    const int64_t *index;
    int64_t count, head[KL_SLICE_HEADS];
} kl_slice;
kl_status kl_device_slice(const kl_ctx *ctx, float *dst, const kl_slice *s);

#ifdef __cplusplus
}
#endif
#endif
