#include "kda/cpu/intra.h"

#include <string.h>

#include "common/simd.h"
#include "common/tile.h"
#include "kda/cpu/sums.h"

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- running products ----
 * A walk is a chain of multiplications, so four columns of sixteen channels walk at a time. */

enum { ABREAST = 4 };

/* Calls body(abreast) for c = 0, 16 abreast, ... with abreast a constant. */
#define FOR_CHANNELS(width, body)                                  \
    do {                                                           \
        int64_t c = 0;                                             \
        for (; c + ABREAST * KL_LANES <= (width); c += ABREAST * KL_LANES) { \
            body(ABREAST);                                         \
        }                                                          \
        for (; c < (width); c += KL_LANES) {                       \
            body(1);                                               \
        }                                                          \
    } while (0)

/* Rows [first, end) downwards: y_i = x_i product, where product includes the decay of row i. x1 may be NULL. */
KL_INLINE void walk_down(int abreast, kda_tokens t, int64_t first, int64_t end, const float *x0, const float *x1, float *y0, float *y1)
{
    kl_v product[ABREAST];
KL_UNROLL
    for (int v = 0; v < abreast; v++)
        product[v] = kl_vset(1.0f);
    for (int64_t i = first; i < end; i++)
KL_UNROLL
        for (int v = 0; v < abreast; v++) {
            int64_t at = i * t.ld + v * KL_LANES;
            product[v] *= kl_vload(t.decay + at);
            kl_vstore(y0 + at, x0 ? kl_vload(x0 + at) * product[v] : product[v]);
            if (x1)
                kl_vstore(y1 + at, kl_vload(x1 + at) * product[v]);
        }
}

/* Rows [first, end) upwards: y_j = x_j product, where product includes the decays of the rows after j; whole, when
 * wanted, is the product over all rows. */
KL_INLINE void walk_up(int abreast, kda_tokens t, int64_t first, int64_t end, const float *x, float *y, float *whole)
{
    kl_v product[ABREAST];
KL_UNROLL
    for (int v = 0; v < abreast; v++)
        product[v] = kl_vset(1.0f);
    for (int64_t j = end - 1; j >= first; j--)
KL_UNROLL
        for (int v = 0; v < abreast; v++) {
            int64_t at = j * t.ld + v * KL_LANES;
            kl_vstore(y + at, x ? kl_vload(x + at) * product[v] : product[v]);
            product[v] *= kl_vload(t.decay + at);
        }
KL_UNROLL
    for (int v = 0; v < abreast; v++)
        if (whole)
            kl_vstore(whole + v * KL_LANES, product[v]);
}

static kda_tokens from_channel(kda_tokens t, int64_t c)
{
    t.decay += c;
    return t;
}

void kda_from_start(kda_tokens t, const float *x0, const float *x1, float *y0, float *y1)
{
#define BODY(abreast) \
    walk_down(abreast, from_channel(t, c), 0, t.n, x0 + c, x1 ? x1 + c : NULL, y0 + c, x1 ? y1 + c : NULL)
    FOR_CHANNELS(t.width, BODY);
#undef BODY
}

void kda_to_end(kda_tokens t, const float *x, float *y, float *whole)
{
#define BODY(abreast) walk_up(abreast, from_channel(t, c), 0, t.n, x + c, y + c, whole + c)
    FOR_CHANNELS(t.width, BODY);
#undef BODY
}

void kda_anchor_factors(kda_tokens t, int64_t h, float *factor)
{
    for (int64_t s = 0; s + h < t.n; s += 2 * h) {
        int64_t end = smaller(s + 2 * h, t.n);
#define BODY(abreast)                                                                        \
    walk_up(abreast, from_channel(t, c), s, s + h, NULL, factor + c, NULL);                  \
    walk_down(abreast, from_channel(t, c), s + h, end, NULL, NULL, factor + c, NULL)
        FOR_CHANNELS(t.width, BODY);
#undef BODY
    }
}

/* ---- intra-chunk matrices ---- */

void kda_off_diagonal(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda,
                      const kda_level_scratch *scratch)
{
    int64_t ld = t.ld;
    float *across = scratch->across, *left = scratch->left, *right0 = scratch->right0, *right1 = scratch->right1;
    for (int64_t h = KDA_BLOCK; h < t.n; h *= 2)
        for (int64_t s = 0; s + h < t.n; s += 2 * h) {
            int64_t i = s + h, end = smaller(s + 2 * h, t.n);
            /* A[i,j] = (x_i P(a->i)) . (P(j->a) y_j) */
#define BODY(abreast)                                                                                                  \
    walk_up(abreast, from_channel(t, c), s, i, y + c, left + c, NULL);                                                 \
    walk_down(abreast, from_channel(t, c), i, end, x0 + c, x1 ? x1 + c : NULL, right0 + c, x1 ? right1 + c : NULL)
            FOR_CHANNELS(t.width, BODY);
#undef BODY
            kl_tile_transpose(h, t.width, left + s * ld, ld, across, h);
            kl_tile_gemm(KL_TILE_SET, end - i, h, t.width, right0 + i * ld, ld, 1, across, h, NULL, A0 + i * lda + s, lda);
            if (x1)
                kl_tile_gemm(KL_TILE_SET, end - i, h, t.width, right1 + i * ld, ld, 1, across, h, NULL, A1 + i * lda + s, lda);
        }
}

