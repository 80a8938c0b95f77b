/* The chunk form: keys and values expanded for as many heads at a time as a fixed budget holds (for a stretch of keys
 * when one head is too long), then causal attention tile by tile with an online softmax:
 *
 *     m' = max(m, max_j s_ij),  p_ij = e^(s_ij - m'),  l = l e^(m - m') + sum_j p_ij,  o = o e^(m - m') + sum_j p_ij v_j
 *
 * and o / l at the end. The tiles of a row follow each other in the order of the keys wherever groups and stretches
 * begin, so that the bits of a sequence depend neither on the budget nor on its neighbours. */
#include "common/blas.h"
#include "common/simd.h"
#include "mla/cpu/internal.h"

/* Bytes of expanded rows kept at a time. */
static const int64_t budget = (int64_t)64 << 20;

typedef struct workspace {
    int64_t *key_sum;    /* [N+1] */
    float *expanded;     /* [capacity, Dn+Dr+Dv] */
    float *state;        /* [2, longest], m and l of the rows of the one unit that is walked in stretches; else unused */
    float *scratch;      /* [threads, per_thread] */
    int64_t capacity, per_thread, longest;
} workspace;

static workspace carve(const kl_ctx *ctx, const mla_problem *p, kl_arena *a)
{
    workspace w = {0};
    int64_t most = 0, all = 0, fits = budget / (mla_row(p) * (int64_t)sizeof(float)) / MLA_KEY_TILE * MLA_KEY_TILE;
    for (int64_t n = 0; n < p->N; n++) {
        most = mla_max(most, p->kv_len[n]);
        all += p->kv_len[n];
        w.longest = mla_max(w.longest, mla_queries(p, n));
    }
    fits = mla_max(fits, MLA_KEY_TILE);
    w.capacity = all <= fits / p->H ? all * p->H : fits;
    w.per_thread = kl_ceil_div(mla_max(mla_expand_scratch(p), MLA_QUERY_TILE * (MLA_KEY_TILE + 2)), 16) * 16;
    w.key_sum = KL_TAKE(a, int64_t, p->N + 1);
    w.expanded = KL_TAKE(a, float, kl_mul((size_t)w.capacity, (size_t)mla_row(p), &a->overflow));
    w.state = KL_TAKE(a, float, most > w.capacity ? 2 * w.longest : 0);
    w.scratch = KL_TAKE(a, float, kl_mul((size_t)ctx->threads, (size_t)w.per_thread, &a->overflow));
    return w;
}

size_t mla_chunk_forward_workspace(const kl_ctx *ctx, const mla_problem *p)
{
    kl_arena a = kl_arena_count();
    carve(ctx, p, &a);
    return mla_arena_bytes(&a);
}

static float row_max(const float *s, int64_t count)
{
    kl_v top = kl_vset(-INFINITY);
    for (int64_t j = 0; j < count; j += KL_LANES)
        top = kl_vmax(top, kl_vload(s + j));
    return kl_vmax_lane(top);
}

/* One row of scores against `keys` keys, of which the first `seen` are visible: s becomes e^(s - m), 0 where hidden;
 * returns the factor e^(m_old - m_new) of what was summed before. */
static float softmax_row(float *s, int64_t seen, int64_t keys, float *m, float *l)
{
    int64_t padded = kl_ceil_div(keys, KL_LANES) * KL_LANES;
    for (int64_t j = mla_max(seen, 0); j < padded; j++)
        s[j] = -INFINITY;
    float top = row_max(s, padded);
    top = top > *m ? top : *m;
    if (top == -INFINITY) {
        for (int64_t j = 0; j < padded; j++)
            s[j] = 0.0f;
        return 1.0f;
    }
    kl_v sum = {0};
    for (int64_t j = 0; j < padded; j += KL_LANES) {
        kl_v e = kl_vexp(kl_vload(s + j) - top);
        kl_vstore(s + j, e);
        sum += e;
    }
    float factor = expf(*m - top);
    *m = top;
    *l = *l * factor + kl_vsum(sum);
    return factor;
}

static void scale_row(float *o, int64_t n, float factor)
{
    for (int64_t e = 0; e < n; e++)
        o[e] *= factor;
}

/* Queries i0 .. i0+rows-1 of unit u against its keys j0 .. j1-1, whose expanded rows begin at kv. m, l [rows]. */
static void attend(const mla_problem *p, int64_t u, int64_t i0, int64_t rows, int64_t j0, int64_t j1, const float *kv,
                   float *s, float *m, float *l)
{
    int64_t n = u / p->H, h = u % p->H, D = p->Dn + p->Dr, ldq = mla_q_stride(p), ldo = p->H * p->Dv;
    int64_t before = p->kv_len[n] - mla_queries(p, n); /* query i sees the keys j <= before + i */
    const float *q = (const float *)p->q + (size_t)(p->cu_q[n] + i0) * (size_t)ldq + (size_t)(h * D);
    float *o = (float *)p->o + (size_t)(p->cu_q[n] + i0) * (size_t)ldo + (size_t)(h * p->Dv);
    j1 = mla_min(j1, before + i0 + rows);
    for (int64_t j = j0; j < j1; j += MLA_KEY_TILE) {
        int64_t keys = mla_min(MLA_KEY_TILE, j1 - j);
        const float *tile = kv + (size_t)(j - j0) * (size_t)mla_row(p);
        /* s_ij = scale q_i . k_j */
        kl_gemm_serial(KL_N, KL_T, rows, keys, D, mla_scale(p), q, ldq, tile, mla_row(p), 0.0f, s, MLA_KEY_TILE);
        for (int64_t i = 0; i < rows; i++) {
            float factor = softmax_row(s + i * MLA_KEY_TILE, mla_min(before + i0 + i + 1 - j, keys), keys, &m[i], &l[i]);
            if (j > 0 && factor != 1.0f)
                scale_row(o + (size_t)i * (size_t)ldo, p->Dv, factor);
        }
        /* o_i += sum_j p_ij v_j */
        kl_gemm_serial(KL_N, KL_N, rows, p->Dv, keys, 1.0f, s, MLA_KEY_TILE, tile + D, mla_row(p), j > 0 ? 1.0f : 0.0f, o, ldo);
    }
}

