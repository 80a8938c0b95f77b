/* Gradients of the chunk form. Per head, with P recomputed tile by tile from the log of each row's denominator:
 *
 *     p_ij = e^(s_ij - lse_i),  dp_ij = do_i . v_j,  delta_i = sum_j p_ij dp_ij,  ds_ij = scale p_ij (dp_ij - delta_i)
 *     dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i,   dv_j = sum_i p_ij do_i
 *
 * then through the expansion, with heads (for dc) and sequences (for dW) added in ascending order:
 *
 *     dc_j = sum_h [ Wk_h^T dk_jh + Wv_h^T dv_jh | dpe_jh ],  dWk_h += sum_j dk_jh c_j^T,  dWv_h += sum_j dv_jh c_j^T
 *
 * Heads are taken in groups whose expanded rows and their gradients fit a budget. */
#include <string.h>

#include "common/blas.h"
#include "common/simd.h"
#include "mla/cpu/internal.h"

/* Bytes of expanded rows and their gradients kept at a time; one head is always kept whole. */
static const int64_t budget = (int64_t)128 << 20;
enum { COLUMNS = 128 }; /* of the latent, in one tile of dW */

typedef struct workspace {
    int64_t *key_sum;           /* [N+1] */
    float *expanded, *gradient; /* [capacity, Dn+Dr+Dv] */
    float *scratch;             /* [threads, per_thread] */
    int64_t capacity, per_thread, longest;
} workspace;

/* What one thread needs while it walks a unit. */
typedef struct tiles {
    float *lse, *delta; /* [queries of the unit] */
    float *s, *dp;      /* [MLA_QUERY_TILE, MLA_KEY_TILE] */
} tiles;

static workspace carve(const kl_ctx *ctx, const mla_problem *p, kl_arena *a)
{
    workspace w = {0};
    int64_t most = 0, all = 0, fits = budget / (2 * mla_row(p) * (int64_t)sizeof(float));
    for (int64_t n = 0; n < p->N; n++) {
        most = mla_max(most, p->kv_len[n]);
        all += p->kv_len[n];
        w.longest = mla_max(w.longest, mla_queries(p, n));
    }
    w.longest = kl_ceil_div(w.longest, KL_LANES) * KL_LANES;
    w.capacity = all <= fits / p->H ? all * p->H : mla_max(fits, most);
    int64_t walk = 2 * w.longest + 2 * MLA_QUERY_TILE * MLA_KEY_TILE;
    int64_t columns = mla_max(COLUMNS, p->Dn + p->Dv) * MLA_KEY_TILE + MLA_KEY_TILE * p->R;
    w.per_thread = kl_ceil_div(mla_max(mla_max(mla_expand_scratch(p), walk), columns), KL_LANES) * KL_LANES;
    w.key_sum = KL_TAKE(a, int64_t, p->N + 1);
    w.expanded = KL_TAKE(a, float, kl_mul((size_t)w.capacity, (size_t)mla_row(p), &a->overflow));
    w.gradient = KL_TAKE(a, float, kl_mul((size_t)w.capacity, (size_t)mla_row(p), &a->overflow));
    w.scratch = KL_TAKE(a, float, kl_mul((size_t)ctx->threads, (size_t)w.per_thread, &a->overflow));
    return w;
}

size_t mla_chunk_backward_workspace(const kl_ctx *ctx, const mla_problem *p)
{
    kl_arena a = kl_arena_count();
    carve(ctx, p, &a);
    return mla_arena_bytes(&a);
}

/* Where head h of query i of sequence n lies in q and dq, and in d_o. */
static size_t q_at(const mla_problem *p, int64_t n, int64_t h, int64_t i)
{
    return (size_t)(p->cu_q[n] + i) * (size_t)mla_q_stride(p) + (size_t)(h * (p->Dn + p->Dr));
}
static size_t o_at(const mla_problem *p, int64_t n, int64_t h, int64_t i)
{
    return ((size_t)(p->cu_q[n] + i) * (size_t)p->H + (size_t)h) * (size_t)p->Dv;
}

