/* The general recurrence, chunkwise, with the same means as KDA: products of decays, one triangular system a chunk, the
 * state read twice and written once. With u_i = a_i^T S_(i-1), S the state before the chunk and P as in intra.h:
 *
 *     u_i = (a_i P(-1->i-1))^T S + sum_{j<i} Aab[i,j] u_j + Aak[i,j] v_j     A??: x_i . P(j->i-1) y_j
 *     o_i = (q_i P(-1->i))^T S + sum_{j<=i} Aqb[i,j] u_j + Aqk[i,j] v_j      A??: x_i . P(j->i) y_j
 *     S' = Diag(P(-1->end)) S + sum_j k_j P(j->end) v_j^T + b_j P(j->end) u_j^T
 *
 * Against KDA that is one more product with the state, four matrices for two, and four triangular products for two. */
#include "common/arena.h"
#include "common/parallel.h"
#include "common/split.h"
#include "common/simd.h"
#include "kda/cpu/gates.h"
#include "kda/cpu/intra.h"
#include "kda/cpu/state.h"
#include "kda/cpu/sums.h"

/* Pairs that enter one product together lie one behind the other, count rows apart. */
typedef struct scratch {
    float *q, *k, *a, *b, *decay;            /* [C,Kp] */
    float *a_start, *k_end, *whole;          /* [2C,Kp] a then q from the start; [2C,Kp] k then b to the end; [Kp] */
    float *v;                                /* [3C,Vp] v, u, o */
    float *Aab, *Aak, *Aqb, *Aqk;            /* [C,C] */
    float *factor, *before, *left, *right;   /* [C,Kp]; before: P(anchor->i-1) of the second halves */
    float *across_k, *across_b;              /* [Kp,C/2] */
    float *S;                                /* [Kp,Vp] */
    float *across;                           /* [Kp,2C+16] */
    char *rows, *state, *corrections;        /* packed for the matrix unit */
} scratch;

typedef struct panel {
    const dplr_problem *p;
    int64_t n, h, v0, columns, C, Kp, Vp, Kl; /* as in chunk.h */
    bool split;
} panel;

static int64_t chunk_tokens(const dplr_problem *p) { return p->chunk ? p->chunk : 64; }
static int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

static scratch take_scratch(kl_arena *arena, const dplr_problem *p)
{
    int64_t C = chunk_tokens(p), Kp = kl_tile_pad(p->K), Vp = kl_tile_pad(p->V);
    scratch s;
    float **keys[] = {&s.q, &s.k, &s.a, &s.b, &s.decay, &s.factor, &s.before, &s.left, &s.right};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        *keys[i] = KL_TAKE(arena, float, C * kda_leading(Kp));
    float **matrices[] = {&s.Aab, &s.Aak, &s.Aqb, &s.Aqk};
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        *matrices[i] = KL_TAKE(arena, float, C * C);
    s.a_start = KL_TAKE(arena, float, (2 * C + 16) * kda_leading(Kp));
    s.k_end = KL_TAKE(arena, float, (2 * C + 16) * kda_leading(Kp));
    s.whole = KL_TAKE(arena, float, Kp);
    s.v = KL_TAKE(arena, float, (3 * C + 16) * Vp);
    s.across_k = KL_TAKE(arena, float, Kp * (C / 2));
    s.across_b = KL_TAKE(arena, float, Kp * (C / 2));
    s.S = KL_TAKE(arena, float, Kp * Vp);
    s.across = KL_TAKE(arena, float, Kp * (2 * C + 16));
    size_t keys_by_tokens = kl_split_bytes(2 * C, Kp), tokens_by_keys = kl_split_bytes(Kp, 2 * C);
    s.rows = KL_TAKE(arena, char, keys_by_tokens > tokens_by_keys ? keys_by_tokens : tokens_by_keys);
    s.state = KL_TAKE(arena, char, kl_split_bytes(Vp, Kp));
    s.corrections = KL_TAKE(arena, char, kl_split_bytes(Vp, 2 * C));
    return s;
}