static void finish(const mla_problem *p, int64_t u, int64_t i0, int64_t rows, const float *m, const float *l)
{
    int64_t n = u / p->H, h = u % p->H;
    for (int64_t i = 0; i < rows; i++) {
        size_t at = (size_t)(p->cu_q[n] + i0 + i) * (size_t)p->H + (size_t)h;
        scale_row((float *)p->o + at * (size_t)p->Dv, p->Dv, 1.0f / l[i]);
        if (p->lse)
            p->lse[at] = m[i] + logf(l[i]);
    }
}

/* One tile of queries of unit u against the stretch j0 .. j1-1 of its keys. */
static void query_tile(const mla_problem *p, const workspace *w, int64_t u, int64_t i0, int64_t j0, int64_t j1,
                       const float *kv, float *scratch)
{
    int64_t n = u / p->H, rows = mla_min(MLA_QUERY_TILE, mla_queries(p, n) - i0);
    bool whole = j0 == 0 && j1 == p->kv_len[n];
    float *m = whole ? scratch : w->state + i0, *l = whole ? scratch + MLA_QUERY_TILE : w->state + w->longest + i0;
    float *s = scratch + 2 * MLA_QUERY_TILE;
    int64_t last = p->kv_len[n] - mla_queries(p, n) + i0 + rows; /* keys that the last row sees */
    if (j0 >= last)
        return;
    if (j0 == 0) {
        for (int64_t i = 0; i < rows; i++) {
            m[i] = -INFINITY;
            l[i] = 0.0f;
        }
    }
    attend(p, u, i0, rows, j0, j1, kv, s, m, l);
    if (j1 >= last)
        finish(p, u, i0, rows, m, l);
}

/* Units u0 .. u1-1, of each the keys j0 .. j1-1 (j1 at most the keys that it has). */
static void run_group(const kl_ctx *ctx, const mla_problem *p, const workspace *w, int64_t u0, int64_t u1, int64_t j0, int64_t j1)
{
    int64_t key_tiles = 0, query_tiles = 0, first = mla_unit_row(p, w->key_sum, u0);
    for (int64_t n = u0 / p->H; n <= (u1 - 1) / p->H; n++) {
        key_tiles = mla_max(key_tiles, kl_ceil_div(mla_min(j1, p->kv_len[n]) - j0, MLA_KEY_TILE));
        query_tiles = mla_max(query_tiles, kl_ceil_div(mla_queries(p, n), MLA_QUERY_TILE));
    }
#pragma omp parallel num_threads(ctx->threads)
    {
        float *scratch = w->scratch + (size_t)omp_get_thread_num() * (size_t)w->per_thread;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t u = u0; u < u1; u++) {
            for (int64_t t = 0; t < key_tiles; t++) {
                int64_t n = u / p->H, j = j0 + t * MLA_KEY_TILE, end = mla_min(j1, p->kv_len[n]);
                size_t row = (size_t)(mla_unit_row(p, w->key_sum, u) - first + j - j0);
                if (j < end && mla_queries(p, n))
                    mla_expand(p, u, j, mla_min(MLA_KEY_TILE, end - j), scratch, w->expanded + row * (size_t)mla_row(p));
            }
        }
        /* The last queries see most keys: they come first. */
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t u = u0; u < u1; u++) {
            for (int64_t t = 0; t < query_tiles; t++) {
                int64_t n = u / p->H, i0 = (query_tiles - 1 - t) * MLA_QUERY_TILE;
                size_t row = (size_t)(mla_unit_row(p, w->key_sum, u) - first);
                if (i0 < mla_queries(p, n))
                    query_tile(p, w, u, i0, j0, mla_min(j1, p->kv_len[n]), w->expanded + row * (size_t)mla_row(p), scratch);
            }
        }
    }
}

kl_status mla_chunk_forward(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const mla_problem *p = problem;
    KL_TRY(mla_enter_cpu(ctx, p, true));
    KL_TRY(mla_check_workspace(memory, bytes, mla_chunk_forward_workspace(ctx, p)));
    kl_arena a = kl_arena_over(memory, bytes);
    workspace w = carve(ctx, p, &a);
    mla_sum_keys(p, w.key_sum);
    for (int64_t u0 = 0, u1; u0 < p->N * p->H; u0 = u1) {
        u1 = mla_group_end(p, w.key_sum, u0, w.capacity);
        int64_t keys = p->kv_len[u0 / p->H];
        if (u1 > u0 + 1 || keys <= w.capacity)
            run_group(ctx, p, &w, u0, u1, 0, INT64_MAX);
        else
            for (int64_t j = 0; j < keys; j += w.capacity)
                run_group(ctx, p, &w, u0, u1, j, mla_min(keys, j + w.capacity));
    }
    return kl_ok();
}
