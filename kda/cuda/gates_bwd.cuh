/* What lies between the tensors and the recurrence, forwards where the backward pass needs it again, and backwards: the gate
 * and beta of one token. */
#ifndef KL_KDA_CUDA_GATES_BWD_CUH
#define KL_KDA_CUDA_GATES_BWD_CUH

#include "kda/cuda/tile_bwd.cuh"

__device__ __forceinline__ float kda_sigmoid(float x)
{
    float e = kl_exp(-fabsf(x)), r = kl_rcp(1.0f + e);
    return x >= 0.0f ? r : e * r;
}

/* log(1 + e^z), linear above 20; ln(1 + e) loses digits for small e, where the series takes over. */
__device__ __forceinline__ float kda_softplus(float z)
{
    float e = kl_exp(fminf(z, 20.0f));
    float series = e * (1.0f - e * (0.5f - e * (0.333333333f - e * (0.25f - e * 0.2f)))), curve = kl_log(1.0f + e);
    return z > 20.0f ? z : e < 0.03f ? series : curve;
}

/* The gate of a head: a = g | -exp(A) softplus(z) | lb sigmoid(exp(A) z), z = g + dt_bias. */
struct kda_gate_of {
    int kind;
    float rate, lower_bound; /* rate = exp(A_log) */
};
__device__ __forceinline__ kda_gate_of kda_gate_make(const kda_bwd_args &a, int hv)
{
    return {a.gate, a.gate != KDA_GATE_LOG ? kl_exp(a.A_log[hv]) : 0.0f, a.lower_bound};
}

/* dz and the part of dA_log that da, the gradient of the log-decay, gives. */
__device__ __forceinline__ float kda_log_decay_backward(const kda_gate_of &gate, float z, float da, float *dA)
{
    if (gate.kind == KDA_GATE_SOFTPLUS) {
        /* a = -exp(A) softplus(z):  dz = -exp(A) softplus'(z) da,  dA = a da */
        *dA = -gate.rate * kda_softplus(z) * da;
        return -gate.rate * (z > 20.0f ? 1.0f : kda_sigmoid(z)) * da;
    }
    if (gate.kind == KDA_GATE_BOUNDED) {
        /* a = lb sigmoid(y), y = exp(A) z:  dy = lb sigmoid(y) sigmoid(-y) da,  dz = exp(A) dy,  dA = y dy */
        float y = gate.rate * z, dy = gate.lower_bound * kda_sigmoid(y) * kda_sigmoid(-y) * da;
        *dA = y * dy;
        return gate.rate * dy;
    }
    *dA = 0.0f;
    return da;
}

__device__ __forceinline__ float kda_beta_of(int kind, float x)
{
    return kind == KDA_BETA_PLAIN ? x : (kind == KDA_BETA_SIGMOID ? 1.0f : 2.0f) * kda_sigmoid(x);
}
__device__ __forceinline__ float kda_beta_slope(int kind, float x)
{
    return kind == KDA_BETA_PLAIN ? 1.0f : (kind == KDA_BETA_SIGMOID ? 1.0f : 2.0f) * kda_sigmoid(x) * kda_sigmoid(-x);
}

/* Sixteen tokens of one channel: block `block` of a tile. Tokens beyond the sequence read its last one again, so that no load waits
 * for a branch: what they make meets zeros (of do, of beta) wherever it goes, and their decay is set to 1. */
struct kda_column_of {
    int channel, gate; /* within K and G */
    bool real;         /* channel < K */
    int first, count;  /* first token of the block in the tile; tokens of the tile */
};
__device__ __forceinline__ kda_column_of kda_column_make(const kda_bwd_args &a, int channel, int block, int count)
{
    int c = channel < a.K ? channel : a.K - 1;
    return {c, a.G > 1 ? c / (a.K / a.G) : 0, channel < a.K, 16 * block, count};
}
__device__ __forceinline__ bool kda_column_real(const kda_column_of &x, int i) { return x.real && x.first + i < x.count; }

/* rows: of the tile's first token, at the channel. */
__device__ __forceinline__ void kda_column_load(const kda_column_of &x, const uint16_t *rows, int stride, float out[16])
{
    uint16_t raw[16];
#pragma unroll
    for (int i = 0; i < 16; i++)
        raw[i] = rows[(int64_t)min(x.first + i, x.count - 1) * stride];
#pragma unroll
    for (int i = 0; i < 16; i++)
        out[i] = __uint_as_float((uint32_t)raw[i] << 16);
}

/* q and k of head h; zero beyond K. */
struct kda_column {
    float q[16], k[16];
};
__device__ __forceinline__ kda_column kda_column_keys(const kda_bwd_args &a, const kda_column_of &x, int h, int64_t token)
{
    kda_column y;
    kda_column_load(x, a.q + token * a.q_stride + (int64_t)h * a.K + x.channel, a.q_stride, y.q);
    kda_column_load(x, a.k + token * a.k_stride + (int64_t)h * a.K + x.channel, a.k_stride, y.k);
    if (!x.real) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            y.q[i] = y.k[i] = 0.0f;
    }
    return y;
}

/* g of value head hv as given, and its dt_bias. */
__device__ __forceinline__ void kda_column_gate(const kda_bwd_args &a, const kda_column_of &x, int hv, int64_t token, float g[16])
{
    if (a.G == 0) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            g[i] = 0.0f;
        return;
    }
    kda_column_load(x, a.g + token * a.g_stride + (int64_t)hv * a.G + x.gate, a.g_stride, g);
}
__device__ __forceinline__ float kda_column_bias(const kda_bwd_args &a, const kda_column_of &x, int hv)
{
    return a.dt_bias ? a.dt_bias[(int64_t)hv * a.G + x.gate] : 0.0f;
}

/* The decays e^a of a gate, z = g + bias. */
__device__ __forceinline__ void kda_column_decay(const kda_bwd_args &a, const kda_column_of &x, int hv, const float g[16], float bias, float d[16])
{
    kda_gate_of gate = kda_gate_make(a, hv);
    float z[16];
#pragma unroll
    for (int i = 0; i < 16; i++)
        z[i] = g[i] + bias;
    if (gate.kind == KDA_GATE_SOFTPLUS) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            d[i] = -gate.rate * kda_softplus(z[i]);
    } else if (gate.kind == KDA_GATE_BOUNDED) {
#pragma unroll
        for (int i = 0; i < 16; i++)
            d[i] = gate.lower_bound * kda_sigmoid(gate.rate * z[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 16; i++)
            d[i] = z[i];
    }
#pragma unroll
    for (int i = 0; i < 16; i++)
        d[i] = kda_column_real(x, i) && a.G > 0 ? kl_exp(d[i]) : 1.0f;
}

#endif