enum { MOST_VECTORS = 8 }; /* of a row that are walked at a time */

/* A[i,j] and A[i,j+1] of one row i for both row matrices, or what these channels add to them. */
KL_INLINE void diagonal_row(int vectors, bool two, bool add, const float *x0, const float *x1, const kl_v *left, const kl_v *right, float *A0, float *A1)
{
    kl_v sum[4] = {{0}};
KL_UNROLL
    for (int v = 0; v < vectors; v++) {
        kl_v r0 = kl_vload(x0 + v * KL_LANES);
        sum[0] += r0 * left[v];
        sum[1] += r0 * right[v];
        if (two) {
            kl_v r1 = kl_vload(x1 + v * KL_LANES);
            sum[2] += r1 * left[v];
            sum[3] += r1 * right[v];
        }
    }
    store_four_sums(sum, add, A0, two ? A1 : NULL);
}

/* Columns j and j + 1 of a diagonal block against its rows j .. end-1: each column walks down in registers, y_j P(j->i),
 * and every row is loaded once for the two. */
KL_INLINE void diagonal_columns(int vectors, bool two, bool add, kda_tokens t, int64_t j, int64_t end, const float *x0, const float *x1,
                                const float *y, float *A0, float *A1, int64_t lda)
{
    kl_v left[MOST_VECTORS], right[MOST_VECTORS];
KL_UNROLL
    for (int v = 0; v < vectors; v++) {
        left[v] = kl_vload(y + j * t.ld + v * KL_LANES);
        right[v] = (kl_v){0};
    }
    for (int64_t i = j; i < end; i++) {
        diagonal_row(vectors, two, add, x0 + i * t.ld, two ? x1 + i * t.ld : NULL, left, right, A0 + i * lda + j, two ? A1 + i * lda + j : NULL);
        if (i + 1 == end)
            break;
        const float *decay = t.decay + (i + 1) * t.ld;
KL_UNROLL
        for (int v = 0; v < vectors; v++) {
            kl_v d = kl_vload(decay + v * KL_LANES);
            left[v] *= d;
            right[v] *= d;
        }
        if (i == j)
KL_UNROLL
            for (int v = 0; v < vectors; v++)
                right[v] = kl_vload(y + (j + 1) * t.ld + v * KL_LANES);
    }
}

KL_INLINE void diagonal_channels(int vectors, bool two, kda_tokens t, int64_t c, const float *x0, const float *x1, const float *y, float *A0,
                                 float *A1, int64_t lda)
{
    t.decay += c;
    for (int64_t j = 0; j < t.n; j += 2) {
        int64_t end = smaller(j / KDA_BLOCK * KDA_BLOCK + KDA_BLOCK, t.n);
        if (c)
            diagonal_columns(vectors, two, true, t, j, end, x0 + c, two ? x1 + c : NULL, y + c, A0, A1, lda);
        else
            diagonal_columns(vectors, two, false, t, j, end, x0 + c, two ? x1 + c : NULL, y + c, A0, A1, lda);
    }
}

void kda_diagonal(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda)
{
    int64_t c = 0;
#define CHANNELS(vectors)                                                 \
    for (; c + (vectors) * KL_LANES <= t.width; c += (vectors) * KL_LANES) \
        if (x1)                                                           \
            diagonal_channels(vectors, true, t, c, x0, x1, y, A0, A1, lda); \
        else                                                              \
            diagonal_channels(vectors, false, t, c, x0, NULL, y, A0, NULL, lda)
    CHANNELS(8);
    CHANNELS(4);
    CHANNELS(1);
#undef CHANNELS
}

/* ---- triangular systems: whole blocks by products, the diagonal blocks row by row in registers ---- */

KL_INLINE void load_rows(const float *U, int64_t ld, kl_v x[KDA_BLOCK])
{
KL_UNROLL
    for (int i = 0; i < KDA_BLOCK; i++)
        x[i] = kl_vload(U + i * ld);
}

/* Rows beyond m are whatever lies in the scratch there: they are computed and not stored. */
static void substitute_down(int64_t m, const float *A, int64_t lda, const float *beta, float *U, float *residual, int64_t ld)
{
    kl_v r[KDA_BLOCK];
    load_rows(U, ld, r);
KL_UNROLL
    for (int j = 0; j < KDA_BLOCK; j++) {
        if (j >= m)
            break;
        if (residual)
            kl_vstore(residual + j * ld, r[j]);
        kl_v u = beta ? r[j] * beta[j] : r[j];
        kl_vstore(U + j * ld, u);
KL_UNROLL
        for (int i = j + 1; i < KDA_BLOCK; i++)
            r[i] -= A[i * lda + j] * u;
    }
}