static void load(const panel *w, int64_t t, int64_t count, scratch *s)
{
    const dplr_problem *p = w->p;
    kda_problem gate = {.K = p->K, .G = p->K, .HV = p->H};
    const float *q = p->q, *k = p->k, *a = p->a, *b = p->b, *g = p->g, *values = p->v;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = ((t + i) * p->H + w->h) * p->K, to = i * w->Kl;
        kda_unit_row(false, p->K, kda_scale(p->scale, p->K), q + at, s->q + to);
        kda_unit_row(false, p->K, 1.0f, k + at, s->k + to);
        kda_unit_row(false, p->K, 1.0f, a + at, s->a + to);
        kda_unit_row(false, p->K, 1.0f, b + at, s->b + to);
        kda_decay_row(&gate, w->h, g + at, s->decay + to);
        float *v = s->v + i * w->Vp;
        memcpy(v, values + ((t + i) * p->H + w->h) * p->V + w->v0, (size_t)w->columns * sizeof(float));
        memset(v + w->columns, 0, (size_t)(w->Vp - w->columns) * sizeof(float));
    }
}

/* a_i P(-1->i-1): the state that a reads is the one before the token. */
static void from_start_before(kda_tokens t, const float *x, float *y)
{
    for (int64_t c = 0; c < t.width; c += KL_LANES) {
        kl_v product = kl_vset(1.0f);
        for (int64_t i = 0; i < t.n; i++) {
            kl_vstore(y + i * t.ld + c, kl_vload(x + i * t.ld + c) * product);
            product *= kl_vload(t.decay + i * t.ld + c);
        }
    }
}

/* P(s+h-1->i-1) for the second halves. */
static void factors_before(kda_tokens t, int64_t h, float *before)
{
    for (int64_t s = h; s < t.n; s += 2 * h)
        for (int64_t c = 0; c < t.width; c += KL_LANES) {
            kl_v product = kl_vset(1.0f);
            for (int64_t i = s; i < smaller(s + h, t.n); i++) {
                kl_vstore(before + i * t.ld + c, product);
                product *= kl_vload(t.decay + i * t.ld + c);
            }
        }
}

static void multiply(int64_t count, const float *x, const float *y, float *z)
{
    for (int64_t c = 0; c < count; c += KL_LANES)
        kl_vstore(z + c, kl_vload(x + c) * kl_vload(y + c));
}

static void off_diagonal(kda_tokens t, int64_t lda, scratch *s)
{
    int64_t ld = t.ld;
    for (int64_t h = KDA_BLOCK; h < t.n; h *= 2) {
        kda_anchor_factors(t, h, s->factor);
        factors_before(t, h, s->before);
        for (int64_t j = 0; j + h < t.n; j += 2 * h) {
            int64_t i = j + h, rows = smaller(h, t.n - i), at = i * lda + j;
            multiply(h * ld, s->k + j * ld, s->factor + j * ld, s->left);
            kl_tile_transpose(h, t.width, s->left, ld, s->across_k, h);
            multiply(h * ld, s->b + j * ld, s->factor + j * ld, s->left);
            kl_tile_transpose(h, t.width, s->left, ld, s->across_b, h);
            multiply(rows * ld, s->q + i * ld, s->factor + i * ld, s->right);
            kl_tile_gemm(KL_TILE_SET, rows, h, t.width, s->right, ld, 1, s->across_k, h, NULL, s->Aqk + at, lda);
            kl_tile_gemm(KL_TILE_SET, rows, h, t.width, s->right, ld, 1, s->across_b, h, NULL, s->Aqb + at, lda);
            multiply(rows * ld, s->a + i * ld, s->before + i * ld, s->right);
            kl_tile_gemm(KL_TILE_SET, rows, h, t.width, s->right, ld, 1, s->across_k, h, NULL, s->Aak + at, lda);
            kl_tile_gemm(KL_TILE_SET, rows, h, t.width, s->right, ld, 1, s->across_b, h, NULL, s->Aab + at, lda);
        }
    }
}

enum { WALKERS = 2 };

