/* The router: logits, scores, choice, weights.
 *
 * A token's logits have the same bits however many tokens come with it: the D columns are cut into at most SEGMENTS runs,
 * each is summed by the matrix unit in steps of 16, and the runs' sums are added in order. Few tokens give a warp to a
 * run, many walk through the runs one after the other. */
#include "common/gpu.h"
#include "moe/cuda/choose.cuh"

namespace {

enum { SEGMENTS = 8, STEP = 32, FEW_TOKENS = 256 };

int segment_of(int64_t D) { return (int)moe_ceil(D, SEGMENTS * STEP) * STEP; }

/* ---- a router of another type in bfloat16 parts: x = high + middle + low ---- */

__global__ void __launch_bounds__(256) split(const float *router, uint16_t *part, int64_t size)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    kl_grid_wait();
    if (i >= size)
        return;
    float x = router[i];
    for (int n = 0; n < 3; n++) {
        uint16_t rounded = kl_to_bf16(x);
        part[n * size + i] = rounded;
        x -= __uint_as_float((uint32_t)rounded << 16);
    }
}

/* ---- few tokens: a block has 8 experts and TOKENS tokens, a warp a run, which it has copied for itself ---- */

/* Columns at a time; rows in shared memory begin four banks apart. */
enum { PIECE = 288, PIECE_ROW = 2 * PIECE + 16 };

struct few {
    unsigned char w[SEGMENTS][8 * PIECE_ROW];
    float partial[3][SEGMENTS][16][8];
    uint64_t full[SEGMENTS];
    unsigned char x[]; /* [SEGMENTS][as many as there are][PIECE_ROW] */
};

/* Rows t0.. of x and e0.. of the router, n columns from `from` on; zeros up to whole steps. */
template <int TOKENS> __device__ __forceinline__ void copy_run(few &m, unsigned char *x, const moe_router_view &v, const uint16_t *router, int t0, int e0, int from, int n)
{
    int lane = kl_lane(), warp = (int)threadIdx.x / 32, tokens = min(v.T - t0, TOKENS), experts = min(v.E - e0, 8);
    bool expert = lane < 8, there = expert ? lane < experts : lane - 8 < tokens;
    unsigned char *to = expert ? m.w[warp] + lane * PIECE_ROW : x + (lane - 8) * PIECE_ROW;
    if (lane == 0)
        kl_mbar_expect(&m.full[warp], (tokens + experts) * 2 * n);
    if (n % 16 && (expert || there))
        *(uint4 *)(to + 2 * n) = make_uint4(0, 0, 0, 0);
    __syncwarp();
    if (there)
        kl_bulk_load(to, (expert ? router + (int64_t)(e0 + lane) * v.D : v.x + (int64_t)(t0 + lane - 8) * v.D) + from, 2 * n, &m.full[warp]);
}

