/* Chunkwise backward. The states before the chunks are computed again from the initial state (or from a checkpoint every
 * so many chunks), then the gradient of the state walks from the last chunk to the first.
 *
 * One task is a run of sequences and one query head with all its value heads, in order: so the gradients of q and k are
 * summed over value heads, and those of the parameters over sequences, in an order that the threads do not change. */
#include "common/parallel.h"
#include "common/simd.h"
#include "kda/cpu/chunk.h"
#include "kda/cpu/gates.h"
#include "kda/cpu/intra_bwd.h"
#include "kda/cpu/state.h"

enum { LEAST_SEGMENT = 64, MOST_RUNS = 64 };

typedef struct scratch {
    kda_chunk chunk;
    float *S, *dS, *St, *dSt;                 /* [Kp,Vp]; transposes [Vp,Kp] */
    float *residual, *d_o, *y, *du, *ut;      /* [C,Vp]; ut [Vp,C] */
    float *dAqk, *dAkk;                       /* [C,C] */
    float *dqg, *dkg, *dke, *dq, *dk, *da;    /* [C,Kp] */
    float *product, *row_term;                /* [C,Kp] */
    float *dwhole, *dbias;                    /* [Kp] */
    float *states;                            /* [segment,Kp,Vp] before each chunk of a segment */
    float *checkpoints;                       /* [segments,Kp,Vp] before each segment */
    int64_t segment;                          /* chunks a segment */
} scratch;

static scratch take_scratch(kl_arena *a, const kda_problem *p)
{
    int64_t C = kda_chunk_tokens(p), Kp = kl_tile_pad(p->K), Vp = kl_tile_pad(p->V), size = Kp * Vp;
    int64_t chunks = kl_ceil_div(kda_longest(p->T, p->N, p->cu_seqlens), C);
    scratch s = {.chunk = kda_chunk_take(a, p), .segment = LEAST_SEGMENT};
    while (s.segment * s.segment < chunks)
        s.segment *= 2;
    float **states[] = {&s.S, &s.dS, &s.St, &s.dSt};
    for (size_t i = 0; i < sizeof states / sizeof *states; i++)
        *states[i] = KL_TAKE(a, float, size);
    float **values[] = {&s.residual, &s.d_o, &s.y, &s.du, &s.ut};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        *values[i] = KL_TAKE(a, float, C * Vp);
    float **keys[] = {&s.dqg, &s.dkg, &s.dke, &s.dq, &s.dk, &s.da, &s.product, &s.row_term};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        *keys[i] = KL_TAKE(a, float, C * kda_leading(Kp));
    s.dAqk = KL_TAKE(a, float, C * C);
    s.dAkk = KL_TAKE(a, float, C * C);
    s.dwhole = KL_TAKE(a, float, Kp);
    s.dbias = KL_TAKE(a, float, Kp);
    s.states = KL_TAKE(a, float, (chunks < s.segment ? chunks : s.segment) * size);
    s.checkpoints = KL_TAKE(a, float, kl_ceil_div(chunks, s.segment) * size);
    return s;
}

/* ---- forward again ---- */

static int64_t tokens_in(const kda_panel *w, kda_span span, int64_t chunk)
{
    int64_t left = span.length - chunk * w->C;
    return left < w->C ? left : w->C;
}

/* From the state before chunk `first` in s->S to the one before chunk `last`; those in between are kept when wanted. */
static void advance(const kda_panel *w, kda_span span, int64_t first, int64_t last, bool keep, scratch *s)
{
    int64_t size = w->Kp * w->Vp;
    for (int64_t c = first; c < last; c++) {
        if (keep)
            memcpy(s->states + (c - first) * size, s->S, (size_t)size * sizeof(float));
        if (keep && c == last - 1)
            break; /* nobody reads the state after the segment */
        int64_t count = tokens_in(w, span, c);
        kda_chunk_load(w, span.begin + c * w->C, count, &s->chunk);
        kda_chunk_prepare_write(w, count, &s->chunk);
        kda_chunk_apply(w, count, KDA_WRITE, s->S, &s->chunk, NULL);
    }
}