/* s = scale q k^T and dp = do v^T for queries i.., keys of the tile kv. */
static void scores(const mla_problem *p, const float *d_o, int64_t n, int64_t h, int64_t i, int64_t rows, const float *kv,
                   int64_t keys, const tiles *t)
{
    int64_t D = p->Dn + p->Dr;
    kl_gemm_serial(KL_N, KL_T, rows, keys, D, mla_scale(p), (const float *)p->q + q_at(p, n, h, i), mla_q_stride(p), kv, mla_row(p),
                   0.0f, t->s, MLA_KEY_TILE);
    kl_gemm_serial(KL_N, KL_T, rows, keys, p->Dv, 1.0f, d_o + o_at(p, n, h, i), p->H * p->Dv, kv + D, mla_row(p), 0.0f, t->dp,
                   MLA_KEY_TILE);
}

/* One row of a tile for the statistics: m, l and r = sum_j e^(s_ij - m) dp_ij move on by `seen` keys. */
static void statistics_row(float *s, const float *dp, int64_t seen, float *m, float *l, float *r)
{
    kl_v top = kl_vset(*m), sum = {0}, product = {0};
    for (int64_t j = 0; j < seen; j += KL_LANES) {
        int64_t size = mla_min(KL_LANES, seen - j);
        for (int64_t x = size; x < KL_LANES; x++)
            s[j + x] = -INFINITY;
        top = kl_vmax(top, kl_vload(s + j));
    }
    float best = kl_vmax_lane(top);
    for (int64_t j = 0; j < seen; j += KL_LANES) {
        int64_t size = mla_min(KL_LANES, seen - j);
        kl_v e = kl_vexp(kl_vload(s + j) - best);
        sum += e;
        product += e * kl_vload_up_to(dp + j, size);
    }
    float factor = expf(*m - best);
    *m = best;
    *l = *l * factor + kl_vsum(sum);
    *r = *r * factor + kl_vsum(product);
}

/* lse_i = m_i + ln l_i,  delta_i = r_i / l_i */
static void statistics(const mla_problem *p, const float *d_o, int64_t n, int64_t h, const float *kv, const tiles *t)
{
    int64_t queries = mla_queries(p, n), before = p->kv_len[n] - queries;
    for (int64_t i = 0; i < queries; i += MLA_QUERY_TILE) {
        int64_t rows = mla_min(MLA_QUERY_TILE, queries - i), last = before + i + rows;
        float m[MLA_QUERY_TILE], l[MLA_QUERY_TILE] = {0}, r[MLA_QUERY_TILE] = {0};
        for (int64_t x = 0; x < rows; x++)
            m[x] = -INFINITY;
        for (int64_t j = 0; j < last; j += MLA_KEY_TILE) {
            int64_t keys = mla_min(MLA_KEY_TILE, last - j);
            scores(p, d_o, n, h, i, rows, kv + (size_t)j * (size_t)mla_row(p), keys, t);
            for (int64_t x = 0; x < rows; x++) {
                int64_t seen = mla_min(before + i + x + 1 - j, keys);
                if (seen > 0)
                    statistics_row(t->s + x * MLA_KEY_TILE, t->dp + x * MLA_KEY_TILE, seen, &m[x], &l[x], &r[x]);
            }
        }
        for (int64_t x = 0; x < rows; x++) {
            t->lse[i + x] = m[x] + logf(l[x]);
            t->delta[i + x] = r[x] / l[x];
        }
    }
}

