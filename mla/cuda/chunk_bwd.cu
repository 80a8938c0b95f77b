/* The chunk backward. Of a batch's heads, as many at a time as a fixed budget holds:
 *
 *     expand; attend, unless the caller has o and lse         delta_i = o_i . do_i
 *     dq; dk, dv (chunk_bwd_q.cu, chunk_bwd_kv.cu)
 *     dlatent_j = sum_h Wk_h^T dk_jh + Wv_h^T dv_jh        dpe_j = sum_h dk_jh[Dn:]        dWk_h += sum_j dk_jh latent_j^T, dWv_h likewise
 *
 * No sum is split among blocks, so that all runs give the same bits. */
#include "mla/cuda/chunk_bwd.cuh"

namespace {

enum { BUDGET_MEGABYTES = 2048, THREADS = 256 };

/* o [Tq, heads, Dv] and lse [Tq, heads], of which those from head0 on are meant. */
struct attended {
    const uint16_t *o;
    const float *lse;
    int heads, head0;
};

/* One warp a query and head; stats [Tq, heads]. */
__global__ void __launch_bounds__(THREADS) make_stats(attended x, const uint16_t *d_o, float2 *stats, int64_t token0, int64_t pairs, int heads, int H, int head0, int Dv)
{
    int64_t pair = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, to = token0 * heads + pair;
    if (pair >= pairs)
        return;
    int64_t token = to / heads, head = to % heads, at = token * x.heads + x.head0 + head, other = token * H + head0 + head;
    float sum = 0.0f;
    for (int d = 4 * kl_lane(); d < Dv; d += 128) {
        uint2 o = *(const uint2 *)(x.o + at * Dv + d), y = *(const uint2 *)(d_o + other * Dv + d);
        sum += kl_bf16_low(o.x) * kl_bf16_low(y.x) + kl_bf16_high(o.x) * kl_bf16_high(y.x) + kl_bf16_low(o.y) * kl_bf16_low(y.y) +
               kl_bf16_high(o.y) * kl_bf16_high(y.y);
    }
    sum = kl_warp_sum(sum);
    if (kl_lane() == 0)
        stats[to] = make_float2(x.lse[at] * 1.44269504f, sum);
}

/* MLA_BLOCK keys of a sequence, a block's: where their rows begin among the latents and in the batch. */
struct span {
    int64_t latent_row, row;
    int rows;
};

__device__ __forceinline__ span span_of(mla_sequences all)
{
    all.heads = 1;
    mla_item it = mla_find_item<true>(all, blockIdx.x);
    int key = it.block * MLA_BLOCK;
    return {it.s.latent_row + key, it.s.key_row + key, min(it.s.keys - key, (int)MLA_BLOCK)};
}

/* pe of the batch's rows, one after the other. */
__global__ void __launch_bounds__(THREADS) copy_pe(mla_sequences all, const uint16_t *latent, int64_t width, int R, int Dr, uint16_t *pe)
{
    span s = span_of(all);
    for (int i = (int)threadIdx.x; i < s.rows * (Dr / 8); i += THREADS) {
        int64_t row = i / (Dr / 8), column = i % (Dr / 8) * 8;
        *(uint4 *)(pe + (s.row + row) * Dr + column) = *(const uint4 *)(latent + (s.latent_row + row) * width + R + column);
    }
}

/* dlatent_j[R:] (+)= sum_h dpe_jh */
__global__ void __launch_bounds__(THREADS) sum_pe(mla_sequences all, const uint16_t *dpe, int64_t width, int R, int Dr, bool add, float *dlatent)
{
    span s = span_of(all);
    for (int i = (int)threadIdx.x; i < s.rows * (Dr / 8); i += THREADS) {
        int64_t row = i / (Dr / 8), column = i % (Dr / 8) * 8;
        const uint16_t *from = dpe + (s.row + row) * all.heads * Dr + column;
        float4 *to = (float4 *)(dlatent + (s.latent_row + row) * width + R + column), none = {0.0f, 0.0f, 0.0f, 0.0f};
        float4 low = add ? to[0] : none, high = add ? to[1] : none;
#pragma unroll 8
        for (int h = 0; h < all.heads; h++) {
            uint4 x = *(const uint4 *)(from + h * Dr);
            low.x += kl_bf16_low(x.x), low.y += kl_bf16_high(x.x), low.z += kl_bf16_low(x.y), low.w += kl_bf16_high(x.y);
            high.x += kl_bf16_low(x.z), high.y += kl_bf16_high(x.z), high.z += kl_bf16_low(x.w), high.w += kl_bf16_high(x.w);
        }
        to[0] = low;
        to[1] = high;
    }
}

/* ---- on the host ---- */

struct workspace {
    unsigned char *product;
    mla_sequence *table;            /* [N] */
    uint16_t *expanded, *dexpanded; /* [most rows times heads, Dn + Dv] */
    uint16_t *pe, *dpe;             /* [most rows, Dr]; [most rows times heads, Dr] */
    uint16_t *o;                    /* [Tq, most heads, Dv] */
    float *lse;                     /* [Tq, most heads] */
    float2 *stats;
};

size_t row_bytes(const mla_problem *p) { return (size_t)(2 * (p->Dn + p->Dv) + p->Dr + p->Dv) * 2; }

mla_batch next_batch(const mla_problem *p, int64_t n) { return mla_next_batch(p, n, row_bytes(p), (size_t)BUDGET_MEGABYTES << 20); }

workspace carve(const mla_problem *p, kl_arena *a)
{
    size_t rows = 0, units = 0, heads = 0;
    for (int64_t n = 0; n < p->N;) {
        mla_batch b = next_batch(p, n);
        rows = max(rows, (size_t)b.rows);
        units = max(units, (size_t)(b.rows * b.heads));
        heads = max(heads, (size_t)(b.rows ? b.heads : 0));
        n = b.n1;
    }
    size_t queries = kl_mul(p->N ? (size_t)p->cu_q[p->N] : 0, heads, &a->overflow), head = (size_t)(p->Dn + p->Dv);
    workspace w;
    w.product = KL_TAKE(a, unsigned char, KL_PRODUCT_WORKSPACE + 256);
    w.product += -(uintptr_t)w.product % 256; /* as the library wants it */
    w.table = KL_TAKE(a, mla_sequence, p->N);
    w.expanded = KL_TAKE(a, uint16_t, kl_mul(units, head, &a->overflow));
    w.dexpanded = KL_TAKE(a, uint16_t, kl_mul(units, head, &a->overflow));
    w.pe = KL_TAKE(a, uint16_t, kl_mul(rows, (size_t)p->Dr, &a->overflow));
    w.dpe = KL_TAKE(a, uint16_t, kl_mul(units, (size_t)p->Dr, &a->overflow));
    w.o = KL_TAKE(a, uint16_t, kl_mul(queries, (size_t)p->Dv, &a->overflow));
    w.lse = KL_TAKE(a, float, queries);
    w.stats = KL_TAKE(a, float2, queries);
    return w;
}

kl_grid grid_of(int64_t blocks)
{
    kl_grid g;
    g.threads = THREADS;
    g.x = blocks;
    return g;
}

/* dlatent of the R normalised columns, and dkv_b, from the gradients of a piece's expanded rows. */
kl_status contract(kl_ctx *ctx, const mla_problem *p, const mla_grads *g, const workspace &w, const mla_batch &b, const mla_piece &x)
{
    kl_range range("mla contract");
    int64_t width = p->R + p->Dr, head = p->Dn + p->Dv;
    kl_product down = {}, weights = {};
    down.N = p->R, down.K = x.heads * head;
    down.a_stride = down.K, down.b_stride = p->R, down.y_stride = width;
    down.y_dtype = weights.y_dtype = KL_F32;
    weights.M = x.heads * head, weights.N = p->R;
    weights.a_stride = weights.M, weights.b_stride = width, weights.y_stride = p->R;
    weights.a_transposed = true;
    for (mla_run r = mla_first_run(p, b); r.rows; r = mla_next_run(p, b, r)) {
        const uint16_t *dexpanded = w.dexpanded + (size_t)r.row * (size_t)down.a_stride;
        down.M = weights.K = r.rows;
        if (g->dlatent) {
            float *y = g->dlatent + (size_t)r.latent_row * (size_t)width;
            KL_TRY(kl_gpu_product(ctx, &down, 1.0f, dexpanded, mla_weight_at(p, x.head0, 0, 0), x.head0 ? 1.0f : 0.0f, y, y, w.product, KL_PRODUCT_WORKSPACE));
        }
        if (g->dkv_b) {
            float *y = g->dkv_b + (size_t)x.head0 * (size_t)(head * p->R);
            KL_TRY(kl_gpu_product(ctx, &weights, 1.0f, dexpanded, mla_latent_at(p, r.latent_row, 0), 1.0f, y, y, w.product, KL_PRODUCT_WORKSPACE));
        }
    }
    return kl_ok();
}

kl_status run(kl_ctx *ctx, const mla_problem *p, const mla_grads *g, const workspace &w, const mla_batch &b)
{
    mla_sequences sequences;
    int64_t tokens = p->cu_q[b.n1] - p->cu_q[b.n0], width = p->R + p->Dr;
    const uint16_t *d_o = (const uint16_t *)g->d_o, *o = (const uint16_t *)g->o;
    KL_TRY(mla_upload_sequences(ctx, p, b, true, w.table, &sequences));
    if (p->Dr)
        KL_TRY(kl_launch(ctx, "mla copy_pe", grid_of(sequences.key_blocks), copy_pe, sequences, (const uint16_t *)p->latent, width, (int)p->R, (int)p->Dr, w.pe));
    for (int64_t h = 0; h < p->H; h += b.heads) {
        mla_piece x = mla_piece_of(p, b, sequences, h, w.expanded);
        x.pe = p->Dr ? w.pe : w.expanded, x.pe_rows = b.rows, x.pe_stride = p->Dr ? p->Dr : 8;
        int64_t pairs = tokens * x.heads;
        KL_TRY(mla_expand_rows(ctx, p, b, h, x.heads, w.expanded, w.product));
        attended done = o ? attended{o, g->lse, (int)p->H, (int)h} : attended{w.o, w.lse, (int)x.heads, 0};
        if (!o)
            KL_TRY(mla_attend(ctx, p, x, w.o, w.lse, x.heads, 0));
        KL_TRY(kl_launch(ctx, "mla make_stats", grid_of((pairs + THREADS / 32 - 1) / (THREADS / 32)), make_stats, done, d_o, w.stats, p->cu_q[b.n0], pairs,
                         (int)x.heads, (int)p->H, (int)h, (int)p->Dv));
        if (g->dq)
            KL_TRY(mla_query_gradients(ctx, p, x, d_o, w.stats, (uint16_t *)g->dq));
        if (!g->dlatent && !g->dkv_b)
            continue;
        KL_TRY(mla_key_gradients(ctx, p, x, d_o, w.stats, w.dexpanded, w.dpe));
        KL_TRY(contract(ctx, p, g, w, b, x));
        if (g->dlatent && p->Dr)
            KL_TRY(kl_launch(ctx, "mla sum_pe", grid_of(sequences.key_blocks), sum_pe, x.sequences, (const uint16_t *)w.dpe, width, (int)p->R, (int)p->Dr, h > 0,
                             g->dlatent));
    }
    return kl_ok();
}

} // namespace