void kda_solve_lower(int64_t n, int64_t columns, const float *A, int64_t lda, const float *beta, float *U, float *residual, int64_t ld)
{
    for (int64_t s = 0; s < n; s += KDA_BLOCK) {
        int64_t m = smaller(KDA_BLOCK, n - s);
        kl_tile_gemm(KL_TILE_SUB, m, columns, s, A + s * lda, lda, 1, U, ld, NULL, U + s * ld, ld);
        for (int64_t v = 0; v < columns; v += KL_LANES)
            substitute_down(m, A + s * lda + s, lda, beta ? beta + s : NULL, U + s * ld + v, residual ? residual + s * ld + v : NULL, ld);
    }
}

static void substitute_up(int64_t m, const float *A, int64_t lda, const float *beta, float *Y, float *residual, int64_t ld)
{
    kl_v z[KDA_BLOCK];
    load_rows(Y, ld, z);
KL_UNROLL
    for (int i = KDA_BLOCK - 1; i >= 0; i--) {
        if (i >= m)
            continue;
        if (residual)
            kl_vstore(residual + i * ld, z[i]);
        kl_v y = beta ? z[i] * beta[i] : z[i];
        kl_vstore(Y + i * ld, y);
KL_UNROLL
        for (int j = 0; j < i; j++)
            z[j] -= A[i * lda + j] * y;
    }
}

void kda_solve_upper(int64_t n, int64_t columns, const float *A, int64_t lda, const float *beta, float *Y, float *residual, int64_t ld)
{
    for (int64_t s = (n - 1) / KDA_BLOCK * KDA_BLOCK; s >= 0; s -= KDA_BLOCK) {
        int64_t m = smaller(KDA_BLOCK, n - s), below = s + m;
        kl_tile_gemm(KL_TILE_SUB, m, columns, n - below, A + below * lda + s, 1, lda, Y + below * ld, ld, NULL, Y + s * ld, ld);
        for (int64_t v = 0; v < columns; v += KL_LANES)
            substitute_up(m, A + s * lda + s, lda, beta ? beta + s : NULL, Y + s * ld + v, residual ? residual + s * ld + v : NULL, ld);
    }
}

KL_INLINE void apply_block_down(int from_diagonal, int64_t m, const float *A, int64_t lda, const float *U, float *O, int64_t ld)
{
    kl_v o[KDA_BLOCK];
    load_rows(O, ld, o);
KL_UNROLL
    for (int j = 0; j < KDA_BLOCK; j++) {
        if (j >= m)
            break;
        kl_v u = kl_vload(U + j * ld);
KL_UNROLL
        for (int i = j + from_diagonal; i < KDA_BLOCK; i++)
            o[i] += A[i * lda + j] * u;
    }
KL_UNROLL
    for (int i = 0; i < KDA_BLOCK; i++)
        if (i < m)
            kl_vstore(O + i * ld, o[i]);
}

void kda_apply_lower(int64_t n, int64_t columns, bool strict, const float *A, int64_t lda, const float *U, float *O, int64_t ld)
{
    for (int64_t s = 0; s < n; s += KDA_BLOCK) {
        int64_t m = smaller(KDA_BLOCK, n - s);
        kl_tile_gemm(KL_TILE_ADD, m, columns, s, A + s * lda, lda, 1, U, ld, NULL, O + s * ld, ld);
        for (int64_t v = 0; v < columns; v += KL_LANES) {
            if (strict)
                apply_block_down(1, m, A + s * lda + s, lda, U + s * ld + v, O + s * ld + v, ld);
            else
                apply_block_down(0, m, A + s * lda + s, lda, U + s * ld + v, O + s * ld + v, ld);
        }
    }
}

void kda_apply_upper(int64_t n, int64_t columns, const float *A, int64_t lda, const float *U, float *O, int64_t ld)
{
    for (int64_t s = 0; s < n; s += KDA_BLOCK) {
        int64_t m = smaller(KDA_BLOCK, n - s), below = s + m;
        kl_tile_gemm(KL_TILE_ADD, m, columns, n - below, A + below * lda + s, 1, lda, U + below * ld, ld, NULL, O + s * ld, ld);
        const float *diagonal = A + s * lda + s;
        for (int64_t v = 0; v < columns; v += KL_LANES)
            for (int64_t j = 0; j < m; j++) {
                kl_v o = kl_vload(O + (s + j) * ld + v);
                for (int64_t i = j; i < m; i++)
                    o += diagonal[i * lda + j] * kl_vload(U + (s + i) * ld + v);
                kl_vstore(O + (s + j) * ld + v, o);
            }
    }
}
