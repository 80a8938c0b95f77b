#include "kda/cpu/chunk.h"

#include <string.h>

#include "common/tile.h"
#include "kda/cpu/gates.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

kda_panel kda_panel_make(const kda_problem *p, int64_t n, int64_t hv, int64_t v0, int64_t columns, bool split)
{
    int64_t Kp = kl_tile_pad(p->K);
    return (kda_panel){p, n, hv, v0, columns, kda_chunk_tokens(p), Kp, kl_tile_pad(columns), kda_leading(Kp), kl_tile_pad(columns), split};
}

bool kda_chunk_splits(const kda_problem *p) { return p->K >= 32 && p->V >= 32 && kl_split_available(); }

void kda_first_chunks(const kda_problem *p, int64_t *first_chunk)
{
    int64_t C = kda_chunk_tokens(p), chunks = 0;
    for (int64_t n = 0; n < p->N; n++) {
        first_chunk[n] = chunks;
        chunks += (kda_sequence(p->T, p->cu_seqlens, n).length + C - 1) / C;
    }
}

kda_chunk kda_chunk_take_shared(kl_arena *a, const kda_problem *p)
{
    int64_t C = kda_chunk_tokens(p), Kp = kl_tile_pad(p->K), Vp = kl_tile_pad(p->V);
    kda_chunk x = {.q = KL_TAKE(a, float, C * kda_leading(Kp)), .k = KL_TAKE(a, float, C * kda_leading(Kp))};
    x.decay = KL_TAKE(a, float, C * kda_leading(Kp));
    x.whole = KL_TAKE(a, float, Kp);
    x.beta = KL_TAKE(a, float, C);
    x.u = KL_TAKE(a, float, C * kda_leading(Vp));
    x.o = KL_TAKE(a, float, C * kda_leading(Vp));
    x.Aqk = KL_TAKE(a, float, C * C);
    x.Akk = KL_TAKE(a, float, C * C);
    return x;
}

kda_chunk kda_chunk_take(kl_arena *a, const kda_problem *p)
{
    int64_t C = kda_chunk_tokens(p), Kp = kl_tile_pad(p->K);
    kda_chunk x = kda_chunk_take_shared(a, p);
    float **keys[] = {&x.qg, &x.kg, &x.ke, &x.level.factor};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        *keys[i] = KL_TAKE(a, float, C * kda_leading(Kp));
    /* The levels are done before kg, qg and ke are made, and again (backward) after they were used. */
    x.level.left = x.kg;
    x.level.right0 = x.qg;
    x.level.right1 = x.ke;
    x.level.across = KL_TAKE(a, float, Kp * (C / 2));
    x.packed.kg = KL_TAKE(a, char, kl_split_bytes(C, Kp));
    x.packed.ke = KL_TAKE(a, char, kl_split_bytes(Kp, C));
    x.packed.Akk = KL_TAKE(a, char, kl_split_bytes(C, C));
    x.packed.S = KL_TAKE(a, char, kl_split_bytes(KDA_PIECE, Kp));
    x.packed.u = KL_TAKE(a, char, kl_split_bytes(KDA_PIECE, C));
    return x;
}

void kda_chunk_load_keys(const kda_panel *w, int64_t t, int64_t first, int64_t count, kda_chunk *x)
{
    const kda_problem *p = w->p;
    int64_t K = p->K, Kl = w->Kl, h = w->hv / (p->HV / p->H);
    int64_t q_stride = kda_stride(p->q_stride, p->H * K), k_stride = kda_stride(p->k_stride, p->H * K);
    int64_t g_stride = kda_stride(p->g_stride, p->HV * p->G), beta_stride = kda_stride(p->beta_stride, p->HV);
    float scale = kda_scale(p->scale, K);
    for (int64_t i = first; i < first + count; i++, t++) {
        kda_unit_row(p->qk_l2norm, K, scale, (const float *)p->q + t * q_stride + h * K, x->q + i * Kl);
        kda_unit_row(p->qk_l2norm, K, 1.0f, (const float *)p->k + t * k_stride + h * K, x->k + i * Kl);
        kda_decay_row(p, w->hv, p->G ? (const float *)p->g + t * g_stride + w->hv * p->G : NULL, x->decay + i * Kl);
        x->beta[i] = kda_beta_value(p->beta_kind, ((const float *)p->beta)[t * beta_stride + w->hv]);
    }
}