/* ---- one chunk ---- */

static void load_upstream(const kda_panel *w, const kda_grads *g, int64_t t, int64_t count, float *d_o)
{
    const kda_problem *p = w->p;
    memset(d_o, 0, (size_t)(count * w->Vp) * sizeof(float));
    for (int64_t i = 0; i < count && g->d_o; i++)
        memcpy(d_o + i * w->Vp, (const float *)g->d_o + (t + i) * kda_stride(p->o_stride, p->HV * p->V) + w->hv * p->V,
               (size_t)p->V * sizeof(float));
}

/* o_i = S^T qg_i + sum_{j<=i} Aqk[i,j] u_j and S' = Diag(whole) S + ke^T u:  du = Aqk^T do + ke dS'
 * u_i = beta_i (v_i - S^T kg_i - sum_{j<i} Akk[i,j] u_j):  y = beta (du - Akk^T y), which is dv */
static void correction_backward(const kda_panel *w, int64_t count, scratch *s)
{
    const kda_chunk *x = &s->chunk;
    int64_t Vp = w->Vp;
    kl_tile_gemm(KL_TILE_SET, count, Vp, w->Kp, x->ke, w->Kl, 1, s->dS, Vp, NULL, s->y, Vp);
    kda_apply_upper(count, Vp, x->Aqk, w->C, s->d_o, s->y, Vp);
    if (!w->p->no_delta) {
        kda_solve_upper(count, Vp, x->Akk, w->C, x->beta, s->y, s->du, Vp);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < Vp; j++) {
            s->du[i * Vp + j] = s->y[i * Vp + j];
            s->y[i * Vp + j] *= x->beta[i];
        }
}

/* dAqk[i,j] = do_i . u_j and dAkk[i,j] = -y_i . u_j, for the blocks on and below the diagonal */
static void matrices_backward(const kda_panel *w, int64_t count, scratch *s)
{
    int64_t Vp = w->Vp, C = w->C, padded = kl_tile_pad(count);
    memset(s->chunk.u + count * Vp, 0, (size_t)((padded - count) * Vp) * sizeof(float));
    kl_tile_transpose(padded, Vp, s->chunk.u, Vp, s->ut, C);
    for (int64_t i = 0; i < count; i += KDA_BLOCK) {
        int64_t rows = count - i < KDA_BLOCK ? count - i : KDA_BLOCK;
        kl_tile_gemm(KL_TILE_SET, rows, i + KDA_BLOCK, Vp, s->d_o + i * Vp, Vp, 1, s->ut, C, NULL, s->dAqk + i * C, C);
        if (w->p->no_delta)
            continue;
        memset(s->dAkk + i * C, 0, (size_t)(rows * C) * sizeof(float));
        kl_tile_gemm(KL_TILE_SUB, rows, i + KDA_BLOCK, Vp, s->y + i * Vp, Vp, 1, s->ut, C, NULL, s->dAkk + i * C, C);
    }
}

/* From dqg, dkg, dke and dwhole to dq, dk and da:
 *     qg_i = q_i P(-1->i), kg_i = k_i P(-1->i):  dq_i = P dqg_i, dk_i = P dkg_i;  da_t gathers i >= t
 *     ke_j = k_j P(j->end):                      dk_j += P dke_j;                 da_t gathers j < t
 *     whole = P(-1->end):                                                         da_t gathers whole dwhole */