/* The same from what the forward pass left:  delta_i = o_i . do_i */
static void given_statistics(const mla_problem *p, const mla_grads *g, int64_t n, int64_t h, const tiles *t)
{
    for (int64_t i = 0; i < mla_queries(p, n); i++) {
        const float *o = (const float *)g->o + o_at(p, n, h, i), *d_o = (const float *)g->d_o + o_at(p, n, h, i);
        kl_v sum = {0};
        for (int64_t e = 0; e < p->Dv; e += KL_LANES) {
            int64_t size = mla_min(KL_LANES, p->Dv - e);
            sum += kl_vload_up_to(o + e, size) * kl_vload_up_to(d_o + e, size);
        }
        t->lse[i] = g->lse[(p->cu_q[n] + i) * p->H + h];
        t->delta[i] = kl_vsum(sum);
    }
}

/* s becomes p, dp becomes ds; both 0 where hidden. */
static void gradients_row(float *s, float *dp, int64_t seen, int64_t keys, float lse, float delta, float scale)
{
    int64_t padded = kl_ceil_div(keys, KL_LANES) * KL_LANES;
    for (int64_t j = mla_max(seen, 0); j < padded; j++) {
        s[j] = -INFINITY;
        dp[j] = 0.0f;
    }
    for (int64_t j = 0; j < padded; j += KL_LANES) {
        kl_v probability = kl_vexp(kl_vload(s + j) - lse);
        kl_vstore(s + j, probability);
        kl_vstore(dp + j, probability * (kl_vload(dp + j) - delta) * scale);
    }
}

/* Keys j .. j+keys-1 of one unit meet every query that sees them. dkv is NULL when only dq is wanted. */
static void key_tile(const mla_problem *p, const mla_grads *g, int64_t n, int64_t h, int64_t j, int64_t keys, const float *kv,
                     float *dkv, const tiles *t)
{
    int64_t D = p->Dn + p->Dr, E = mla_row(p), queries = mla_queries(p, n), before = p->kv_len[n] - queries;
    const float *q = p->q, *d_o = g->d_o;
    float *dq = g->dq;
    int64_t first = mla_max(j - before, 0) / MLA_QUERY_TILE * MLA_QUERY_TILE;
    for (int64_t i = first; i < queries; i += MLA_QUERY_TILE) {
        int64_t rows = mla_min(MLA_QUERY_TILE, queries - i);
        scores(p, d_o, n, h, i, rows, kv, keys, t);
        for (int64_t x = 0; x < rows; x++)
            gradients_row(t->s + x * MLA_KEY_TILE, t->dp + x * MLA_KEY_TILE, mla_min(before + i + x + 1 - j, keys), keys,
                          t->lse[i + x], t->delta[i + x], mla_scale(p));
        if (dkv) {
            float beta = i > first ? 1.0f : 0.0f;
            /* dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i */
            kl_gemm_serial(KL_T, KL_N, keys, D, rows, 1.0f, t->dp, MLA_KEY_TILE, q + q_at(p, n, h, i), mla_q_stride(p), beta, dkv, E);
            kl_gemm_serial(KL_T, KL_N, keys, p->Dv, rows, 1.0f, t->s, MLA_KEY_TILE, d_o + o_at(p, n, h, i), p->H * p->Dv, beta, dkv + D, E);
        }
        if (dq) /* dq_i = sum_j ds_ij k_j */
            kl_gemm_serial(KL_N, KL_N, rows, D, keys, 1.0f, t->dp, MLA_KEY_TILE, kv, E, j ? 1.0f : 0.0f, dq + q_at(p, n, h, i), mla_q_stride(p));
    }
}

static void walk_unit(const mla_problem *p, const mla_grads *g, const workspace *w, int64_t u, const float *kv, float *dkv, float *scratch)
{
    int64_t n = u / p->H, h = u % p->H;
    tiles t = {scratch, scratch + w->longest, scratch + 2 * w->longest, scratch + 2 * w->longest + MLA_QUERY_TILE * MLA_KEY_TILE};
    if (g->o)
        given_statistics(p, g, n, h, &t);
    else
        statistics(p, g->d_o, n, h, kv, &t);
    for (int64_t j = 0; j < p->kv_len[n]; j += MLA_KEY_TILE) {
        size_t row = (size_t)j * (size_t)mla_row(p);
        key_tile(p, g, n, h, j, mla_min(MLA_KEY_TILE, p->kv_len[n] - j), kv + row, dkv ? dkv + row : NULL, &t);
    }
}

