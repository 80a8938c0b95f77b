#include "kda/cpu/intra_bwd.h"

#include "common/simd.h"
#include "common/tile.h"

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline void add_to(float *y, kl_v x) { kl_vstore(y, kl_vload(y) + x); }

void kda_add_sums_from_row(int64_t n, int64_t width, int64_t ld, const float *term, float *da)
{
    for (int64_t c = 0; c < width; c += KL_LANES) {
        kl_v sum = {0};
        for (int64_t t = n - 1; t >= 0; t--) {
            sum += kl_vload(term + t * ld + c);
            add_to(da + t * ld + c, sum);
        }
    }
}

void kda_add_sums_before_row(int64_t n, int64_t width, int64_t ld, const float *term, float *da)
{
    for (int64_t c = 0; c < width; c += KL_LANES) {
        kl_v sum = {0};
        for (int64_t t = 0; t < n; t++) {
            add_to(da + t * ld + c, sum);
            sum += kl_vload(term + t * ld + c);
        }
    }
}

/* The second half as rows: with A[i,j] = (x_i f_i) . (f_j k_j) and D = dA (f k),
 *     dx_i += f_i D_i;   term_i = x_i f_i D_i */
static void rows_backward(kda_tokens t, const float *dA, int64_t lda, int64_t rows, int64_t columns, const float *factor,
                          const float *left, const float *x, float *dx, float *product, float *term, bool add)
{
    int64_t ld = t.ld;
    kl_tile_gemm(KL_TILE_SET, rows, t.width, columns, dA, lda, 1, left, ld, NULL, product, ld);
    for (int64_t c = 0; c < rows * ld; c += KL_LANES) {
        kl_v d = kl_vload(product + c) * kl_vload(factor + c);
        add_to(dx + c, d);
        kl_v e = d * kl_vload(x + c);
        kl_vstore(term + c, add ? kl_vload(term + c) + e : e);
    }
}

static void multiply(int64_t count, const float *x, const float *y, float *z)
{
    for (int64_t c = 0; c < count; c += KL_LANES)
        kl_vstore(z + c, kl_vload(x + c) * kl_vload(y + c));
}

void kda_off_diagonal_backward(kda_tokens t, const kda_intra_grads *g, const kda_level_scratch *scratch)
{
    int64_t ld = t.ld;
    for (int64_t h = KDA_BLOCK; h < t.n; h *= 2) {
        kda_anchor_factors(t, h, scratch->factor);
        for (int64_t s = 0; s + h < t.n; s += 2 * h) {
            int64_t i = s + h, rows = smaller(h, t.n - i), lda = g->lda;
            const float *f_left = scratch->factor + s * ld, *f_right = scratch->factor + i * ld;
            const float *dAqk = g->dAqk + i * lda + s, *dAkk = g->dAkk ? g->dAkk + i * lda + s : NULL;
            multiply(h * ld, g->k + s * ld, f_left, scratch->left);
            rows_backward(t, dAqk, lda, rows, h, f_right, scratch->left, g->q + i * ld, g->dq + i * ld, g->product, g->row_term, false);
            if (dAkk)
                rows_backward(t, dAkk, lda, rows, h, f_right, scratch->left, g->k + i * ld, g->dk + i * ld, g->product, g->row_term, true);
            kda_add_sums_from_row(rows, t.width, ld, g->row_term, g->da + i * ld);
            /* The first half as columns: dk_j += f_j sum_i dA[i,j] x_i f_i;   term_j = k_j f_j sum_i ... */
            multiply(rows * ld, g->q + i * ld, f_right, scratch->right0);
            kl_tile_gemm(KL_TILE_SET, h, t.width, rows, dAqk, 1, lda, scratch->right0, ld, NULL, g->product, ld);
            if (dAkk) {
                multiply(rows * ld, g->k + i * ld, f_right, scratch->right1);
                kl_tile_gemm(KL_TILE_ADD, h, t.width, rows, dAkk, 1, lda, scratch->right1, ld, NULL, g->product, ld);
            }
            for (int64_t c = 0; c < h * ld; c += KL_LANES) {
                kl_v d = kl_vload(g->product + c);
                add_to(g->dk + s * ld + c, d * kl_vload(f_left + c));
                kl_vstore(g->row_term + c, d * kl_vload(scratch->left + c));
            }
            kda_add_sums_before_row(h, t.width, ld, g->row_term, g->da + s * ld);
        }
    }
}

/* Sixteen channels of one diagonal block of m tokens that starts at token s. */
static void diagonal_channels(kda_tokens t, const kda_intra_grads *g, int64_t s, int64_t m, int64_t c)
{
    int64_t ld = t.ld, lda = g->lda;
    const float *q = g->q + s * ld + c, *k = g->k + s * ld + c, *decay = t.decay + s * ld + c;
    const float *dAqk = g->dAqk + s * lda + s, *dAkk = g->dAkk ? g->dAkk + s * lda + s : NULL;
    float *dq = g->dq + s * ld + c, *dk = g->dk + s * ld + c, *da = g->da + s * ld + c;
    for (int64_t j = 0; j < m; j++) {
        kl_v kj = kl_vload(k + j * ld), p = kl_vset(1.0f), term[KDA_BLOCK];
        /* A[j,j] = q_j . k_j */
        add_to(dq + j * ld, dAqk[j * lda + j] * kj);
        kl_v dkj = dAqk[j * lda + j] * kl_vload(q + j * ld);
        for (int64_t i = j + 1; i < m; i++) {
            /* A[i,j] = (x_i P(j->i)) . k_j */
            p *= kl_vload(decay + i * ld);
            kl_v kp = kj * p, w = dAqk[i * lda + j] * kl_vload(q + i * ld);
            add_to(dq + i * ld, dAqk[i * lda + j] * kp);
            if (dAkk) {
                w += dAkk[i * lda + j] * kl_vload(k + i * ld);
                add_to(dk + i * ld, dAkk[i * lda + j] * kp);
            }
            dkj += w * p;
            term[i] = w * kp;
        }
        add_to(dk + j * ld, dkj);
        kl_v sum = {0};
        for (int64_t i = m - 1; i > j; i--) {
            sum += term[i];
            add_to(da + i * ld, sum);
        }
    }
}

void kda_diagonal_backward(kda_tokens t, const kda_intra_grads *g)
{
    for (int64_t s = 0; s < t.n; s += KDA_BLOCK)
        for (int64_t c = 0; c < t.width; c += KL_LANES)
            diagonal_channels(t, g, s, smaller(KDA_BLOCK, t.n - s), c);
}
