/* The references as variants: the same problem structs, computed token by token in double. They widen the tensors,
 * call reference/, and round the answers to the tensors' type. Slow and plain: verify and bench score against them. */
#ifndef KL_HARNESS_REFERENCE_VARIANTS_H
#define KL_HARNESS_REFERENCE_VARIANTS_H

#include <string.h>

#include "harness/problem.h"

/* The family's reference, named "reference". The functions in reference/ take scratch memory of their own beyond the workspace. */
const kl_variant *kl_reference_variant(kl_family f);

extern const kl_variant kl_reference_kda, kl_reference_dplr, kl_reference_mla, kl_reference_moe;

/* Element i of a tensor of that type, and back. */
static inline double kl_element(const void *x, kl_dtype type, int64_t i)
{
    switch (type) {
    case KL_F64: return ((const double *)x)[i];
    case KL_BF16: return kl_bf16_to_f32(((const uint16_t *)x)[i]);
    case KL_F16: return kl_f16_to_f32(((const uint16_t *)x)[i]);
    default: return ((const float *)x)[i];
    }
}

static inline void kl_set_element(void *x, kl_dtype type, int64_t i, double value)
{
    switch (type) {
    case KL_F64: ((double *)x)[i] = value; break;
    case KL_BF16: ((uint16_t *)x)[i] = kl_f32_to_bf16((float)value); break;
    case KL_F16: ((uint16_t *)x)[i] = kl_f32_to_f16((float)value); break;
    default: ((float *)x)[i] = (float)value; break;
    }
}

/* y += x, where y is wanted. */
static inline void kl_add_to(float *y, const double *x, int64_t n)
{
    for (int64_t i = 0; y && i < n; i++)
        y[i] = (float)(y[i] + x[i]);
}

static inline void kl_clear(double *x, int64_t n) { memset(x, 0, (size_t)n * sizeof *x); }

#endif
