/* A strip: 32 columns of V of one head's state, held in the registers of a group of four warps, and one token's step on it.
 * Columns never talk to each other, so strips need nothing but the token.
 *
 * With S' = Diag(e^g) S, every sum of the token comes from one pass over the strip, and o needs no second one:
 *
 *     w = S'^T k;   y = S'^T q;   u = beta (v - w);   S <- S' + k u^T;   o = S^T q = y + (k.q) u
 *
 * Memory is touched in quads of four adjacent elements. Thread t of the group, c = t % 8, r = t / 8, owns
 *
 *     [K,V]   channels r + 16 i, columns 4c..4c+3                            sums over r: lanes, then warps
 *     [V,K]   columns r + 16 i, channels 4c..4c+3 + 32 j                     sums over c: lanes */
#ifndef KL_KDA_CUDA_STRIP_CUH
#define KL_KDA_CUDA_STRIP_CUH

#include "common/device.cuh"
#include "kda/kda.h"

enum { KDA_STRIP = 32, KDA_STRIP_THREADS = 128 };

/* ---- what lies between the tensors and the recurrence ---- */

__device__ __forceinline__ float kda_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

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

/* ---- memory ---- */

/* Fetched now, looked at later: a load that nothing waits for. */
__device__ __forceinline__ uint32_t kda_fetch(const void *x, int64_t i, bool bf16)
{
    return bf16 ? ((const uint16_t *)x)[i] : ((const uint32_t *)x)[i];
}
__device__ __forceinline__ float kda_fetched(uint32_t bits, bool bf16) { return __uint_as_float(bf16 ? bits << 16 : bits); }
__device__ __forceinline__ void kda_put_number(void *x, int64_t i, bool bf16, float y)
{
    if (bf16)
        ((uint16_t *)x)[i] = kl_to_bf16(y);
    else
        ((float *)x)[i] = y;
}

__device__ __forceinline__ void kda_load_quad(float q[4], const float *p)
{
    float4 x = *(const float4 *)p;
    q[0] = x.x, q[1] = x.y, q[2] = x.z, q[3] = x.w;
}
__device__ __forceinline__ void kda_load_quad(float q[4], const uint16_t *p)
{
    uint2 x = *(const uint2 *)p;
    q[0] = kl_bf16_low(x.x), q[1] = kl_bf16_high(x.x), q[2] = kl_bf16_low(x.y), q[3] = kl_bf16_high(x.y);
}
__device__ __forceinline__ void kda_store_quad(float *p, const float q[4]) { *(float4 *)p = make_float4(q[0], q[1], q[2], q[3]); }
__device__ __forceinline__ void kda_store_quad(uint16_t *p, const float q[4])
{
    *(uint2 *)p = make_uint2(kl_pack_bf16(q[0], q[1]), kl_pack_bf16(q[2], q[3]));
}
__device__ __forceinline__ float kda_element(const float *p) { return *p; }
__device__ __forceinline__ float kda_element(const uint16_t *p) { return kl_load_bf16(p); }
__device__ __forceinline__ void kda_put_element(float *p, float x) { *p = x; }
__device__ __forceinline__ void kda_put_element(uint16_t *p, float x) { *p = kl_to_bf16(x); }

/* ---- the strip ---- */

/* One token of one head in shared memory; channels from K on are 0, and decay there is of no account. */
template <int KP> struct kda_token {
    float decay[KP], k[KP], q[KP]; /* k and q before their norms */
};

/* What a step multiplies its sums by. */
struct kda_step {
    float scale, beta;
    bool l2norm, no_delta;
};

/* Room for the sums of one strip, [K,V] only. */
struct kda_sums {
    float column[4][KDA_STRIP / 4][8]; /* [warp][quad of columns]: w, y */
    float token[4][4];                 /* [warp]: k.q, k.k, q.q */
};

