#include "kda/cpu/chunk_split.h"

#include <string.h>

#include "common/tile.h"
#include "kda/cpu/walk.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

kda_split kda_split_take(kl_arena *a, const kda_problem *p)
{
    int64_t C = kda_chunk_tokens(p), Kp = kl_tile_pad(p->K), Vp = kl_tile_pad(p->V);
    kda_split x = {.chunk = kda_chunk_take_shared(a, p), .halves = kda_halves_take(a, C, Kp)};
    x.kg = KL_TAKE(a, char, kl_split_bytes(KDA_GROUP, Kp));
    x.qg = KL_TAKE(a, char, kl_split_bytes(KDA_GROUP, Kp));
    x.Akk = KL_TAKE(a, char, kl_split_bytes(KDA_GROUP, C));
    x.Aqk = KL_TAKE(a, char, kl_split_bytes(KDA_GROUP, C));
    x.ke = KL_TAKE(a, char, kl_split_bytes(32, C));
    x.S = KL_TAKE(a, char, kl_split_bytes(Vp, Kp));
    x.u = KL_TAKE(a, char, kl_split_bytes(Vp, C));
    x.across = KL_TAKE(a, float, 32 * C);
    x.product = KL_TAKE(a, float, Kp + KL_LANES);
    return x;
}

void kda_split_look_ahead(const kda_panel *w, int64_t t, int64_t count, kda_split *x)
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

/* q, k, decay and beta of rows [i, i + 16) of the chunk. After its last token come tokens that do nothing: q, k and beta 0,
 * decay 1. */
static void load_strip(const kda_panel *w, int64_t t, int64_t count, int64_t i, kda_chunk *x)
{
    int64_t present = smaller(16, count - i), end = i + 16;
    kda_chunk_load_keys(w, t + i, i, present, x);
    for (i += present; i < end; i++) {
        memset(x->q + i * w->Kl, 0, (size_t)w->Kp * sizeof(float));
        memset(x->k + i * w->Kl, 0, (size_t)w->Kp * sizeof(float));
        for (int64_t c = 0; c < w->Kp; c += KL_LANES)
            kl_vstore(x->decay + i * w->Kl + c, kl_vset(1.0f));
        x->beta[i] = 0.0f;
    }
}

/* What v adds of rows [i, i + n): read where it lies if there it is whole tiles, else from u, padded with 0. */
static const float *values(const kda_panel *w, int64_t t, int64_t count, int64_t i, int64_t n, kda_chunk *x, int64_t *ld)
{
    if (i + n <= count && w->columns == w->Vp && !w->p->no_delta) {
        *ld = kda_stride(w->p->v_stride, w->p->HV * w->p->V);
        return kda_chunk_values(w, t + i);
    }
    int64_t present = smaller(n, count - i);
    kda_chunk_load_values(w, t + i, i, present, x);
    memset(x->u + (i + present) * w->Vl, 0, (size_t)((n - present) * w->Vl) * sizeof(float));
    *ld = w->Vl;
    return x->u + i * w->Vl;
}

/* Group by group and in it by sixteen tokens, which stay in the first cache: q, k, decay and beta; A on its diagonal; and
 *     u_i = v_i - S^T kg_i,   o_i = S^T qg_i      with kg_i = k_i P(-1->i), qg_i = q_i P(-1->i) */
static void from_state(const kda_panel *w, int64_t t, int64_t count, kda_split *x)
{
    kda_chunk *c = &x->chunk;
    const float *k_rows = w->p->no_delta ? NULL : c->k;
    int64_t rows = kl_tile_pad(count), Kp = w->Kp, Kl = w->Kl, Vp = w->Vp, Vl = w->Vl;
    for (int64_t i = 0; i < rows; i += KDA_GROUP) {
        int64_t n = smaller(KDA_GROUP, rows - i), ld_v;
        for (int64_t r = i; r < i + n; r += 16) {
            kda_tokens strip = {16, Kp, Kl, c->decay + r * Kl};
            int64_t at = r * Kl, block = r * w->C + r;
            load_strip(w, t, count, r, c);
            kda_diagonal(strip, c->q + at, k_rows ? k_rows + at : NULL, c->k + at, c->Aqk + block, c->Akk + block, w->C);
            for (int64_t d = 0; d < Kp; d += 32) {
                size_t to = kl_split_bytes(r - i, Kp) + (size_t)(d / 32) * KL_SPLIT_BLOCK;
                kda_pack_down(strip, r == 0, true, 0, 16, d, c->q + at, k_rows ? k_rows + at : NULL, x->product + d, x->qg + to, x->kg + to);
            }
        }
        const float *v = values(w, t, count, i, n, c, &ld_v);
        if (k_rows)
            kl_split_product(KL_SPLIT_SIX, v, ld_v, n, Vp, Kp, x->kg, Kp, x->S, Kp, c->u + i * Vl, Vl, &x->ahead);
        kl_split_product(KL_SPLIT_THREE, NULL, 0, n, Vp, Kp, x->qg, Kp, x->S, Kp, c->o + i * Vl, Vl, &x->ahead);
    }
}

