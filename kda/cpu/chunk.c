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

kda_chunk kda_chunk_take(kl_arena *a, const kda_problem *p)
{
    int64_t C = kda_chunk_tokens(p), Kp = kl_tile_pad(p->K), Vp = kl_tile_pad(p->V);
    kda_chunk x;
    float **keys[] = {&x.q, &x.k, &x.decay, &x.qg, &x.kg, &x.ke, &x.level.factor};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        *keys[i] = KL_TAKE(a, float, C * kda_leading(Kp));
    /* The levels are done before kg, qg and ke are made, and again (backward) after they were used. */
    x.level.left = x.kg;
    x.level.right0 = x.qg;
    x.level.right1 = x.ke;
    x.level.across = KL_TAKE(a, float, Kp * (C / 2));
    x.whole = KL_TAKE(a, float, Kp);
    x.beta = KL_TAKE(a, float, C);
    x.u = KL_TAKE(a, float, C * kda_leading(Vp));
    x.o = KL_TAKE(a, float, C * kda_leading(Vp));
    x.Aqk = KL_TAKE(a, float, C * C);
    x.Akk = KL_TAKE(a, float, C * C);
    x.packed.kg = KL_TAKE(a, char, kl_split_bytes(C, Kp));
    x.packed.qg = KL_TAKE(a, char, kl_split_bytes(C, Kp));
    x.packed.ke = KL_TAKE(a, char, kl_split_bytes(Kp, C));
    x.packed.Akk = KL_TAKE(a, char, kl_split_bytes(C, C));
    x.packed.Aqk = KL_TAKE(a, char, kl_split_bytes(C, C));
    x.packed.S = KL_TAKE(a, char, kl_split_bytes(KDA_PIECE, Kp));
    x.packed.u = KL_TAKE(a, char, kl_split_bytes(KDA_PIECE, C));
    x.ahead = (kl_ahead){.rows = 0};
    return x;
}

void kda_chunk_look_ahead(const kda_panel *w, int64_t t, int64_t count, kda_chunk *x)
{
    const kda_problem *p = w->p;
    int64_t h = w->hv / (p->HV / p->H);
    struct {
        const void *tensor;
        int64_t stride, width, first, columns;
    } next[] = {
        {p->q, p->q_stride, p->H * p->K, h * p->K, p->K},
        {p->k, p->k_stride, p->H * p->K, h * p->K, p->K},
        {p->G ? p->g : NULL, p->g_stride, p->HV * p->G, w->hv * p->G, p->G},
        {p->v, p->v_stride, p->HV * p->V, w->hv * p->V + w->v0, w->columns},
    };
    x->ahead = (kl_ahead){.rows = count};
    for (size_t i = 0; i < sizeof next / sizeof *next; i++) {
        if (!next[i].tensor)
            continue;
        int64_t stride = kda_stride(next[i].stride, next[i].width);
        x->ahead.matrix[x->ahead.matrices].row = (const char *)((const float *)next[i].tensor + t * stride + next[i].first);
        x->ahead.matrix[x->ahead.matrices].stride = (size_t)stride * sizeof(float);
        x->ahead.matrix[x->ahead.matrices++].bytes = (size_t)next[i].columns * sizeof(float);
    }
}