/* dc[rows,R] += d[rows,count] W_h[first .. first+count-1, R] */
static void latent_product(const mla_problem *p, const float *d, int64_t rows, int64_t h, int64_t first, int64_t count, float *scratch,
                           float *dc)
{
    int64_t step = p->weight_dtype == KL_F32 ? count : mla_min(count, MLA_KEY_TILE);
    for (int64_t i = 0; i < count; i += step) {
        int64_t size = mla_min(step, count - i), ldw;
        const float *weights = mla_float_tile(mla_weight_at(p, h, first + i, 0), p->weight_dtype, p->R, size, p->R, scratch, &ldw);
        kl_gemm_serial(KL_N, KL_N, rows, p->R, size, 1.0f, d + i, mla_row(p), weights, ldw, 1.0f, dc, p->R + p->Dr);
    }
}

/* Rows j .. j+rows-1 of dlatent for heads h0 .. h1-1 of sequence n, whose expanded gradients begin at dkv (head h0, key 0). */
static void latent_tile(const mla_problem *p, float *dlatent, int64_t n, int64_t h0, int64_t h1, int64_t j, int64_t rows,
                        const float *dkv, float *scratch)
{
    int64_t width = p->R + p->Dr;
    float *dc = dlatent + (size_t)(p->kv_start[n] + j) * (size_t)width;
    if (h0 == 0)
        memset(dc, 0, (size_t)rows * (size_t)width * sizeof(float));
    for (int64_t h = h0; h < h1 && mla_queries(p, n); h++) {
        const float *d = dkv + ((size_t)(h - h0) * (size_t)p->kv_len[n] + (size_t)j) * (size_t)mla_row(p);
        /* k_j = [Wk_h c_j | pe_j], v_j = Wv_h c_j:  dc_j += Wk_h^T dk_j + Wv_h^T dv_j,  dpe_j += dk_j */
        latent_product(p, d, rows, h, 0, p->Dn, scratch, dc);
        latent_product(p, d + p->Dn + p->Dr, rows, h, p->Dn, p->Dv, scratch, dc);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t e = 0; e < p->Dr; e++)
                dc[r * width + p->R + e] += d[r * mla_row(p) + p->Dn + e];
    }
}

/* Columns r .. r+columns-1 of dkv_b of head h, from sequence n. */
static void weight_tile(const mla_problem *p, float *dkv_b, int64_t n, int64_t h, int64_t r, int64_t columns, const float *dkv,
                        float *scratch)
{
    float *dw = dkv_b + (size_t)h * (size_t)(p->Dn + p->Dv) * (size_t)p->R + (size_t)r;
    for (int64_t j = 0; j < p->kv_len[n]; j += MLA_KEY_TILE) {
        int64_t keys = mla_min(MLA_KEY_TILE, p->kv_len[n] - j), ldc;
        const float *c = mla_float_tile(mla_latent_at(p, p->kv_start[n] + j, r), p->latent_dtype, p->R + p->Dr, keys, columns, scratch, &ldc);
        const float *d = dkv + (size_t)j * (size_t)mla_row(p);
        /* dWk_h += sum_j dk_j c_j^T,  dWv_h += sum_j dv_j c_j^T */
        kl_gemm_serial(KL_T, KL_N, p->Dn, columns, keys, 1.0f, d, mla_row(p), c, ldc, 1.0f, dw, p->R);
        kl_gemm_serial(KL_T, KL_N, p->Dv, columns, keys, 1.0f, d + p->Dn + p->Dr, mla_row(p), c, ldc, 1.0f, dw + p->Dn * p->R, p->R);
    }
}

