#include "kda/cpu/chunk.h"

#include <string.h>

#include "common/tile.h"
#include "kda/cpu/gates.h"

kda_panel kda_panel_make(const kda_problem *p, int64_t n, int64_t hv, int64_t v0, int64_t columns, bool split)
{
    int64_t Kp = kl_tile_pad(p->K);
    return (kda_panel){p, n, hv, v0, columns, kda_chunk_tokens(p), Kp, kl_tile_pad(columns), kda_leading(Kp), split};
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
    x.u = KL_TAKE(a, float, C * Vp);
    x.o = KL_TAKE(a, float, C * Vp);
    x.Aqk = KL_TAKE(a, float, C * C);
    x.Akk = KL_TAKE(a, float, C * C);
    size_t keys_by_tokens = kl_split_bytes(C, Kp), tokens_by_keys = kl_split_bytes(Kp, C);
    x.rows = KL_TAKE(a, char, keys_by_tokens > tokens_by_keys ? keys_by_tokens : tokens_by_keys);
    x.state = KL_TAKE(a, char, kl_split_bytes(Vp, Kp));
    x.corrections = KL_TAKE(a, char, kl_split_bytes(Vp, C));
    return x;
}

void kda_chunk_load(const kda_panel *w, int64_t t, int64_t count, kda_chunk *x)
{
    const kda_problem *p = w->p;
    int64_t K = p->K, Kl = w->Kl, Vp = w->Vp, h = w->hv / (p->HV / p->H);
    int64_t q_stride = kda_stride(p->q_stride, p->H * K), k_stride = kda_stride(p->k_stride, p->H * K);
    int64_t v_stride = kda_stride(p->v_stride, p->HV * p->V), g_stride = kda_stride(p->g_stride, p->HV * p->G);
    int64_t beta_stride = kda_stride(p->beta_stride, p->HV);
    float scale = kda_scale(p->scale, K);
    for (int64_t i = 0; i < count; i++, t++) {
        kda_unit_row(p->qk_l2norm, K, scale, (const float *)p->q + t * q_stride + h * K, x->q + i * Kl);
        kda_unit_row(p->qk_l2norm, K, 1.0f, (const float *)p->k + t * k_stride + h * K, x->k + i * Kl);
        kda_decay_row(p, w->hv, p->G ? (const float *)p->g + t * g_stride + w->hv * p->G : NULL, x->decay + i * Kl);
        x->beta[i] = kda_beta_value(p->beta_kind, ((const float *)p->beta)[t * beta_stride + w->hv]);
        float *u = x->u + i * Vp;
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

void kda_chunk_take_state(const kda_panel *w, float *S, bool written, kda_chunk *x)
{
    if (w->split)
        kl_split_right(w->Kp, w->Vp, S, w->Vp, written ? x->whole : NULL, x->state);
}

void kda_chunk_correct(const kda_panel *w, int64_t count, const float *S, kda_chunk *x, float *residual)
{
    int64_t C = w->C, Kp = w->Kp, Vp = w->Vp;
    if (w->p->no_delta) {
        /* u = beta v */
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < Vp; j++) {
                if (residual)
                    residual[i * Vp + j] = x->u[i * Vp + j];
                x->u[i * Vp + j] *= x->beta[i];
            }
        return;
    }
    /* u_i = beta_i (v_i - S^T kg_i - sum_{j<i} Akk[i,j] u_j) */
    if (w->split) {
        kl_split_left(count, Kp, -1.0f, x->kg, w->Kl, x->rows);
        kl_split_product(true, count, Vp, Kp, x->rows, x->state, x->u, Vp);
    } else {
        kl_tile_gemm(KL_TILE_SUB, count, Vp, Kp, x->kg, w->Kl, 1, S, Vp, NULL, x->u, Vp);
    }
    kda_solve_lower(count, Vp, x->Akk, C, x->beta, x->u, residual, Vp);
}

void kda_chunk_read(const kda_panel *w, int64_t count, const float *S, kda_chunk *x)
{
    int64_t C = w->C, Kp = w->Kp, Vp = w->Vp;
    /* o_i = S^T qg_i + sum_{j<=i} Aqk[i,j] u_j */
    if (w->split) {
        kl_split_left(count, Kp, 1.0f, x->qg, w->Kl, x->rows);
        kl_split_product(false, count, Vp, Kp, x->rows, x->state, x->o, Vp);
    } else {
        kl_tile_gemm(KL_TILE_SET, count, Vp, Kp, x->qg, w->Kl, 1, S, Vp, NULL, x->o, Vp);
    }
    kda_apply_lower(count, Vp, false, x->Aqk, C, x->u, x->o, Vp);
}

void kda_chunk_write(const kda_panel *w, int64_t count, kda_chunk *x, float *S)
{
    int64_t Kp = w->Kp, Kl = w->Kl, Vp = w->Vp, padded = kl_tile_pad(count);
    /* S <- Diag(P(-1->end)) S + ke^T u */
    if (w->split) {
        float *across = x->kg; /* ke^T [Kp,padded]; kg has been read */
        memset(x->ke + count * Kl, 0, (size_t)((padded - count) * Kl) * sizeof(float));
        kl_tile_transpose(padded, Kp, x->ke, Kl, across, padded);
        kl_split_left(Kp, padded, 1.0f, across, padded, x->rows);
        kl_split_right(count, Vp, x->u, Vp, NULL, x->corrections);
        kl_split_product(true, Kp, Vp, padded, x->rows, x->corrections, S, Vp);
    } else {
        kl_tile_gemm(KL_TILE_ADD, Kp, Vp, count, x->ke, 1, Kl, x->u, Vp, x->whole, S, Vp);
    }
}