const float *kda_chunk_values(const kda_panel *w, int64_t t)
{
    const kda_problem *p = w->p;
    return (const float *)p->v + t * kda_stride(p->v_stride, p->HV * p->V) + w->hv * p->V + w->v0;
}

void kda_chunk_load_values(const kda_panel *w, int64_t t, int64_t first, int64_t count, kda_chunk *x)
{
    for (int64_t i = first; i < first + count; i++, t++) {
        float *u = x->u + i * w->Vl;
        memcpy(u, kda_chunk_values(w, t), (size_t)w->columns * sizeof(float));
        memset(u + w->columns, 0, (size_t)(w->Vp - w->columns) * sizeof(float));
    }
}

void kda_chunk_load(const kda_panel *w, int64_t t, int64_t count, kda_chunk *x)
{
    kda_chunk_load_keys(w, t, 0, count, x);
    kda_chunk_load_values(w, t, 0, count, x);
}

void kda_chunk_prepare(const kda_panel *w, int64_t count, kda_chunk *x)
{
    kda_tokens t = {count, w->Kp, w->Kl, x->decay};
    const float *k_rows = w->p->no_delta ? NULL : x->k;
    kda_off_diagonal(t, x->q, k_rows, x->k, x->Aqk, x->Akk, w->C, &x->level);
    kda_diagonal(t, x->q, k_rows, x->k, x->Aqk, x->Akk, w->C);
    kda_from_start(t, x->q, k_rows, x->qg, x->kg);
    kda_to_end(t, x->k, x->ke, x->whole);
}

void kda_chunk_prepare_write(const kda_panel *w, int64_t count, kda_chunk *x)
{
    kda_tokens t = {count, w->Kp, w->Kl, x->decay};
    if (!w->p->no_delta) {
        kda_off_diagonal(t, x->k, NULL, x->k, x->Akk, NULL, w->C, &x->level);
        kda_diagonal(t, x->k, NULL, x->k, x->Akk, NULL, w->C);
        kda_from_start(t, x->k, NULL, x->kg, NULL);
    }
    kda_to_end(t, x->k, x->ke, x->whole);
}

/* ---- with the state ---- */

/* u_i = beta_i (v_i - S^T kg_i - sum_{j<i} Akk[i,j] u_j), or beta_i v_i */
static void correct(const kda_panel *w, int64_t count, const float *S, kda_chunk *x, float *residual)
{
    int64_t Vp = w->Vp, Vl = w->Vl;
    if (!w->p->no_delta) {
        kl_tile_gemm(KL_TILE_SUB, count, Vp, w->Kp, x->kg, w->Kl, 1, S, Vl, NULL, x->u, Vl);
        kda_solve_lower(count, Vp, x->Akk, w->C, x->beta, x->u, residual, Vl);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < Vp; j++) {
            if (residual)
                residual[i * Vl + j] = x->u[i * Vl + j];
            x->u[i * Vl + j] *= x->beta[i];
        }
}

/* o_i = S^T qg_i + sum_{j<=i} Aqk[i,j] u_j */
static void read(const kda_panel *w, int64_t count, const float *S, kda_chunk *x)
{
    kl_tile_gemm(KL_TILE_SET, count, w->Vp, w->Kp, x->qg, w->Kl, 1, S, w->Vl, NULL, x->o, w->Vl);
    kda_apply_lower(count, w->Vp, false, x->Aqk, w->C, x->u, x->o, w->Vl);
}

/* S <- Diag(P(-1->end)) S + ke^T u */
static void write(const kda_panel *w, int64_t count, kda_chunk *x, float *S)
{
    kl_tile_gemm(KL_TILE_ADD, w->Kp, w->Vp, count, x->ke, 1, w->Kl, x->u, w->Vl, x->whole, S, w->Vl);
}