/* Row i against two columns: a meets them before the decay of row i, q after. */
KL_INLINE void diagonal_row(kda_tokens t, int moving, const float *decay, const float *q, const float *a, float *walk, float *out[4])
{
    kl_v sum[4 * WALKERS] = {{0}};
    for (int64_t c = 0; c < t.width; c += KL_LANES) {
        kl_v d = kl_vload(decay + c), qc = kl_vload(q + c), ac = kl_vload(a + c);
KL_UNROLL
        for (int w = 0; w < WALKERS; w++) {
            kl_v k = kl_vload(walk + 2 * w * t.ld + c), b = kl_vload(walk + (2 * w + 1) * t.ld + c);
            sum[WALKERS + w] += ac * k;
            sum[3 * WALKERS + w] += ac * b;
            if (w < moving) {
                k *= d;
                b *= d;
                kl_vstore(walk + 2 * w * t.ld + c, k);
                kl_vstore(walk + (2 * w + 1) * t.ld + c, b);
            }
            sum[w] += qc * k;
            sum[2 * WALKERS + w] += qc * b;
        }
    }
    kl_v sums = eight_sums(sum);
    for (int m = 0; m < 4; m++)
        for (int w = 0; w < WALKERS; w++)
            out[m][w] = sums[2 * (m * WALKERS + w)];
}

/* Elements above the diagonal are written too, and read by nobody. */
static void diagonal(kda_tokens t, int64_t lda, scratch *s)
{
    float walk[2 * WALKERS * (KDA_MAX_DIM + 16)];
    for (int64_t first = 0; first < t.n; first += KDA_BLOCK) {
        int64_t end = smaller(first + KDA_BLOCK, t.n);
        for (int64_t j = first; j < end; j += WALKERS) {
            for (int64_t w = 0; w < WALKERS; w++) {
                int64_t from = (j + w < end ? j + w : j) * t.ld;
                memcpy(walk + 2 * w * t.ld, s->k + from, (size_t)t.ld * sizeof(float));
                memcpy(walk + (2 * w + 1) * t.ld, s->b + from, (size_t)t.ld * sizeof(float));
            }
            for (int64_t i = j; i < end; i++) {
                const float *decay = t.decay + i * t.ld, *q = s->q + i * t.ld, *a = s->a + i * t.ld;
                float *out[4] = {s->Aqk + i * lda + j, s->Aak + i * lda + j, s->Aqb + i * lda + j, s->Aab + i * lda + j};
                switch (i - j) {
                case 0: diagonal_row(t, 0, decay, q, a, walk, out); break;
                case 1: diagonal_row(t, 1, decay, q, a, walk, out); break;
                default: diagonal_row(t, 2, decay, q, a, walk, out); break;
                }
            }
        }
    }
}

/* u and o from the state, which then decays to the chunk's end where the matrix unit has packed it. */
static void read_state(const panel *w, int64_t count, scratch *s)
{
    float *u = s->v + count * w->Vp;
    if (!w->split) {
        kl_tile_gemm(KL_TILE_SET, 2 * count, w->Vp, w->Kp, s->a_start, w->Kl, 1, s->S, w->Vp, NULL, u, w->Vp);
        return;
    }
    kl_split_right(w->Kp, w->Vp, s->S, w->Vp, s->whole, s->state, w->Kp);
    kl_split_left(KL_SPLIT_SIX, 2 * count, w->Kp, false, s->a_start, w->Kl, s->rows, w->Kp);
    kl_split_product(KL_SPLIT_SIX, NULL, 0, 2 * count, w->Vp, w->Kp, s->rows, w->Kp, s->state, w->Kp, u, w->Vp, NULL);
}

/* S <- Diag(whole) S + k_end^T v + b_end^T u */
static void write_state(const panel *w, int64_t count, scratch *s)
{
    int64_t depth = 2 * count, padded = kl_tile_pad(depth);
    if (!w->split) {
        kl_tile_gemm(KL_TILE_ADD, w->Kp, w->Vp, depth, s->k_end, 1, w->Kl, s->v, w->Vp, s->whole, s->S, w->Vp);
        return;
    }
    memset(s->k_end + depth * w->Kl, 0, (size_t)((padded - depth) * w->Kl) * sizeof(float));
    kl_tile_transpose(padded, w->Kp, s->k_end, w->Kl, s->across, padded);
    kl_split_left(KL_SPLIT_SIX, w->Kp, padded, false, s->across, padded, s->rows, padded);
    kl_split_right(depth, w->Vp, s->v, w->Vp, NULL, s->corrections, padded);
    kl_split_product(KL_SPLIT_SIX, s->S, w->Vp, w->Kp, w->Vp, padded, s->rows, padded, s->corrections, padded, s->S, w->Vp, NULL);
}