static void decays_backward(const kda_panel *w, int64_t count, scratch *s)
{
    const kda_chunk *x = &s->chunk;
    int64_t ld = w->Kl, width = w->Kp;
    bool delta = !w->p->no_delta;
    for (int64_t c = 0; c < width; c += KL_LANES) {
        kl_v product = kl_vset(1.0f);
        for (int64_t i = 0; i < count; i++) {
            int64_t at = i * ld + c;
            product *= kl_vload(x->decay + at);
            kl_v dqg = kl_vload(s->dqg + at), term = kl_vload(x->qg + at) * dqg;
            kl_vstore(s->dq + at, product * dqg);
            kl_v dk = {0};
            if (delta) {
                kl_v dkg = kl_vload(s->dkg + at);
                dk = product * dkg;
                term += kl_vload(x->kg + at) * dkg;
            }
            kl_vstore(s->dk + at, dk);
            kl_vstore(s->row_term + at, term);
            kl_vstore(s->da + at, kl_vload(x->whole + c) * kl_vload(s->dwhole + c));
        }
    }
    kda_add_sums_from_row(count, width, ld, s->row_term, s->da);
    for (int64_t c = 0; c < width; c += KL_LANES) {
        kl_v product = kl_vset(1.0f);
        for (int64_t j = count - 1; j >= 0; j--) {
            int64_t at = j * ld + c;
            kl_v dke = kl_vload(s->dke + at);
            kl_vstore(s->dk + at, kl_vload(s->dk + at) + product * dke);
            kl_vstore(s->row_term + at, kl_vload(x->ke + at) * dke);
            product *= kl_vload(x->decay + at);
        }
    }
    kda_add_sums_before_row(count, width, ld, s->row_term, s->da);
}

/* Products with the state before the chunk and with the gradient of the one after it; s->dS moves to before the chunk. */
static void state_backward(const kda_panel *w, int64_t count, const float *S, scratch *s)
{
    const kda_chunk *x = &s->chunk;
    int64_t Kp = w->Kp, Vp = w->Vp;
    kl_tile_transpose(Kp, Vp, S, Vp, s->St, Kp);
    kl_tile_transpose(Kp, Vp, s->dS, Vp, s->dSt, Kp);
    kl_tile_gemm(KL_TILE_SET, count, Kp, Vp, s->d_o, Vp, 1, s->St, Kp, NULL, s->dqg, w->Kl);
    kl_tile_gemm(KL_TILE_SET, count, Kp, Vp, x->u, Vp, 1, s->dSt, Kp, NULL, s->dke, w->Kl);
    if (!w->p->no_delta) {
        memset(s->dkg, 0, (size_t)(count * w->Kl) * sizeof(float));
        kl_tile_gemm(KL_TILE_SUB, count, Kp, Vp, s->y, Vp, 1, s->St, Kp, NULL, s->dkg, w->Kl);
    }
    for (int64_t c = 0; c < Kp; c++) {
        kl_v sum = {0};
        for (int64_t j = 0; j < Vp; j += KL_LANES)
            sum += kl_vload(S + c * Vp + j) * kl_vload(s->dS + c * Vp + j);
        s->dwhole[c] = kl_vsum(sum);
    }
    /* dS = Diag(whole) dS' + qg^T do - kg^T y */
    kl_tile_gemm(KL_TILE_ADD, Kp, Vp, count, x->qg, 1, w->Kl, s->d_o, Vp, x->whole, s->dS, Vp);
    if (!w->p->no_delta)
        kl_tile_gemm(KL_TILE_SUB, Kp, Vp, count, x->kg, 1, w->Kl, s->y, Vp, NULL, s->dS, Vp);
}

static void store_keys(const kda_panel *w, const kda_grads *g, int64_t t, int64_t count, bool first_head, scratch *s)
{
    const kda_problem *p = w->p;
    int64_t K = p->K, h = w->hv / (p->HV / p->H);
    int64_t q_stride = kda_stride(p->q_stride, p->H * K), k_stride = kda_stride(p->k_stride, p->H * K);
    for (int64_t i = 0; i < count; i++) {
        int64_t q = (t + i) * q_stride + h * K, k = (t + i) * k_stride + h * K;
        if (g->dq)
            kda_unit_row_backward(p->qk_l2norm, K, kda_scale(p->scale, K), (const float *)p->q + q, s->dq + i * w->Kl,
                                  (float *)g->dq + q, !first_head);
        if (g->dk)
            kda_unit_row_backward(p->qk_l2norm, K, 1.0f, (const float *)p->k + k, s->dk + i * w->Kl, (float *)g->dk + k, !first_head);
    }
}

