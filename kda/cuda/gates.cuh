/* From the numbers in g and beta to decays and to beta. Decays are kept as powers of two: a = 2^x, x <= 0. */
#ifndef KL_KDA_CUDA_GATES_CUH
#define KL_KDA_CUDA_GATES_CUH

#include "common/device.cuh"
#include "kda/kda.h"

static constexpr float kda_log2e = 1.44269504f;

/* A gate's constants in powers of two. */
struct kda_gate_scale {
    float rate, bound;
};

/* A_log is read by SOFTPLUS and BOUNDED only. */
__device__ __forceinline__ kda_gate_scale kda_gate_scale_of(int gate, float A_log, float lower_bound)
{
    if (gate == KDA_GATE_LOG)
        return {kda_log2e, 0.0f};
    float A = kl_exp(A_log);
    return gate == KDA_GATE_SOFTPLUS ? kda_gate_scale{-A, 0.0f} : kda_gate_scale{-A * kda_log2e, lower_bound * kda_log2e};
}
__device__ __forceinline__ float kda_gate_bias(int gate, const kda_gate_scale &s, float dt_bias)
{
    return dt_bias * (gate == KDA_GATE_SOFTPLUS ? kda_log2e : s.rate);
}

/* log2(1 + 2^y), to 2e-6 of itself however small: e = 2^-|y| in [0, 1], log2(1 + e) / e by its Chebyshev polynomial. */
__device__ __forceinline__ float kda_softplus2(float y)
{
    float e = kl_exp2(-fabsf(y));
    float p = fmaf(e, 0.02001665f, -0.0946268097f);
    p = fmaf(e, p, 0.213943212f);
    p = fmaf(e, p, -0.338377198f);
    p = fmaf(e, p, 0.477496364f);
    p = fmaf(e, p, -0.721144092f);
    p = fmaf(e, p, 1.44269298f);
    return fmaf(e, p, fmaxf(y, 0.0f));
}

/* x of one token and channel. */
template <int gate> __device__ __forceinline__ float kda_log2_decay(float g, const kda_gate_scale &s, float bias)
{
    if (gate == KDA_GATE_LOG)
        return s.rate * g;
    if (gate == KDA_GATE_SOFTPLUS)
        return s.rate * kda_softplus2(fmaf(kda_log2e, g, bias));
    return s.bound * kl_rcp(1.0f + kl_exp2(fmaf(s.rate, g, bias)));
}

/* The number in g, as a pair, that decays nothing under this gate: what lies beyond a sequence or beyond K. */
__device__ __forceinline__ uint32_t kda_gate_rest(int gate)
{
    return gate == KDA_GATE_LOG ? 0u : 0xff80ff80u; /* -inf */
}

__device__ __forceinline__ float kda_beta_of(int kind, float x)
{
    if (kind == KDA_BETA_PLAIN)
        return x;
    return (kind == KDA_BETA_SIGMOID2 ? 2.0f : 1.0f) * kl_rcp(1.0f + kl_exp2(-kda_log2e * x));
}

#endif