void kda_chunk_load(const kda_panel *w, int64_t t, int64_t count, kda_chunk *x)
{
    const kda_problem *p = w->p;
    int64_t K = p->K, Kl = w->Kl, Vp = w->Vp, Vl = w->Vl, h = w->hv / (p->HV / p->H);
    int64_t q_stride = kda_stride(p->q_stride, p->H * K), k_stride = kda_stride(p->k_stride, p->H * K);
    int64_t v_stride = kda_stride(p->v_stride, p->HV * p->V), g_stride = kda_stride(p->g_stride, p->HV * p->G);
    int64_t beta_stride = kda_stride(p->beta_stride, p->HV);
    float scale = kda_scale(p->scale, K);
    for (int64_t i = 0; i < count; i++, t++) {
        kda_unit_row(p->qk_l2norm, K, scale, (const float *)p->q + t * q_stride + h * K, x->q + i * Kl);
        kda_unit_row(p->qk_l2norm, K, 1.0f, (const float *)p->k + t * k_stride + h * K, x->k + i * Kl);
        kda_decay_row(p, w->hv, p->G ? (const float *)p->g + t * g_stride + w->hv * p->G : NULL, x->decay + i * Kl);
        x->beta[i] = kda_beta_value(p->beta_kind, ((const float *)p->beta)[t * beta_stride + w->hv]);
        float *u = x->u + i * Vl;
        memcpy(u, (const float *)p->v + t * v_stride + w->hv * p->V + w->v0, (size_t)w->columns * sizeof(float));
        memset(u + w->columns, 0, (size_t)(Vp - w->columns) * sizeof(float));
    }
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

/* The columns before each group of rows. */
static void pack_lower(kl_split_terms terms, int64_t count, int64_t C, bool negative, const float *A, char *packed)
{
    for (int64_t i = KDA_GROUP; i < count; i += KDA_GROUP)
        kl_split_left(terms, smaller(KDA_GROUP, count - i), i, negative, A + i * C, C, packed + kl_split_bytes(i, C), C);
}

static void pack(const kda_panel *w, int64_t count, unsigned wanted, kda_chunk *x)
{
    int64_t C = w->C, Kp = w->Kp, Kl = w->Kl, padded = kl_tile_pad(count);
    if (!w->p->no_delta) {
        kl_split_left(KL_SPLIT_SIX, count, Kp, true, x->kg, Kl, x->packed.kg, Kp);
        pack_lower(KL_SPLIT_SIX, count, C, true, x->Akk, x->packed.Akk);
    }
    if (wanted & KDA_READ) {
        kl_split_left(KL_SPLIT_THREE, count, Kp, false, x->qg, Kl, x->packed.qg, Kp);
        pack_lower(KL_SPLIT_THREE, count, C, false, x->Aqk, x->packed.Aqk);
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
                kl_split_product(KL_SPLIT_SIX, true, n, columns, i, x->packed.Akk + kl_split_bytes(i, C), C, x->packed.u, C, ui, Vl, &x->ahead);
            kda_solve_lower(n, columns, x->Akk + i * C + i, C, x->beta + i, ui, residual ? residual + i * Vl : NULL, Vl);
        }
        kl_split_right(n, columns, ui, Vl, NULL, x->packed.u + kl_split_bytes(16, i), C);
    }
}

/* o of a piece, likewise. */
static void read_piece(const kda_panel *w, int64_t columns, int64_t count, kda_chunk *x, const float *u, float *o)
{
    int64_t C = w->C, Vl = w->Vl;
    for (int64_t i = 0; i < count; i += KDA_GROUP) {
        int64_t n = smaller(KDA_GROUP, count - i);
        if (i)
            kl_split_product(KL_SPLIT_THREE, true, n, columns, i, x->packed.Aqk + kl_split_bytes(i, C), C, x->packed.u, C, o + i * Vl, Vl, &x->ahead);
        kda_apply_lower(n, columns, false, x->Aqk + i * C + i, C, u + i * Vl, o + i * Vl, Vl);
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
            kl_split_product(KL_SPLIT_SIX, true, count, columns, w->Kp, x->packed.kg, w->Kp, x->packed.S, w->Kp, x->u + v, w->Vl, &x->ahead);
        if (wanted & KDA_READ)
            kl_split_product(KL_SPLIT_THREE, false, count, columns, w->Kp, x->packed.qg, w->Kp, x->packed.S, w->Kp, x->o + v, w->Vl, &x->ahead);
        correct_piece(w, columns, count, x, x->u + v, residual ? residual + v : NULL);
        if (wanted & KDA_READ)
            read_piece(w, columns, count, x, x->u + v, x->o + v);
        if (wanted & KDA_WRITE)
            kl_split_product(KL_SPLIT_SIX, true, w->Kp, columns, kl_tile_pad(count), x->packed.ke, w->C, x->packed.u, w->C, S + v, w->Vl, &x->ahead);
    }
}
