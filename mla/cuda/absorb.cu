#include "common/gpu.h"
#include "mla/cuda/absorb.cuh"

#include <algorithm>

namespace {

enum { TOKENS = 16 /* of a product */ };

struct ends {
    const uint16_t *q, *kv_b, *a;
    uint16_t *rows, *o;
    int tokens, H, Dn, Dv;
    int64_t q_stride;
    float scale;
};

/* ---- absorb: a block takes 16 WARPS columns of one head for 16 TILES tokens, a warp 16 of them ---- */

template <int TILES_, int WARPS_> struct absorb_form {
    enum { TILES = TILES_, WARPS = WARPS_, THREADS = 32 * WARPS, SLICE = 16 * WARPS, SLICES = MLA_R / SLICE, W_PITCH = SLICE + 8, SHARE = MLA_DR / SLICES };
    static_assert(SHARE % 8 == 0, "whole 16 bytes");
};

/* Weights [Dn,W_PITCH], then queries [16 TILES, Dn + 8], with Dn rounded up to a multiple of 16. */
__host__ __device__ __forceinline__ int rounded(int Dn) { return (Dn + 15) / 16 * 16; }
template <class F> size_t absorb_bytes(int Dn) { return 2 * ((size_t)rounded(Dn) * F::W_PITCH + (size_t)(F::TILES * TOKENS) * (rounded(Dn) + 8)); }

/* Zeros beyond Dn and beyond the last token. */
template <class F> __device__ __forceinline__ void load_absorb(const ends &p, uint16_t *to_w, uint16_t *to_q, int h, int column, int first)
{
    const uint16_t *w = p.kv_b + (int64_t)h * (p.Dn + p.Dv) * MLA_R + column, *q = p.q + h * (p.Dn + MLA_DR);
    int rows = rounded(p.Dn), tokens = min(p.tokens - first, F::TILES * TOKENS);
    for (int i = (int)threadIdx.x; i < rows * (F::SLICE / 8); i += F::THREADS) {
        int d = i / (F::SLICE / 8), c = i % (F::SLICE / 8) * 8;
        kl_copy16(to_w + d * F::W_PITCH + c, w + (int64_t)(d < p.Dn ? d : 0) * MLA_R + c, d < p.Dn);
    }
    /* A token's row by 8 threads. */
    for (int token = (int)threadIdx.x / 8; token < (tokens + TOKENS - 1) / TOKENS * TOKENS; token += F::THREADS / 8)
        for (int c = (int)threadIdx.x % 8 * 8; c < rows; c += 64) {
            bool there = token < tokens && c < p.Dn;
            kl_copy16(to_q + token * (rows + 8) + c, q + (there ? (first + token) * p.q_stride + c : 0), there);
        }
    kl_copy_commit();
}

/* The part without expansion: a slice passes its share of the columns on. */
template <class F> __device__ __forceinline__ void pass_on(const ends &p, int h, int slice, int first)
{
    for (int i = (int)threadIdx.x; i < F::TILES * TOKENS * (F::SHARE / 8); i += F::THREADS) {
        int token = first + i / (F::SHARE / 8), column = slice * F::SHARE + i % (F::SHARE / 8) * 8;
        if (token >= p.tokens)
            return;
        uint4 x = *(const uint4 *)(p.q + token * p.q_stride + h * (p.Dn + MLA_DR) + p.Dn + column);
        uint32_t *all = &x.x;
        for (int j = 0; j < 4; j++)
            all[j] = kl_pack_bf16(kl_bf16_low(all[j]) * p.scale, kl_bf16_high(all[j]) * p.scale);
        *(uint4 *)(p.rows + ((int64_t)token * p.H + h) * MLA_WIDTH + MLA_R + column) = x;
    }
}

template <class F> __global__ void __launch_bounds__(F::THREADS) absorb(const __grid_constant__ ends p)
{
    KL_SHARED(memory);
    int slice = (int)(blockIdx.x % F::SLICES), h = (int)(blockIdx.x / F::SLICES) % p.H, first = (int)(blockIdx.x / F::SLICES) / p.H * TOKENS * F::TILES;
    int lane = kl_lane(), g = lane / 4, t = lane % 4, warp = (int)threadIdx.x / 32, pitch = rounded(p.Dn) + 8;
    uint16_t *w = (uint16_t *)memory, *q = w + rounded(p.Dn) * F::W_PITCH;
    kl_grid_release();
    load_absorb<F>(p, w, q, h, slice * F::SLICE, first);
    pass_on<F>(p, h, slice, first);
    kl_copy_wait<0>();
    __syncthreads();
    w += lane % 16 * F::W_PITCH + warp * 16 + lane / 16 * 8;
    q += lane % 16 * pitch + lane / 16 * 8;
    for (int token = first; token < p.tokens && token < first + TOKENS * F::TILES; token += TOKENS) {
        float c[2][4] = {};
        for (int k = 0; k < p.Dn; k += 16) {
            uint32_t a[4], b[4];
            kl_ldmatrix4(a, q + (token - first) * pitch + k);
            kl_ldmatrix4_trans(b, w + k * F::W_PITCH);
            kl_mma(c[0], a, b);
            kl_mma(c[1], a, b + 2);
        }
        for (int i = 0; i < 4; i++) {
            int row = token + g + i % 2 * 8;
            uint16_t *out = p.rows + ((int64_t)row * p.H + h) * MLA_WIDTH + slice * F::SLICE + warp * 16 + i / 2 * 8 + 2 * t;
            const float *from = c[i / 2] + i % 2 * 2;
            if (row < p.tokens)
                *(uint32_t *)out = kl_pack_bf16(from[0] * p.scale, from[1] * p.scale);
        }
    }
}

/* ---- project: a warp takes 8 COLUMNS columns of one head for 16 TILES tokens ----
 * Sums over k have no order of their own: lane t of a group takes 8 values of k at a time, for either operand. */

enum { A_PITCH = MLA_R + 32, K_GROUPS = MLA_R / 32 };

template <int TILES, int WARPS> __device__ __forceinline__ void load_latent_rows(const ends &p, uint16_t *a, int h, int first)
{
    int tokens = min(p.tokens - first, TILES * TOKENS);
    for (int i = (int)threadIdx.x; i < (tokens + TOKENS - 1) / TOKENS * TOKENS * (MLA_R / 8); i += 32 * WARPS) {
        int token = i / (MLA_R / 8), c = i % (MLA_R / 8) * 8;
        kl_copy16(a + token * A_PITCH + c, p.a + (token < tokens ? ((int64_t)(first + token) * p.H + h) * MLA_R + c : 0), token < tokens);
    }
    kl_copy_commit();
    kl_copy_wait<0>();
    __syncthreads();
}

template <int TILES, int COLUMNS, int WARPS> __global__ void __launch_bounds__(32 * WARPS) project(const __grid_constant__ ends p)
{
    KL_SHARED(memory);
    uint16_t *rows = (uint16_t *)memory;
    int lane = kl_lane(), g = lane / 4, t = lane % 4, across = (p.Dv + 8 * COLUMNS * WARPS - 1) / (8 * COLUMNS * WARPS);
    int column = ((int)(blockIdx.x % across) * WARPS + (int)threadIdx.x / 32) * 8 * COLUMNS, h = (int)(blockIdx.x / across) % p.H;
    int first = (int)(blockIdx.x / across) / p.H * TOKENS * TILES;
    uint4 w[COLUMNS][K_GROUPS];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        int e = min(column + 8 * n + g, p.Dv - 1);
        const uint4 *from = (const uint4 *)(p.kv_b + ((int64_t)h * (p.Dn + p.Dv) + p.Dn + e) * MLA_R) + t;
#pragma unroll
        for (int i = 0; i < K_GROUPS; i++)
            w[n][i] = __ldg(from + 4 * i);
    }
    kl_grid_wait();
    load_latent_rows<TILES, WARPS>(p, rows, h, first);
    for (int token = first; token < p.tokens && token < first + TOKENS * TILES; token += TOKENS) {
        const uint16_t *low = rows + (token - first + g) * A_PITCH + 8 * t, *high = low + 8 * A_PITCH;
        float c[COLUMNS][4] = {};
#pragma unroll
        for (int i = 0; i < K_GROUPS; i++) {
            uint4 x = *(const uint4 *)(low + 32 * i), y = *(const uint4 *)(high + 32 * i);
            uint32_t a[4] = {x.x, y.x, x.y, y.y}, a_next[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                uint32_t b[2] = {w[n][i].x, w[n][i].y}, b_next[2] = {w[n][i].z, w[n][i].w};
                kl_mma(c[n], a, b);
                kl_mma(c[n], a_next, b_next);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; i++) {
            int row = token + g + i % 2 * 8, e = column + i / 2 * 8 + 2 * t;
            if (row < p.tokens && e < p.Dv)
                *(uint32_t *)(p.o + ((int64_t)row * p.H + h) * p.Dv + e) = kl_pack_bf16(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
        }
    }
}

ends ends_of(const mla_problem *p)
{
    ends x = {};
    x.tokens = p->N ? (int)(p->cu_q[p->N] - p->cu_q[0]) : 0;
    x.H = (int)p->H;
    x.Dn = (int)p->Dn;
    x.Dv = (int)p->Dv;
    x.kv_b = (const uint16_t *)p->kv_b;
    x.q_stride = mla_q_stride(p);
    x.scale = mla_scale(p) * 1.44269504f;
    if (x.tokens) {
        x.q = (const uint16_t *)p->q + p->cu_q[0] * x.q_stride;
        x.o = (uint16_t *)p->o + p->cu_q[0] * p->H * p->Dv;
    }
    return x;
}

int64_t shares(int64_t n, int64_t each) { return (n + each - 1) / each; }

template <int TILES, int WARPS> kl_status launch_absorb(const kl_ctx *ctx, const ends &x)
{
    using form = absorb_form<TILES, WARPS>;
    kl_grid g;
    g.threads = form::THREADS;
    g.shared = absorb_bytes<form>(x.Dn);
    g.x = (int64_t)form::SLICES * x.H * shares(x.tokens, TILES * TOKENS);
    return kl_launch(ctx, "mla absorb", g, absorb<form>, x);
}

template <int TILES, int COLUMNS, int WARPS> kl_status launch_project(const kl_ctx *ctx, const ends &x)
{
    kl_grid g;
    g.threads = 32 * WARPS;
    g.shared = TILES * TOKENS * A_PITCH * sizeof(uint16_t);
    g.overlap = true;
    g.x = shares(x.Dv, 8 * COLUMNS * WARPS) * x.H * shares(x.tokens, TILES * TOKENS);
    return kl_launch(ctx, "mla project", g, project<TILES, COLUMNS, WARPS>, x);
}

} // namespace

kl_status mla_cuda_absorb(const kl_ctx *ctx, const mla_problem *p, uint16_t *rows)
{
    kl_range range("mla absorb");
    ends x = ends_of(p);
    x.rows = rows;
    return x.tokens <= TOKENS ? launch_absorb<1, 4>(ctx, x) : launch_absorb<4, 8>(ctx, x);
}

kl_status mla_cuda_project(const kl_ctx *ctx, const mla_problem *p, const uint16_t *rows)
{
    kl_range range("mla project");
    ends x = ends_of(p);
    x.a = rows;
    return x.tokens <= TOKENS ? launch_project<1, 1, 4>(ctx, x) : launch_project<2, 2, 8>(ctx, x);
}