/* u_i <- beta_i (u_i - sum_{j<i} Akk[i,j] u_j), or beta_i u_i, and o_i += sum_{j<=i} Aqk[i,j] u_j, group by group: a group
 * needs those before it, packed. Within a group the unit is of no use: it would multiply tokens by 0 that come later, and
 * they may be anything. */
static void within_chunk(const kda_panel *w, int64_t rows, kda_split *x)
{
    int64_t C = w->C, Vp = w->Vp, Vl = w->Vl;
    for (int64_t i = 0; i < rows; i += KDA_GROUP) {
        int64_t n = smaller(KDA_GROUP, rows - i);
        const float *Akk = x->chunk.Akk + i * C, *Aqk = x->chunk.Aqk + i * C, *beta = x->chunk.beta + i;
        float *u = x->chunk.u + i * Vl, *o = x->chunk.o + i * Vl;
        if (i) {
            kl_split_left(KL_SPLIT_THREE, n, i, false, Aqk, C, x->Aqk, C);
            kl_split_product(KL_SPLIT_THREE, o, Vl, n, Vp, i, x->Aqk, C, x->u, C, o, Vl, &x->ahead);
        }
        if (i && !w->p->no_delta) {
            kl_split_left(KL_SPLIT_SIX, n, i, true, Akk, C, x->Akk, C);
            kl_split_product(KL_SPLIT_SIX, u, Vl, n, Vp, i, x->Akk, C, x->u, C, u, Vl, &x->ahead);
        }
        if (!w->p->no_delta)
            kda_solve_lower(n, Vp, Akk + i, C, beta, u, NULL, Vl);
        else
            for (int64_t j = 0; j < n * Vl; j++)
                u[j] *= beta[j / Vl];
        kda_apply_lower(n, Vp, false, Aqk + i, C, u, o, Vl);
        kl_split_right(n, Vp, u, Vl, NULL, x->u + kl_split_bytes(16, i), C);
    }
}

/* S <- Diag(whole) S + ke^T u, with ke_j = k_j P(j->end), whole = P(-1->end), 32 channels at a time */
static void to_state(const kda_panel *w, kda_tokens t, float *S, kda_split *x)
{
    int64_t C = w->C, Kp = w->Kp, Vp = w->Vp, Vl = w->Vl;
    for (int64_t d = 0; d < Kp; d += 32) {
        int64_t channels = smaller(32, Kp - d);
        for (int64_t c = 0; c < channels; c += 16) {
            float *across = x->across + c * C;
            for (int64_t r = t.n - 16; r >= 0; r -= 16)
                kda_transpose_up(t, r == t.n - 16, r, d + c, x->chunk.k, x->chunk.whole + d + c, across + r, C);
            for (int64_t r = 0; r < t.n; r += 32)
                kda_pack_tile(2, across + r, r + 16 < t.n ? across + r + 16 : NULL, C, x->ke + kl_split_bytes(c, C) + (size_t)(r / 32) * KL_SPLIT_BLOCK);
        }
        for (int64_t c = d; c < d + channels; c++)
            for (int64_t v = 0; v < Vp; v += KL_LANES)
                kl_vstore(S + c * Vl + v, kl_vload(S + c * Vl + v) * x->chunk.whole[c]);
        kl_split_product(KL_SPLIT_THREE, S + d * Vl, Vl, channels, Vp, t.n, x->ke, C, x->u, C, S + d * Vl, Vl, &x->ahead);
    }
}

/* Precision: S^T kg, Akk and Akk u are made of six products of parts, since u is what everything later is computed from;
 * S^T qg, Aqk, Aqk u and ke^T u of three. */
void kda_split_chunk(const kda_panel *w, int64_t t, int64_t count, float *S, kda_split *x)
{
    kda_chunk *c = &x->chunk;
    const float *k_rows = w->p->no_delta ? NULL : c->k;
    kda_tokens tokens = {kl_tile_pad(count), w->Kp, w->Kl, c->decay};
    kl_split_right(w->Kp, w->Vp, S, w->Vl, NULL, x->S, w->Kp);
    from_state(w, t, count, x);
    kda_off_diagonal_split(tokens, c->q, k_rows, c->k, c->Aqk, c->Akk, w->C, &x->halves);
    within_chunk(w, tokens.n, x);
    to_state(w, tokens, S, x);
}