/* The heads of sequence n in the group u0 .. u1-1: h0 .. h1-1. */
static void group_heads(const mla_problem *p, int64_t u0, int64_t u1, int64_t n, int64_t *h0, int64_t *h1)
{
    *h0 = mla_max(u0 - n * p->H, 0);
    *h1 = mla_min(u1 - n * p->H, p->H);
}

static void run_group(const kl_ctx *ctx, const mla_problem *p, const mla_grads *g, const workspace *w, int64_t u0, int64_t u1)
{
    int64_t base = mla_unit_row(p, w->key_sum, u0), E = mla_row(p), key_tiles = 0, n0 = u0 / p->H, n1 = (u1 - 1) / p->H;
    bool through = g->dlatent || g->dkv_b;
    for (int64_t n = n0; n <= n1; n++)
        key_tiles = mla_max(key_tiles, kl_ceil_div(p->kv_len[n], MLA_KEY_TILE));
#pragma omp parallel num_threads(ctx->threads)
    {
        float *scratch = w->scratch + (size_t)omp_get_thread_num() * (size_t)w->per_thread;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t u = u0; u < u1; u++) {
            for (int64_t t = 0; t < key_tiles; t++) {
                int64_t n = u / p->H, j = t * MLA_KEY_TILE, rows = mla_min(MLA_KEY_TILE, p->kv_len[n] - j);
                if (rows > 0 && mla_queries(p, n))
                    mla_expand(p, u, j, rows, scratch, w->expanded + (size_t)(mla_unit_row(p, w->key_sum, u) - base + j) * (size_t)E);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t u = u0; u < u1; u++) {
            size_t at = (size_t)(mla_unit_row(p, w->key_sum, u) - base) * (size_t)E;
            if (mla_queries(p, u / p->H))
                walk_unit(p, g, w, u, w->expanded + at, through ? w->gradient + at : NULL, scratch);
        }
        if (g->dlatent) {
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t n = n0; n <= n1; n++) {
                for (int64_t t = 0; t < key_tiles; t++) {
                    int64_t h0, h1, j = t * MLA_KEY_TILE, rows = mla_min(MLA_KEY_TILE, p->kv_len[n] - j);
                    group_heads(p, u0, u1, n, &h0, &h1);
                    if (rows > 0)
                        latent_tile(p, g->dlatent, n, h0, h1, j, rows,
                                    w->gradient + (size_t)(mla_unit_row(p, w->key_sum, n * p->H + h0) - base) * (size_t)E, scratch);
                }
            }
        }
        if (g->dkv_b) {
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t h = 0; h < p->H; h++) {
                for (int64_t r = 0; r < p->R; r += COLUMNS) {
                    for (int64_t n = n0; n <= n1; n++) {
                        int64_t u = n * p->H + h;
                        if (u >= u0 && u < u1 && mla_queries(p, n))
                            weight_tile(p, g->dkv_b, n, h, r, mla_min(COLUMNS, p->R - r),
                                        w->gradient + (size_t)(mla_unit_row(p, w->key_sum, u) - base) * (size_t)E, scratch);
                    }
                }
            }
        }
    }
}

kl_status mla_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *memory, size_t bytes)
{
    const mla_problem *p = problem;
    const mla_grads *g = grads;
    KL_TRY(mla_enter_cpu(ctx, p, false));
    KL_TRY(mla_validate_grads(p, g));
    KL_TRY(mla_check_workspace(memory, bytes, mla_chunk_backward_workspace(ctx, p)));
    if (!g->dq && !g->dlatent && !g->dkv_b)
        return kl_ok();
    kl_arena a = kl_arena_over(memory, bytes);
    workspace w = carve(ctx, p, &a);
    mla_sum_keys(p, w.key_sum);
    for (int64_t u0 = 0, u1; u0 < p->N * p->H; u0 = u1) {
        u1 = mla_group_end(p, w.key_sum, u0, w.capacity);
        run_group(ctx, p, g, &w, u0, u1);
    }
    return kl_ok();
}
