#include "mla/cuda/absorb.cuh"

#include <algorithm>

namespace {

enum { THREADS = 128, WARPS = THREADS / 32, SLICE = 64, PITCH = SLICE + 8 };

struct ends {
    const uint16_t *q, *kv_b, *a;
    uint16_t *rows, *o;
    int tokens, H, Dn, Dv;
    int64_t q_stride;
    float scale;
};

__device__ __forceinline__ uint32_t pair_at(const uint16_t *x, bool there) { return there ? *(const uint32_t *)x : 0u; }

/* ---- absorb: a block takes 64 columns of one head for 16 TILES tokens, a warp 16 of them ---- */

struct absorb_room {
    alignas(128) uint16_t w[MLA_MOST_DN * PITCH];
};

__device__ __forceinline__ void load_weights(const ends &p, uint16_t *w, int h, int column)
{
    const uint16_t *from = p.kv_b + (int64_t)h * (p.Dn + p.Dv) * MLA_R + column;
    int rows = (p.Dn + 15) / 16 * 16;
    for (int i = (int)threadIdx.x; i < rows * (SLICE / 8); i += THREADS) {
        int d = i / (SLICE / 8), c = i % (SLICE / 8) * 8;
        kl_copy16(w + d * PITCH + c, from + (int64_t)(d < p.Dn ? d : 0) * MLA_R + c, d < p.Dn);
    }
    kl_copy_commit();
}

template <int TILES> __global__ void __launch_bounds__(THREADS) absorb(const __grid_constant__ ends p)
{
    KL_SHARED(memory);
    uint16_t *w = ((absorb_room *)memory)->w;
    int slice = (int)(blockIdx.x % (MLA_R / SLICE)), h = (int)(blockIdx.x / (MLA_R / SLICE)) % p.H;
    int first = (int)(blockIdx.x / (MLA_R / SLICE)) / p.H * 16 * TILES, lane = kl_lane(), g = lane / 4, t = lane % 4, warp = (int)threadIdx.x / 32;
    load_weights(p, w, h, slice * SLICE);
    kl_grid_wait();
    kl_grid_release();
    kl_copy_wait<0>();
    __syncthreads();
    int head = p.Dn + MLA_DR;
    const uint16_t *wk = w + (lane % 16) * PITCH + warp * 16 + lane / 16 * 8;
    for (int token = first; token < p.tokens && token < first + 16 * TILES; token += 16) {
        const uint16_t *q = p.q + (token + g) * p.q_stride + h * head;
        bool low = token + g < p.tokens, high = token + g + 8 < p.tokens;
        float c[2][4] = {};
        for (int k = 0; k < p.Dn; k += 16) {
            bool whole = k + 8 < p.Dn;
            const uint16_t *x = q + k + 2 * t, *y = x + 8 * p.q_stride;
            uint32_t a[4] = {pair_at(x, low), pair_at(y, high), pair_at(x + 8, low && whole), pair_at(y + 8, high && whole)}, b[4];
            kl_ldmatrix4_trans(b, wk + k * PITCH);
            kl_mma(c[0], a, b);
            kl_mma(c[1], a, b + 2);
        }
        for (int i = 0; i < 4; i++) {
            int row = token + g + i % 2 * 8;
            uint16_t *out = p.rows + ((int64_t)row * p.H + h) * MLA_WIDTH + slice * SLICE + warp * 16 + i / 2 * 8 + 2 * t;
            const float *from = c[i / 2] + i % 2 * 2;
            if (row < p.tokens)
                *(uint32_t *)out = kl_pack_bf16(from[0] * p.scale, from[1] * p.scale);
        }
        /* The part without expansion, a slice's share each: 8 columns. */
        for (int i = (int)threadIdx.x; i < 16 * 4; i += THREADS) {
            int row = token + i / 4, column = slice * (MLA_DR / (MLA_R / SLICE)) + i % 4 * 2;
            if (row >= p.tokens)
                continue;
            uint32_t x = *(const uint32_t *)(p.q + row * p.q_stride + h * head + p.Dn + column);
            *(uint32_t *)(p.rows + ((int64_t)row * p.H + h) * MLA_WIDTH + MLA_R + column) = kl_pack_bf16(kl_bf16_low(x) * p.scale, kl_bf16_high(x) * p.scale);
        }
    }
}

/* ---- project: a warp takes 8 COLUMNS columns of one head for 16 TILES tokens ----
 * Sums over k have no order of their own: lane t of a group takes 8 values of k at a time, for either operand. */

template <int TILES, int COLUMNS> __global__ void __launch_bounds__(THREADS) project(const __grid_constant__ ends p)
{
    constexpr int GROUPS = MLA_R / 32;
    int lane = kl_lane(), g = lane / 4, t = lane % 4, across = (p.Dv + 8 * COLUMNS * WARPS - 1) / (8 * COLUMNS * WARPS);
    int column = ((int)(blockIdx.x % across) * WARPS + (int)threadIdx.x / 32) * 8 * COLUMNS, h = (int)(blockIdx.x / across) % p.H;
    int first = (int)(blockIdx.x / across) / p.H * 16 * TILES;
    uint4 w[COLUMNS][GROUPS];
    for (int n = 0; n < COLUMNS; n++) {
        int e = min(column + 8 * n + g, p.Dv - 1);
        const uint4 *from = (const uint4 *)(p.kv_b + ((int64_t)h * (p.Dn + p.Dv) + p.Dn + e) * MLA_R) + t;
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            w[n][i] = __ldg(from + 4 * i);
    }
    kl_grid_wait();
    kl_grid_release();
    for (int token = first; token < p.tokens && token < first + 16 * TILES; token += 16) {
        const uint4 none = {0, 0, 0, 0};
        const uint4 *low = (const uint4 *)(p.a + ((int64_t)(token + g) * p.H + h) * MLA_R) + t, *high = low + (int64_t)8 * p.H * (MLA_R / 8);
        bool has_low = token + g < p.tokens, has_high = token + g + 8 < p.tokens;
        float c[COLUMNS][4] = {};
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            uint4 x = has_low ? low[4 * i] : none, y = has_high ? high[4 * i] : none;
            uint32_t a[4] = {x.x, y.x, x.y, y.y}, a_next[4] = {x.z, y.z, x.w, y.w};
            for (int n = 0; n < COLUMNS; n++) {
                uint32_t b[2] = {w[n][i].x, w[n][i].y}, b_next[2] = {w[n][i].z, w[n][i].w};
                kl_mma(c[n], a, b);
                kl_mma(c[n], a_next, b_next);
            }
        }
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

} // namespace

kl_status mla_cuda_absorb(const kl_ctx *ctx, const mla_problem *p, uint16_t *rows)
{
    ends x = ends_of(p);
    x.rows = rows;
    bool few = x.tokens <= 16;
    kl_grid g;
    g.threads = THREADS;
    g.shared = sizeof(absorb_room);
    g.overlap = true;
    g.x = (MLA_R / SLICE) * p->H * shares(x.tokens, few ? 16 : 64);
    return kl_launch(ctx, "mla absorb", g, few ? absorb<1> : absorb<4>, x);
}

kl_status mla_cuda_project(const kl_ctx *ctx, const mla_problem *p, const uint16_t *rows)
{
    ends x = ends_of(p);
    x.a = rows;
    bool few = x.tokens <= 16;
    kl_grid g;
    g.threads = THREADS;
    g.overlap = true;
    g.x = shares(p->Dv, (few ? 8 : 16) * WARPS) * p->H * shares(x.tokens, few ? 16 : 64);
    return kl_launch(ctx, "mla project", g, few ? project<1, 1> : project<4, 2>, x);
}