kl_status mla_describe_bwd(mla_bwd_reads *r, const mla_problem *p, const mla_piece &x, const uint16_t *d_o, const float2 *stats, int queries, int keys)
{
    KL_TRY(mla_describe(r, p, x, queries, keys));
    r->stats = stats;
    return mla_map_heads(&r->d_o, "d_o", d_o, p->cu_q[p->N], p->H * p->Dv, p->H, p->Dv, 0, p->Dv, queries);
}

size_t mla_chunk_bwd_workspace(const mla_problem *p)
{
    kl_arena a = kl_arena_count();
    carve(p, &a);
    return mla_arena_bytes(&a);
}

kl_status mla_cuda_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *memory, size_t bytes)
{
    const mla_problem *p = (const mla_problem *)problem;
    const mla_grads *g = (const mla_grads *)grads;
    KL_TRY(mla_enter_cuda(ctx, p, "chunk", false));
    KL_TRY(mla_check_chunk(p));
    KL_TRY(mla_validate_grads(p, g));
    const struct { const char *name; const void *at; } tensor[] = {{"d_o", g->d_o}, {"o", g->o}, {"dq", g->dq}, {"dlatent", g->dlatent}, {"dkv_b", g->dkv_b}};
    for (auto &t : tensor)
        KL_REQUIRE((uintptr_t)t.at % 16 == 0, "%s: expected an address that is a multiple of 16 on cuda, got %p", t.name, t.at);
    KL_TRY(mla_check_workspace(memory, bytes, mla_chunk_bwd_workspace(p)));
    kl_arena a = kl_arena_over(memory, bytes);
    workspace w = carve(p, &a);
    size_t row = (size_t)(p->R + p->Dr) * sizeof(float);
    for (int64_t n = 0; g->dlatent && n < p->N; n++)
        if (!mla_queries(p, n))
            KL_TRY(kl_gpu_fill(ctx, (char *)g->dlatent + (size_t)p->kv_start[n] * row, 0, (size_t)p->kv_len[n] * row));
    for (int64_t n = 0; n < p->N;) {
        mla_batch b = next_batch(p, n);
        n = b.n1;
        if (b.rows)
            KL_TRY(run(ctx, p, g, w, b));
    }
    return kl_ok();
}