/* The first thread also sets *cleared (NULL: nothing) to 0. */
template <int TOKENS> __global__ void __launch_bounds__(32 * SEGMENTS) logits_few(const __grid_constant__ moe_router_view v, float *logit, int segment, int *cleared)
{
    enum { LINE = 64, BATCH = 3 }; /* columns of 128 bytes; steps whose operands are read together */
    KL_SHARED(memory);
    few &m = *(few *)memory;
    int lane = kl_lane(), warp = (int)threadIdx.x / 32, g = lane / 4, c = 2 * (lane & 3), turn = 0;
    int groups = (v.E + 7) / 8, e0 = (int)blockIdx.x % groups * 8, t0 = (int)blockIdx.x / groups * TOKENS;
    int end = (warp + 1) * segment < v.D ? (warp + 1) * segment : v.D;
    for (int n = 0; n < v.parts; n++)
        for (int at = (int)threadIdx.x * LINE; at < min(8, v.E - e0) * v.D; at += 32 * SEGMENTS * LINE)
            kl_prefetch(v.router + ((int64_t)n * v.E + e0) * v.D + at);
    if (lane == 0) {
        kl_mbar_init(&m.full[warp], 1);
        kl_mbar_init_fence();
    }
    __syncwarp();
    kl_grid_wait();
    kl_grid_release();
    if (cleared && blockIdx.x == 0 && threadIdx.x == 0)
        *cleared = 0;
    int rows = min(v.T, TOKENS);
    unsigned char *own = m.x + warp * rows * PIECE_ROW;
    const unsigned char *x = own + min(lane & (TOKENS - 1), rows - 1) * PIECE_ROW, *w = m.w[warp] + (lane & 7) * PIECE_ROW;
    for (int n = 0; n < v.parts; n++) {
        float sum[4] = {};
        for (int from = warp * segment; from < end; from += PIECE, turn ^= 1) {
            int columns = min(end - from, (int)PIECE);
            copy_run<TOKENS>(m, own, v, v.router + (int64_t)n * v.E * v.D, t0, e0, from, columns);
            kl_mbar_wait(&m.full[warp], turn);
            for (int k = 0; k < columns; k += 16 * BATCH) {
                uint32_t a[BATCH][4], b[BATCH][4];
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    int at = 2 * (k + 16 * i < columns ? k + 16 * i : k);
                    if (TOKENS == 8) {
                        kl_ldmatrix4(b[i], (lane < 16 ? x : w) + at + (lane & 8) * 2);
                        a[i][0] = b[i][0], a[i][1] = 0, a[i][2] = b[i][1], a[i][3] = 0, b[i][0] = b[i][2], b[i][1] = b[i][3];
                    } else {
                        kl_ldmatrix4(a[i], x + at + (lane & 16));
                        kl_ldmatrix2(b[i], w + at + (lane & 8) * 2);
                    }
                }
#pragma unroll
                for (int i = 0; i < BATCH; i++)
                    if (k + 16 * i < columns)
                        kl_mma(sum, a[i], b[i]);
            }
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            m.partial[n][warp][g + 8 * (i >> 1)][c + (i & 1)] = sum[i];
    }
    __syncthreads();
    int t = (int)threadIdx.x / 8, e = (int)threadIdx.x % 8;
    if (threadIdx.x >= 8 * TOKENS || t0 + t >= v.T || e0 + e >= v.E)
        return;
    float sum = 0.0f;
    for (int n = 0; n < v.parts; n++)
#pragma unroll
        for (int i = 0; i < SEGMENTS; i++)
            sum += m.partial[n][i][t][e];
    logit[(int64_t)(t0 + t) * v.E + e0 + e] = sum;
}

/* ---- many tokens: a block has 128 tokens and 128 experts, a warp 32 of each ---- */

enum { TILE = 128, STAGES = 6, TILE_BYTES = TILE * STEP * 2, MANY_THREADS = 4 * TILE };

/* 16 bytes (quarter of a row's 64) of a tile; rows two apart share banks but for the exchange of quarters. */
__device__ __forceinline__ unsigned char *quarter_of(unsigned char *tile, int row, int quarter)
{
    return tile + row * (STEP * 2) + ((quarter ^ (row >> 1 & 3)) << 4);
}

/* A thread's quarter of a row of x and of the router, step after step. */
struct fetcher {
    const uint16_t *x, *w;
    bool token, expert;
    int column, D, slot; /* column: of the next step */
    int64_t part;        /* from the end of a row to its beginning in the router's next part */