template <int KP, bool VK> struct kda_strip {
    static constexpr int quads = KP / 16, across = VK ? KP / 32 : 1; /* quads of a thread; of these, in one row of memory */
    static constexpr int columns = VK ? 2 : 4;                      /* columns whose u and o a thread knows */

    int c, r, warp, K, V, v0; /* v0: the strip's first column */
    float s[quads][4];

    __device__ kda_strip(int thread, int K, int V, int v0) : c(thread & 7), r(thread >> 3), warp(thread >> 5), K(K), V(V), v0(v0) {}

    /* Of quad i: its first channel; its distance from quad 0; how many of its elements are there. */
    __device__ __forceinline__ int channel(int i) const { return VK ? 4 * c + 32 * (i % across) : r + 16 * i; }
    __device__ __forceinline__ int step_to(int i) const { return VK ? 16 * K * (i / across) + 32 * (i % across) : 16 * V * i; }
    __device__ __forceinline__ int present(int i) const
    {
        int row = VK ? v0 + r + 16 * (i / across) : r + 16 * i, along = VK ? channel(i) : v0 + 4 * c;
        return row < (VK ? V : K) ? (VK ? K : V) - along : 0;
    }
    __device__ __forceinline__ int first() const { return VK ? (v0 + r) * K + 4 * c : r * V + v0 + 4 * c; }
    /* The j-th column that this thread knows, and the one that it hands out: its o, or -1. */
    __device__ __forceinline__ int column(int j) const { return VK ? r + 16 * j : 4 * c + j; }
    __device__ __forceinline__ int own_column() const { return (VK ? c : r) < columns ? column(VK ? c : r) : -1; }
    __device__ __forceinline__ float own(const float o[columns]) const
    {
        int j = VK ? c : r;
        float low = j & 1 ? o[1] : o[0], high = j & 1 ? o[columns - 1] : o[columns - 2];
        return j & 2 ? high : low;
    }

    /* vector: rows are whole quads at whole addresses. state NULL: zero. */
    template <class S> __device__ __forceinline__ void load(const S *state, bool vector)
    {
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i][e] = 0.0f;
        if (!state)
            return;
        state += first();
        if (vector) {
#pragma unroll
            for (int i = 0; i < quads; i++)
                if (present(i) > 0)
                    kda_load_quad(s[i], state + step_to(i));
            return;
        }
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (e < present(i))
                    s[i][e] = kda_element(state + step_to(i) + e);
    }

    template <class S> __device__ __forceinline__ void store(S *state, bool vector) const
    {
        state += first();
        if (vector) {
#pragma unroll
            for (int i = 0; i < quads; i++)
                if (present(i) > 0)
                    kda_store_quad(state + step_to(i), s[i]);
            return;
        }
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (e < present(i))
                    kda_put_element(state + step_to(i) + e, s[i][e]);
    }

    /* One token: v [32] are the strip's own values; o[j] is that of column(j). The group's threads meet at barrier `meet`
     * (0: the group is the block), and before the next token's step must have met once more. */
    __device__ __forceinline__ void step(const kda_token<KP> &x, const float *v, const kda_step &p, kda_sums &sums, int meet, float o[columns])
    {
        float w[columns] = {}, y[columns] = {}, kq = 0.0f, kk = 0.0f, qq = 0.0f;
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int at = channel(i) + (VK ? e : 0), j = VK ? i / across : e;
                float k = x.k[at], q = x.q[at];
                s[i][e] *= x.decay[at];
                w[j] += s[i][e] * k;
                y[j] += s[i][e] * q;
                if (j == 0) {
                    kq += k * q;
                    kk += k * k;
                    qq += q * q;
                }
            }
        add_up(w, y, kq, kk, qq, sums, meet);
        float norm_k = p.l2norm ? rsqrtf(kk + 1e-6f) : 1.0f, norm_q = (p.l2norm ? rsqrtf(qq + 1e-6f) : 1.0f) * p.scale;
#pragma unroll
        for (int j = 0; j < columns; j++) {
            float u = p.beta * (v[column(j)] - (p.no_delta ? 0.0f : norm_k * w[j]));
            o[j] = norm_q * (y[j] + norm_k * kq * u);
            w[j] = norm_k * u;
        }
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i][e] += x.k[channel(i) + (VK ? e : 0)] * w[VK ? i / across : e];
    }

    __device__ __forceinline__ void add_up(float w[columns], float y[columns], float &kq, float &kk, float &qq, kda_sums &sums, int meet) const
    {
#pragma unroll
        for (int m = VK ? 1 : 8; m <= (VK ? 4 : 16); m *= 2) {
#pragma unroll
            for (int j = 0; j < columns; j++) {
                w[j] += __shfl_xor_sync(0xffffffffu, w[j], m);
                y[j] += __shfl_xor_sync(0xffffffffu, y[j], m);
            }
            kq += __shfl_xor_sync(0xffffffffu, kq, m);
            kk += __shfl_xor_sync(0xffffffffu, kk, m);
            qq += __shfl_xor_sync(0xffffffffu, qq, m);
        }
        if (VK)
            return;
        if (kl_lane() < 8) {
            kda_store_quad(&sums.column[warp][c][0], w);
            kda_store_quad(&sums.column[warp][c][4], y);
        }
        if (kl_lane() == 0)
            *(float4 *)sums.token[warp] = make_float4(kq, kk, qq, 0.0f);
        kl_barrier(meet, KDA_STRIP_THREADS);
        float part[4];
        kq = kk = qq = 0.0f;
#pragma unroll
        for (int j = 0; j < columns; j++)
            w[j] = y[j] = 0.0f;
#pragma unroll
        for (int from = 0; from < 4; from++) {
            kda_load_quad(part, sums.token[from]);
            kq += part[0], kk += part[1], qq += part[2];
            kda_load_quad(part, &sums.column[from][c][0]);
#pragma unroll
            for (int j = 0; j < columns; j++)
                w[j] += part[j];
            kda_load_quad(part, &sums.column[from][c][4]);
#pragma unroll
            for (int j = 0; j < columns; j++)
                y[j] += part[j];
        }
    }
};

#endif