static void store_values(const kda_panel *w, const kda_grads *g, int64_t t, int64_t count, const scratch *s)
{
    const kda_problem *p = w->p;
    for (int64_t i = 0; i < count; i++) {
        if (g->dv)
            memcpy((float *)g->dv + (t + i) * kda_stride(p->v_stride, p->HV * p->V) + w->hv * p->V, s->y + i * w->Vp,
                   (size_t)p->V * sizeof(float));
        if (!g->dbeta)
            continue;
        /* u = beta r:  dbeta = du . r */
        kl_v sum = {0};
        for (int64_t j = 0; j < w->Vp; j += KL_LANES)
            sum += kl_vload(s->du + i * w->Vp + j) * kl_vload(s->residual + i * w->Vp + j);
        int64_t at = (t + i) * kda_stride(p->beta_stride, p->HV) + w->hv;
        ((float *)g->dbeta)[at] = kl_vsum(sum) * kda_beta_derivative(p->beta_kind, ((const float *)p->beta)[at]);
    }
}

/* Parameter gradients of a run of sequences, in double: dA_log [HV] and ddt_bias [HV,G]. */
typedef struct run_sums {
    double *dA_log, *ddt_bias;
} run_sums;

static void store_gates(const kda_panel *w, const kda_grads *g, int64_t t, int64_t count, run_sums sums, scratch *s)
{
    const kda_problem *p = w->p;
    int64_t stride = kda_stride(p->g_stride, p->HV * p->G);
    if (p->G == 0 || (!g->dg && !sums.dA_log && !sums.ddt_bias))
        return;
    float dA = 0.0f;
    memset(s->dbias, 0, (size_t)w->Kp * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        int64_t at = (t + i) * stride + w->hv * p->G;
        kda_decay_row_backward(p, w->hv, (const float *)p->g + at, s->da + i * w->Kl, g->dg ? (float *)g->dg + at : NULL, &dA, s->dbias);
    }
    if (sums.dA_log)
        sums.dA_log[w->hv] += dA;
    for (int64_t j = 0; j < p->G && sums.ddt_bias; j++)
        sums.ddt_bias[w->hv * p->G + j] += s->dbias[j];
}

static void chunk_backward(const kda_panel *w, const kda_grads *g, int64_t t, int64_t count, float *S, run_sums sums,
                           bool first_head, scratch *s)
{
    kda_chunk *x = &s->chunk;
    kda_chunk_load(w, t, count, x);
    kda_chunk_prepare(w, count, x);
    kda_chunk_apply(w, count, 0, S, x, s->residual);
    load_upstream(w, g, t, count, s->d_o);
    correction_backward(w, count, s);
    store_values(w, g, t, count, s);
    matrices_backward(w, count, s);
    state_backward(w, count, S, s);
    decays_backward(w, count, s);
    kda_tokens tokens = {count, w->Kp, w->Kl, x->decay};
    kda_intra_grads intra = {x->q, x->k, s->dAqk, w->p->no_delta ? NULL : s->dAkk, w->C, s->dq, s->dk, s->da, s->product, s->row_term};
    kda_off_diagonal_backward(tokens, &intra, &x->level);
    kda_diagonal_backward(tokens, &intra);
    store_keys(w, g, t, count, first_head, s);
    store_gates(w, g, t, count, sums, s);
}

/* ---- one value head of one sequence ---- */