    __device__ __forceinline__ void fetch(unsigned char *memory, bool more)
    {
        int row = (int)threadIdx.x / 4, quarter = (int)threadIdx.x % 4;
        unsigned char *stage = memory + slot * 2 * TILE_BYTES;
        bool inside = column + 8 * quarter < D;
        if (more) {
            kl_copy16(quarter_of(stage, row, quarter), inside && token ? x + column : x, inside && token);
            kl_copy16(quarter_of(stage + TILE_BYTES, row, quarter), inside && expert ? w + column : w, inside && expert);
        }
        kl_copy_commit();
        column += STEP;
        if (column >= D) {
            column = 0;
            w += part;
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
};

__global__ void __launch_bounds__(MANY_THREADS, 1) logits_many(const __grid_constant__ moe_router_view v, float *logit, int segment)
{
    KL_SHARED(memory);
    int lane = kl_lane(), warp = (int)threadIdx.x / 32, row = warp / 4 * 32, column = warp % 4 * 32;
    int across = (v.E + TILE - 1) / TILE, e0 = (int)blockIdx.x % across * TILE, t0 = (int)blockIdx.x / across * TILE;
    int own = (int)threadIdx.x / 4, ahead = 0, all = (v.D + STEP - 1) / STEP * v.parts, slot = 0, k = 0;
    bool token = t0 + own < v.T, expert = e0 + own < v.E;
    int64_t wide = v.D;
    fetcher f = {v.x + (token ? (t0 + own) * wide : 0) + threadIdx.x % 4 * 8, v.router + (expert ? (e0 + own) * wide : 0) + threadIdx.x % 4 * 8,
                 token, expert, 0, v.D, 0, v.E * wide};
    float sum[2][4][4] = {}, run[2][4][4] = {};
    kl_grid_wait();
    for (; ahead < STAGES - 1; ahead++)
        f.fetch(memory, ahead < all);
    for (int i = 0; i < all; i++) {
        kl_copy_wait<STAGES - 2>();
        __syncthreads();
        f.fetch(memory, ahead++ < all);
        unsigned char *x = memory + slot * 2 * TILE_BYTES, *w = x + TILE_BYTES;
#pragma unroll
        for (int half = 0; half < STEP / 16; half++) {
            uint32_t a[2][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
                kl_ldmatrix4(a[m], quarter_of(x, row + 16 * m + (lane & 15), 2 * half + (lane >> 4)));
#pragma unroll
            for (int n = 0; n < 2; n++)
                kl_ldmatrix4(b[n], quarter_of(w, column + 16 * n + (lane >> 4) * 8 + (lane & 7), 2 * half + (lane >> 3 & 1)));
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    kl_mma(run[m][n], a[m], &b[n / 2][2 * (n & 1)]);
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        k += STEP;
        if (k % segment == 0 || k >= v.D)
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        sum[m][n][j] += run[m][n][j];
                        run[m][n][j] = 0.0f;
                    }
        k = k >= v.D ? 0 : k;
    }
    kl_grid_release();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int64_t t = t0 + row + 16 * m + lane / 4 + 8 * (j >> 1);
                int e = e0 + column + 8 * n + 2 * (lane & 3) + (j & 1);
                if (t < v.T && e < v.E)
                    logit[t * v.E + e] = sum[m][n][j];
            }
}

/* ---- the choice: a warp a token, a block a chunk ---- */

struct chosen {
    moe_device_routes r;
    int *id;        /* what the caller wants of it, or NULL */
    float *weight;
};

__global__ void __launch_bounds__(32 * MOE_CHUNK) choose(const __grid_constant__ moe_router_view v, const __grid_constant__ chosen out)
{
    KL_SHARED(memory);
    uint32_t *mask = (uint32_t *)memory;
    int lane = kl_lane(), warp = (int)threadIdx.x / 32, words = moe_choice_words(v.E, v.n_group);
    int64_t t = (int64_t)blockIdx.x * MOE_CHUNK + warp;
    for (int e = (int)threadIdx.x; e < v.E; e += (int)blockDim.x)
        mask[e] = 0;
    __syncthreads();
    kl_grid_wait();
    if (t < v.T) {
        moe_choice c = moe_choose(v, out.r.logit + t * v.E, mask + v.E + warp * words);
        if (lane < v.top_k) {
            int64_t i = t * v.top_k + lane;
            atomicOr(&mask[c.id], 1u << warp);
            out.r.id[i] = c.id;
            out.r.weight[i] = c.weight;
            if (out.id)
                out.id[i] = c.id;
            if (out.weight)
                out.weight[i] = c.weight;
        }
        if (lane == 0)
            out.r.sum[t] = c.sum;
    }
    kl_grid_release();
    __syncthreads();
    for (int e = (int)threadIdx.x; e < v.E; e += (int)blockDim.x)
        out.r.mask[(int64_t)blockIdx.x * v.E + e] = mask[e];
}

kl_status split_router(const kl_ctx *ctx, const moe_problem *p, uint16_t *part)
{
    kl_grid g;
    g.x = moe_ceil(p->E * p->D, 256);
    g.threads = 256;
    g.overlap = true;
    return kl_launch(ctx, "moe router parts", g, split, (const float *)p->router, part, p->E * p->D);
}

} // namespace

moe_device_routes moe_device_routes_carve(kl_arena *a, const moe_problem *p, int64_t tokens)
{
    moe_device_routes r;
    r.logit = KL_TAKE(a, float, tokens * p->E);
    r.weight = KL_TAKE(a, float, tokens * p->top_k);
    r.sum = KL_TAKE(a, float, tokens);
    r.id = KL_TAKE(a, int, tokens * p->top_k);
    r.mask = KL_TAKE(a, uint32_t, moe_ceil(tokens, MOE_CHUNK) * p->E);
    r.split = p->router_dtype == KL_BF16 ? nullptr : KL_TAKE(a, uint16_t, 3 * p->E * p->D);
    return r;
}

moe_router_view moe_view_of(const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r)
{
    moe_router_view v;
    v.T = (int)count, v.D = (int)p->D, v.E = (int)p->E, v.top_k = (int)p->top_k;
    v.n_group = (int)p->n_group, v.topk_group = (int)p->topk_group;
    v.softmax = p->router_kind == MOE_SOFTMAX;
    v.renormalize = p->renormalize;
    v.biased_weights = p->biased_weights;
    v.scale = p->scale != 0.0f ? p->scale : 1.0f;
    v.x = (const uint16_t *)p->x + t * p->D;
    v.router = r->split ? r->split : (const uint16_t *)p->router;
    v.parts = r->split ? 3 : 1;
    v.bias = p->bias;
    return v;
}

kl_status moe_device_logits(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r, int *cleared)
{
    if (r->split && t == 0)
        KL_TRY(split_router(ctx, p, r->split));
    moe_router_view v = moe_view_of(p, t, count, r);
    kl_grid g;
    g.overlap = true;
    if (count <= FEW_TOKENS) {
        g.x = moe_ceil(count, count <= 8 ? 8 : 16) * moe_ceil(p->E, 8);
        g.threads = 32 * SEGMENTS;
        g.shared = sizeof(few) + SEGMENTS * PIECE_ROW * (size_t)(count < 16 ? count : 16);
        return kl_launch(ctx, "moe logits", g, count <= 8 ? logits_few<8> : logits_few<16>, v, r->logit, segment_of(p->D), cleared);
    }
    g.x = moe_ceil(count, TILE) * moe_ceil(p->E, TILE);
    g.threads = MANY_THREADS;
    g.shared = (size_t)STAGES * 2 * TILE_BYTES;
    return kl_launch(ctx, "moe logits", g, logits_many, v, r->logit, segment_of(p->D));
}

kl_status moe_device_route(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r)
{
    kl_range range("moe router");
    KL_TRY(moe_device_logits(ctx, p, t, count, r, nullptr));
    chosen out = {*r, p->chosen ? p->chosen + t * p->top_k : nullptr, p->chosen_weight ? p->chosen_weight + t * p->top_k : nullptr};
    kl_grid g;
    g.x = moe_ceil(count, MOE_CHUNK);
    g.threads = 32 * (count < MOE_CHUNK ? (int)count : MOE_CHUNK);
    g.shared = (size_t)(p->E + g.threads / 32 * moe_choice_words((int)p->E, (int)p->n_group)) * sizeof(uint32_t);
    g.overlap = true;
    return kl_launch(ctx, "moe choose", g, choose, moe_view_of(p, t, count, r), out);
}
