/* A strip: a few columns of V of one head's state, held in the registers of one warp, and one token's step on it. Columns
 * never talk to each other, so warps need nothing but the token.
 *
 * With S' = Diag(e^g) S, every sum of the token comes from one pass over the strip, and o needs no second one:
 *
 *     w = S'^T k;   y = S'^T q;   u = beta (v - w);   S <- S' + k u^T;   o = S^T q = y + (k.q) u
 *
 * Memory is touched in quads of four adjacent elements. A lane has c of the `across` quads that lie side by side, and r of
 * the rows of memory that are touched together:
 *
 *     [K,V]   channels r + (32 / across) i, columns 4c..4c+3         sums over r
 *     [V,K]   columns r + 4 i, channels 4c..4c+3 + 32 j              sums over c */
#ifndef KL_KDA_CUDA_STRIP_CUH
#define KL_KDA_CUDA_STRIP_CUH

#include "kda/cuda/numbers.cuh"

/* ---- memory ---- */

/* The state passes by: it need not stay in the caches. */
__device__ __forceinline__ void kda_load_quad(float q[4], const float *p)
{
    float4 x = __ldcs((const float4 *)p);
    q[0] = x.x, q[1] = x.y, q[2] = x.z, q[3] = x.w;
}
__device__ __forceinline__ void kda_load_quad(float q[4], const uint16_t *p)
{
    uint2 x = __ldcs((const uint2 *)p);
    q[0] = kl_bf16_low(x.x), q[1] = kl_bf16_high(x.x), q[2] = kl_bf16_low(x.y), q[3] = kl_bf16_high(x.y);
}
__device__ __forceinline__ void kda_store_quad(float *p, const float q[4]) { __stcs((float4 *)p, make_float4(q[0], q[1], q[2], q[3])); }
__device__ __forceinline__ void kda_store_quad(uint16_t *p, const float q[4])
{
    __stcs((uint2 *)p, make_uint2(kl_pack_bf16(q[0], q[1]), kl_pack_bf16(q[2], q[3])));
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

template <int KP, bool VK, int WIDTH> struct kda_strip {
    static constexpr int across = VK ? 8 : WIDTH / 4, rows = 32 / across;
    static constexpr int quads = KP * WIDTH / 128, in_row = VK ? KP / 32 : 1; /* quads of a lane; of these, in one row of memory */
    static constexpr int columns = VK ? WIDTH / 4 : 4;                        /* columns whose u and o a lane knows */

    struct shared {};   /* warps have nothing to tell each other */
    int c, r, K, V, v0; /* v0: the strip's first column */
    float s[quads][4];

    __device__ kda_strip(int K, int V, int v0) : c(kl_lane() % across), r(kl_lane() / across), K(K), V(V), v0(v0) {}

    /* Of quad i: its first channel; its distance from quad 0; how many of its elements are there. */
    __device__ __forceinline__ int channel(int i) const { return VK ? 4 * c + 32 * (i % in_row) : r + rows * i; }
    __device__ __forceinline__ int step_to(int i) const { return VK ? rows * K * (i / in_row) + 32 * (i % in_row) : rows * V * i; }
    __device__ __forceinline__ int present(int i) const
    {
        int row = VK ? v0 + r + rows * (i / in_row) : r + rows * i, along = VK ? channel(i) : v0 + 4 * c;
        return row < (VK ? V : K) ? (VK ? K : V) - along : 0;
    }
    __device__ __forceinline__ int first() const { return VK ? (v0 + r) * K + 4 * c : r * V + v0 + 4 * c; }

    /* The j-th column that this lane knows, of WIDTH; and the one whose o it hands out, or -1. */
    __device__ __forceinline__ int column(int j) const { return VK ? r + rows * j : 4 * c + j; }
    __device__ __forceinline__ int own_column() const { return (VK ? c : r) < columns ? column(VK ? c : r) : -1; }
    __device__ __forceinline__ float own(const float o[columns]) const
    {
        float x[columns];
#pragma unroll
        for (int j = 0; j < columns; j++)
            x[j] = o[j];
#pragma unroll
        for (int half = columns / 2; half; half /= 2)
#pragma unroll
            for (int j = 0; j < half; j++)
                x[j] = (VK ? c : r) & half ? x[j + half] : x[j];
        return x[0];
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

    /* One token: v [WIDTH] are the strip's own values; o[j] is that of column(j). */
    __device__ __forceinline__ void step(const kda_token<KP> &x, const float *v, const kda_step &p, float o[columns], shared &)
    {
        float w[columns] = {}, y[columns] = {}, kq = 0.0f, kk = 0.0f, qq = 0.0f;
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int at = channel(i) + (VK ? e : 0), j = VK ? i / in_row : e;
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
        kq = add_up(kq);
        kk = add_up(kk);
        qq = add_up(qq);
        float norm_k = p.l2norm ? rsqrtf(kk + 1e-6f) : 1.0f, norm_q = (p.l2norm ? rsqrtf(qq + 1e-6f) : 1.0f) * p.scale;
#pragma unroll
        for (int j = 0; j < columns; j++) {
            float u = p.beta * (v[column(j)] - (p.no_delta ? 0.0f : norm_k * add_up(w[j])));
            o[j] = norm_q * (add_up(y[j]) + norm_k * kq * u);
            w[j] = norm_k * u;
        }
#pragma unroll
        for (int i = 0; i < quads; i++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[i][e] += x.k[channel(i) + (VK ? e : 0)] * w[VK ? i / in_row : e];
    }

    /* Over the lanes that hold the same columns. */
    __device__ __forceinline__ float add_up(float x) const
    {
#pragma unroll
        for (int m = VK ? 1 : across; m <= (VK ? 4 : 16); m *= 2)
            x += __shfl_xor_sync(0xffffffffu, x, m);
        return x;
    }
};

#endif