/* ---- the same on the matrix unit: left operands once, then piece by piece of the columns ---- */

static void pack(const kda_panel *w, int64_t count, unsigned wanted, kda_chunk *x)
{
    int64_t C = w->C, Kp = w->Kp, Kl = w->Kl, padded = kl_tile_pad(count);
    if (!w->p->no_delta) {
        kl_split_left(KL_SPLIT_SIX, count, Kp, true, x->kg, Kl, x->packed.kg, Kp);
        for (int64_t i = KDA_GROUP; i < count; i += KDA_GROUP) /* the columns before each group of rows */
            kl_split_left(KL_SPLIT_SIX, smaller(KDA_GROUP, count - i), i, true, x->Akk + i * C, C, x->packed.Akk + kl_split_bytes(i, C), C);
    }
    if (wanted & KDA_WRITE) {
        float *across = x->kg; /* ke^T [Kp,padded] */
        memset(x->ke + count * Kl, 0, (size_t)((padded - count) * Kl) * sizeof(float));
        kl_tile_transpose(padded, Kp, x->ke, Kl, across, padded);
        kl_split_left(KL_SPLIT_SIX, Kp, padded, false, across, padded, x->packed.ke, C);
    }
}

/* u of a piece, what the state gives being there, packed group by group as it comes: a group needs those before it. */
static void correct_piece(const kda_panel *w, int64_t columns, int64_t count, kda_chunk *x, float *u, float *residual)
{
    int64_t C = w->C, Vl = w->Vl;
    for (int64_t i = 0; i < count; i += KDA_GROUP) {
        int64_t n = smaller(KDA_GROUP, count - i);
        float *ui = u + i * Vl;
        if (w->p->no_delta) {
            for (int64_t r = 0; r < n; r++)
                for (int64_t j = 0; j < columns; j++) {
                    if (residual)
                        residual[(i + r) * Vl + j] = ui[r * Vl + j];
                    ui[r * Vl + j] *= x->beta[i + r];
                }
        } else {
            if (i)
                kl_split_product(KL_SPLIT_SIX, ui, Vl, n, columns, i, x->packed.Akk + kl_split_bytes(i, C), C, x->packed.u, C, ui, Vl, NULL);
            kda_solve_lower(n, columns, x->Akk + i * C + i, C, x->beta + i, ui, residual ? residual + i * Vl : NULL, Vl);
        }
        kl_split_right(n, columns, ui, Vl, NULL, x->packed.u + kl_split_bytes(16, i), C);
    }
}

void kda_chunk_apply(const kda_panel *w, int64_t count, unsigned wanted, float *S, kda_chunk *x, float *residual)
{
    if (!w->split) {
        correct(w, count, S, x, residual);
        if (wanted & KDA_READ)
            read(w, count, S, x);
        if (wanted & KDA_WRITE)
            write(w, count, x, S);
        return;
    }
    pack(w, count, wanted, x);
    for (int64_t v = 0; v < w->Vp; v += KDA_PIECE) {
        int64_t columns = smaller(KDA_PIECE, w->Vp - v);
        kl_split_right(w->Kp, columns, S + v, w->Vl, wanted & KDA_WRITE ? x->whole : NULL, x->packed.S, w->Kp);
        if (!w->p->no_delta)
            kl_split_product(KL_SPLIT_SIX, x->u + v, w->Vl, count, columns, w->Kp, x->packed.kg, w->Kp, x->packed.S, w->Kp, x->u + v, w->Vl, NULL);
        correct_piece(w, columns, count, x, x->u + v, residual ? residual + v : NULL);
        if (wanted & KDA_WRITE)
            kl_split_product(KL_SPLIT_SIX, S + v, w->Vl, w->Kp, columns, kl_tile_pad(count), x->packed.ke, w->C, x->packed.u, w->C, S + v, w->Vl, NULL);
    }
}