static void run_chunk(const panel *w, int64_t count, scratch *s)
{
    int64_t Vp = w->Vp, C = w->C;
    kda_tokens t = {count, w->Kp, w->Kl, s->decay};
    float *u = s->v + count * Vp, *o = u + count * Vp;
    from_start_before(t, s->a, s->a_start);
    kda_from_start(t, s->q, NULL, s->a_start + count * w->Kl, NULL);
    kda_to_end(t, s->k, s->k_end, s->whole);
    kda_to_end(t, s->b, s->k_end + count * w->Kl, s->whole);
    off_diagonal(t, C, s);
    diagonal(t, C, s);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < i; j++)
            s->Aab[i * C + j] = -s->Aab[i * C + j];
    read_state(w, count, s);
    kda_apply_lower(count, Vp, true, s->Aak, C, s->v, u, Vp);
    kda_solve_lower(count, Vp, s->Aab, C, NULL, u, NULL, Vp);
    kda_apply_lower(count, Vp, false, s->Aqk, C, s->v, o, Vp);
    kda_apply_lower(count, Vp, false, s->Aqb, C, u, o, Vp);
    write_state(w, count, s);
}

static void run_panel(const panel *w, scratch *s)
{
    const dplr_problem *p = w->p;
    int64_t size = p->K * p->V, head = w->n * p->H + w->h;
    kda_span span = kda_sequence(p->T, p->cu_seqlens, w->n);
    kda_state_load(KDA_STATE_KV, p->K, p->V, p->h0 ? p->h0 + head * size : NULL, w->v0, w->columns, w->Kp, s->S, w->Vp);
    for (int64_t first = 0; first < span.length; first += w->C) {
        int64_t t = span.begin + first, count = smaller(w->C, span.length - first);
        load(w, t, count, s);
        run_chunk(w, count, s);
        for (int64_t i = 0; i < count; i++)
            memcpy((float *)p->o + ((t + i) * p->H + w->h) * p->V + w->v0, s->v + (2 * count + i) * w->Vp, (size_t)w->columns * sizeof(float));
    }
    if (p->ht)
        kda_state_store(KDA_STATE_KV, p->K, p->V, s->S, w->Vp, w->v0, w->columns, p->ht + head * size);
}

static size_t scratch_bytes(const dplr_problem *p)
{
    kl_arena a = kl_arena_count();
    take_scratch(&a, p);
    return a.used;
}

size_t dplr_cpu_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    if (pass != KL_FORWARD)
        return 0;
    kl_arena a = kl_arena_count();
    kl_arena_take(&a, (size_t)ctx->threads, scratch_bytes(problem));
    return a.used;
}

kl_status dplr_cpu_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes)
{
    const dplr_problem *p = problem;
    size_t each = scratch_bytes(p), needed = dplr_cpu_chunk_workspace(ctx, p, KL_FORWARD);
    KL_REQUIRE(workspace && bytes >= needed, "dplr: workspace: expected %zu bytes, got %zu", needed, workspace ? bytes : 0);
    int64_t panels = kda_panels_a_head(p->N * p->H, p->V, ctx->threads);
    int64_t width = kl_tile_pad(kl_ceil_div(p->V, panels)), tasks = p->N * p->H * panels;
    bool split = p->K >= 32 && p->V >= 32 && kl_split_available();
#pragma omp parallel num_threads(ctx->threads)
    {
        if (split)
            kl_split_begin();
        unsigned mode = kl_flush_subnormals();
        kl_arena mine = kl_arena_over((char *)workspace + (size_t)omp_get_thread_num() * each, each);
        scratch s = take_scratch(&mine, p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            int64_t head = i / panels, v0 = i % panels * width;
            if (v0 >= p->V)
                continue;
            int64_t columns = smaller(width, p->V - v0);
            panel w = {p, head / p->H, head % p->H, v0, columns, chunk_tokens(p), kl_tile_pad(p->K), kl_tile_pad(columns), kda_leading(kl_tile_pad(p->K)), split};
            run_panel(&w, &s);
        }
        if (split)
            kl_split_end();
        kl_restore_subnormals(mode);
    }
    return kl_ok();
}