static void head_backward(const kda_panel *w, const kda_grads *g, run_sums sums, bool first_head, scratch *s)
{
    const kda_problem *p = w->p;
    int64_t K = p->K, V = p->V, size = w->Kp * w->Vp, slot = kda_slot(p, w->n) * p->HV + w->hv, head = w->n * p->HV + w->hv;
    kda_span span = kda_sequence(p->T, p->cu_seqlens, w->n);
    int64_t chunks = kl_ceil_div(span.length, w->C), segments = kl_ceil_div(chunks, s->segment);
    kda_state_load(p->state_layout, K, V, p->h0 ? (const float *)p->h0 + slot * K * V : NULL, 0, V, w->Kp, s->S, w->Vp);
    for (int64_t i = 0; i + 1 < segments; i++) {
        memcpy(s->checkpoints + i * size, s->S, (size_t)size * sizeof(float));
        advance(w, span, i * s->segment, (i + 1) * s->segment, false, s);
    }
    kda_state_load(p->state_layout, K, V, g->dht ? g->dht + head * K * V : NULL, 0, V, w->Kp, s->dS, w->Vp);
    for (int64_t i = segments - 1; i >= 0; i--) {
        int64_t first = i * s->segment, last = first + s->segment < chunks ? first + s->segment : chunks;
        if (i < segments - 1)
            memcpy(s->S, s->checkpoints + i * size, (size_t)size * sizeof(float));
        advance(w, span, first, last, true, s);
        for (int64_t c = last - 1; c >= first; c--)
            chunk_backward(w, g, span.begin + c * w->C, tokens_in(w, span, c), s->states + (c - first) * size, sums, first_head, s);
    }
    if (g->dh0)
        kda_state_store(p->state_layout, K, V, s->dS, w->Vp, 0, V, g->dh0 + head * K * V);
}

/* ---- all of them ---- */

static int64_t runs_of(const kda_problem *p) { return p->N < MOST_RUNS ? p->N : MOST_RUNS; }

static size_t scratch_bytes(const kda_problem *p)
{
    kl_arena a = kl_arena_count();
    take_scratch(&a, p);
    return a.overflow ? SIZE_MAX : a.used;
}

/* Per run: dA_log [HV], then ddt_bias [HV,G]. */
static double *take_sums(kl_arena *a, const kda_problem *p) { return KL_TAKE(a, double, runs_of(p) * p->HV * (1 + p->G)); }

size_t kda_cpu_chunk_backward_workspace(const kl_ctx *ctx, const kda_problem *p)
{
    kl_arena a = kl_arena_count();
    take_sums(&a, p);
    kl_arena_take(&a, (size_t)ctx->threads, scratch_bytes(p));
    return a.used;
}

static void add_sums(int64_t count, int64_t runs, int64_t run_stride, const double *sums, float *out)
{
    for (int64_t i = 0; i < count && out; i++) {
        double sum = 0.0;
        for (int64_t r = 0; r < runs; r++)
            sum += sums[r * run_stride + i];
        out[i] += (float)sum;
    }
}

kl_status kda_cpu_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes)
{
    const kda_problem *p = problem;
    const kda_grads *g = grads;
    kl_arena a = kl_arena_over(workspace, bytes);
    double *sums = take_sums(&a, p);
    size_t each = scratch_bytes(p);
    char *scratches = kl_arena_take(&a, (size_t)ctx->threads, each);
    KL_REQUIRE(!a.overflow, "kda: workspace: expected %zu bytes, got %zu", kda_cpu_chunk_backward_workspace(ctx, p), bytes);
    int64_t runs = runs_of(p), group = p->HV / p->H, run_stride = p->HV * (1 + p->G);
    memset(sums, 0, (size_t)(runs * run_stride) * sizeof(double));
    bool split = kda_chunk_splits(p);
#pragma omp parallel num_threads(ctx->threads)
    {
        if (split)
            kl_split_begin();
        unsigned mode = kl_flush_subnormals();
        kl_arena mine = kl_arena_over(scratches + (size_t)omp_get_thread_num() * each, each);
        scratch s = take_scratch(&mine, p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < runs * p->H; i++) {
            int64_t run = i / p->H, h = i % p->H;
            run_sums own = {g->dA_log ? sums + run * run_stride : NULL, g->ddt_bias ? sums + run * run_stride + p->HV : NULL};
            for (int64_t n = run * p->N / runs; n < (run + 1) * p->N / runs; n++)
                for (int64_t j = 0; j < group; j++) {
                    kda_panel w = kda_panel_make(p, n, h * group + j, 0, p->V, split);
                    head_backward(&w, g, own, j == 0, &s);
                }
        }
        if (split)
            kl_split_end();
        kl_restore_subnormals(mode);
    }
    add_sums(p->HV, runs, run_stride, sums, g->dA_log);
    add_sums(p->HV * p->G, runs, run_stride, sums + p->HV, g->ddt_bias);
    return kl_ok();
}
