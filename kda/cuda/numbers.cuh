/* Numbers of several types in memory, and the scalar functions between the tensors and the recurrence. */
#ifndef KL_KDA_CUDA_NUMBERS_CUH
#define KL_KDA_CUDA_NUMBERS_CUH

#include "common/device.cuh"
#include "kda/kda.h"

/* ---- memory ---- */

/* Fetched now, looked at later: a load that nothing waits for. */
__device__ __forceinline__ uint32_t kda_fetch(const void *x, int64_t i, bool bf16)
{
    return bf16 ? ((const uint16_t *)x)[i] : ((const uint32_t *)x)[i];
}
__device__ __forceinline__ float kda_fetched(uint32_t bits, bool bf16) { return __uint_as_float(bf16 ? bits << 16 : bits); }
__device__ __forceinline__ float kda_number(const void *x, int64_t i, bool bf16) { return kda_fetched(kda_fetch(x, i, bf16), bf16); }
__device__ __forceinline__ void kda_put_number(void *x, int64_t i, bool bf16, float y)
{
    if (bf16)
        ((uint16_t *)x)[i] = kl_to_bf16(y);
    else
        ((float *)x)[i] = y;
}

/* A weight: F32, BF16 or F16; fetched as 16 bits unless F32. */
__device__ __forceinline__ float kda_weight_fetched(uint32_t bits, kl_dtype type)
{
    if (type != KL_F16)
        return kda_fetched(bits, type == KL_BF16);
    uint32_t size = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
    float x = __uint_as_float(size << 13) * 0x1p112f; /* the exponent's bias: 127 - 15 */
    return __uint_as_float(__float_as_uint(size >= 0x7c00u ? __uint_as_float(0x7f800000u | size << 13) : x) | sign);
}
__device__ __forceinline__ float kda_weight(const void *w, int64_t i, kl_dtype type)
{
    return kda_weight_fetched(kda_fetch(w, i, type != KL_F32), type);
}

/* N adjacent activations (8, 4: one or two accesses, at an address of whole ones; 1), fetched now and looked at later. */
template <class A, int N> struct kda_row;
template <> struct kda_row<uint16_t, 8> {
    uint4 x;
    __device__ __forceinline__ void fetch(const uint16_t *p) { x = *(const uint4 *)p; }
    __device__ __forceinline__ void get(float y[8]) const
    {
        y[0] = kl_bf16_low(x.x), y[1] = kl_bf16_high(x.x), y[2] = kl_bf16_low(x.y), y[3] = kl_bf16_high(x.y);
        y[4] = kl_bf16_low(x.z), y[5] = kl_bf16_high(x.z), y[6] = kl_bf16_low(x.w), y[7] = kl_bf16_high(x.w);
    }
    static __device__ __forceinline__ void put(uint16_t *p, const float y[8])
    {
        *(uint4 *)p = make_uint4(kl_pack_bf16(y[0], y[1]), kl_pack_bf16(y[2], y[3]), kl_pack_bf16(y[4], y[5]), kl_pack_bf16(y[6], y[7]));
    }
};
template <> struct kda_row<float, 8> {
    float4 x[2];
    __device__ __forceinline__ void fetch(const float *p) { x[0] = ((const float4 *)p)[0], x[1] = ((const float4 *)p)[1]; }
    __device__ __forceinline__ void get(float y[8]) const
    {
        y[0] = x[0].x, y[1] = x[0].y, y[2] = x[0].z, y[3] = x[0].w, y[4] = x[1].x, y[5] = x[1].y, y[6] = x[1].z, y[7] = x[1].w;
    }
    static __device__ __forceinline__ void put(float *p, const float y[8])
    {
        ((float4 *)p)[0] = make_float4(y[0], y[1], y[2], y[3]);
        ((float4 *)p)[1] = make_float4(y[4], y[5], y[6], y[7]);
    }
};
template <> struct kda_row<uint16_t, 4> {
    uint2 x;
    __device__ __forceinline__ void fetch(const uint16_t *p) { x = *(const uint2 *)p; }
    __device__ __forceinline__ void get(float y[4]) const { y[0] = kl_bf16_low(x.x), y[1] = kl_bf16_high(x.x), y[2] = kl_bf16_low(x.y), y[3] = kl_bf16_high(x.y); }
    static __device__ __forceinline__ void put(uint16_t *p, const float y[4]) { *(uint2 *)p = make_uint2(kl_pack_bf16(y[0], y[1]), kl_pack_bf16(y[2], y[3])); }
};
template <> struct kda_row<float, 4> {
    float4 x;
    __device__ __forceinline__ void fetch(const float *p) { x = *(const float4 *)p; }
    __device__ __forceinline__ void get(float y[4]) const { y[0] = x.x, y[1] = x.y, y[2] = x.z, y[3] = x.w; }
    static __device__ __forceinline__ void put(float *p, const float y[4]) { *(float4 *)p = make_float4(y[0], y[1], y[2], y[3]); }
};
template <> struct kda_row<uint16_t, 1> {
    uint16_t x;
    __device__ __forceinline__ void fetch(const uint16_t *p) { x = *p; }
    __device__ __forceinline__ void get(float y[1]) const { y[0] = __uint_as_float((uint32_t)x << 16); }
    static __device__ __forceinline__ void put(uint16_t *p, const float y[1]) { *p = kl_to_bf16(y[0]); }
};
template <> struct kda_row<float, 1> {
    float x;
    __device__ __forceinline__ void fetch(const float *p) { x = *p; }
    __device__ __forceinline__ void get(float y[1]) const { y[0] = x; }
    static __device__ __forceinline__ void put(float *p, const float y[1]) { *p = y[0]; }
};
/* Eight adjacent numbers, at an address of whole 16 bytes. */
__device__ __forceinline__ void kda_eight_numbers(float y[8], const void *x, int64_t i, bool bf16)
{
    if (bf16) {
        kda_row<uint16_t, 8> row;
        row.fetch((const uint16_t *)x + i);
        row.get(y);
    } else {
        kda_row<float, 8> row;
        row.fetch((const float *)x + i);
        row.get(y);
    }
}

/* ---- functions ---- */

/* To the last bit or two, for what is carried through many tokens. */
__device__ __forceinline__ float kda_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
/* To about 1e-6, for what passes through once. */
__device__ __forceinline__ float kda_sigmoid_fast(float x) { return kl_rcp(1.0f + kl_exp(-x)); }

/* a = g | -exp(A) softplus(z) | lb sigmoid(exp(A) z),  z = g + dt_bias; eA = exp(A) */
__device__ __forceinline__ float kda_log_decay(kda_gate gate, float eA, float lower_bound, float z)
{
    if (gate == KDA_GATE_SOFTPLUS)
        return -eA * (z > 20.0f ? z : log1pf(expf(z)));
    return gate == KDA_GATE_BOUNDED ? lower_bound * kda_sigmoid(eA * z) : z;
}

__device__ __forceinline__ float kda_beta_of(kda_beta kind, float x)
{
    return kind == KDA_BETA_PLAIN ? x : (kind == KDA_BETA_SIGMOID2 ? 2.0f : 1.0f) * kda_sigmoid(x);
}

#endif
