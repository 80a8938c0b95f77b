#include "kda/cpu/intra.h"

#include <string.h>

#include "common/simd.h"
#include "common/tile.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- running products ---- */

void kda_from_start(kda_tokens t, const float *x, float *y)
{
    for (int64_t c = 0; c < t.ld; c += KL_LANES) {
        kl_v product = kl_vset(1.0f);
        for (int64_t i = 0; i < t.n; i++) {
            product *= kl_vload(t.decay + i * t.ld + c);
            kl_vstore(y + i * t.ld + c, kl_vload(x + i * t.ld + c) * product);
        }
    }
}

void kda_to_end(kda_tokens t, const float *x, float *y, float *whole)
{
    for (int64_t c = 0; c < t.ld; c += KL_LANES) {
        kl_v product = kl_vset(1.0f);
        for (int64_t j = t.n - 1; j >= 0; j--) {
            kl_vstore(y + j * t.ld + c, kl_vload(x + j * t.ld + c) * product);
            product *= kl_vload(t.decay + j * t.ld + c);
        }
        kl_vstore(whole + c, product);
    }
}

void kda_anchor_factors(kda_tokens t, int64_t h, float *factor)
{
    for (int64_t s = 0; s + h < t.n; s += 2 * h) {
        int64_t anchor = s + h - 1, end = smaller(s + 2 * h, t.n);
        for (int64_t c = 0; c < t.ld; c += KL_LANES) {
            kl_v product = kl_vset(1.0f);
            for (int64_t j = anchor; j >= s; j--) {
                kl_vstore(factor + j * t.ld + c, product);
                product *= kl_vload(t.decay + j * t.ld + c);
            }
            product = kl_vset(1.0f);
            for (int64_t i = anchor + 1; i < end; i++) {
                product *= kl_vload(t.decay + i * t.ld + c);
                kl_vstore(factor + i * t.ld + c, product);
            }
        }
    }
}

/* ---- intra-chunk matrices ---- */

static void multiply_rows(int64_t count, const float *x, const float *factor, float *y)
{
    for (int64_t c = 0; c < count; c += KL_LANES)
        kl_vstore(y + c, kl_vload(x + c) * kl_vload(factor + c));
}

void kda_off_diagonal(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda,
                      const kda_level_scratch *scratch)
{
    int64_t ld = t.ld;
    for (int64_t h = KDA_BLOCK; h < t.n; h *= 2) {
        kda_anchor_factors(t, h, scratch->factor);
        for (int64_t s = 0; s + h < t.n; s += 2 * h) {
            int64_t i = s + h, rows = smaller(h, t.n - i);
            /* A[i,j] = (x_i P(a->i)) . (P(j->a) y_j) */
            multiply_rows(h * ld, y + s * ld, scratch->factor + s * ld, scratch->left);
            kl_tile_transpose(h, ld, scratch->left, ld, scratch->across, h);
            multiply_rows(rows * ld, x0 + i * ld, scratch->factor + i * ld, scratch->right0);
            kl_tile_gemm(KL_TILE_SET, rows, h, ld, scratch->right0, ld, 1, scratch->across, h, NULL, A0 + i * lda + s, lda);
            if (!x1)
                continue;
            multiply_rows(rows * ld, x1 + i * ld, scratch->factor + i * ld, scratch->right1);
            kl_tile_gemm(KL_TILE_SET, rows, h, ld, scratch->right1, ld, 1, scratch->across, h, NULL, A1 + i * lda + s, lda);
        }
    }
}

/* Lane pairs of two vectors: the low halves' sums of a and of b side by side, and so on down to single sums. */
INLINE kl_v fold_8(kl_v a, kl_v b)
{
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE kl_v fold_4(kl_v a, kl_v b)
{
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
INLINE kl_v fold_2(kl_v a, kl_v b)
{
    return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
INLINE kl_v fold_1(kl_v a)
{
    return a + __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

/* Lane 2j of the result is the sum of x[j]. */
INLINE kl_v eight_sums(const kl_v x[8])
{
    return fold_1(fold_2(fold_4(fold_8(x[0], x[1]), fold_8(x[2], x[3])), fold_4(fold_8(x[4], x[5]), fold_8(x[6], x[7]))));
}

enum { WALKERS = 4 }; /* columns that walk together, so that a row is loaded once for them */

/* Row i against the four columns that begin at j: walk[w] = y_(j+w) P(j+w->i) after `moving` of them were moved by the
 * decay of row i (a column's own row does not move it). */
INLINE void diagonal_row(kda_tokens t, int moving, const float *decay, const float *x0, const float *x1, float *walk,
                         float *A0, float *A1, int64_t columns)
{
    kl_v sum[2 * WALKERS] = {{0}};
    for (int64_t c = 0; c < t.ld; c += KL_LANES) {
        kl_v d = kl_vload(decay + c), r0 = kl_vload(x0 + c), r1 = x1 ? kl_vload(x1 + c) : r0;
UNROLL
        for (int w = 0; w < WALKERS; w++) {
            kl_v y = kl_vload(walk + w * t.ld + c);
            if (w < moving) {
                y *= d;
                kl_vstore(walk + w * t.ld + c, y);
            }
            sum[w] += r0 * y;
            sum[WALKERS + w] += r1 * y;
        }
    }
    kl_v sums = eight_sums(sum);
    for (int64_t w = 0; w < columns; w++) {
        A0[w] = sums[2 * w];
        if (x1)
            A1[w] = sums[2 * (WALKERS + w)];
    }
}

void kda_diagonal(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda)
{
    float walk[WALKERS * 256];
    for (int64_t s = 0; s < t.n; s += KDA_BLOCK) {
        int64_t end = smaller(s + KDA_BLOCK, t.n);
        for (int64_t j = s; j < end; j += WALKERS) {
            int64_t present = smaller(WALKERS, end - j);
            memcpy(walk, y + j * t.ld, (size_t)(present * t.ld) * sizeof(float));
            memset(walk + present * t.ld, 0, (size_t)((WALKERS - present) * t.ld) * sizeof(float));
            for (int64_t i = j; i < end; i++) {
                const float *decay = t.decay + i * t.ld, *r0 = x0 + i * t.ld, *r1 = x1 ? x1 + i * t.ld : NULL;
                float *a0 = A0 + i * lda + j, *a1 = x1 ? A1 + i * lda + j : NULL;
                switch (i - j) {
                case 0: diagonal_row(t, 0, decay, r0, r1, walk, a0, a1, 1); break;
                case 1: diagonal_row(t, 1, decay, r0, r1, walk, a0, a1, 2); break;
                case 2: diagonal_row(t, 2, decay, r0, r1, walk, a0, a1, 3); break;
                case 3: diagonal_row(t, 3, decay, r0, r1, walk, a0, a1, 4); break;
                default: diagonal_row(t, 4, decay, r0, r1, walk, a0, a1, present); break;
                }
            }
        }
    }
}

/* ---- triangular systems: whole blocks by products, the diagonal blocks row by row in registers ---- */

INLINE void load_rows(const float *U, int64_t ld, kl_v x[KDA_BLOCK])
{
UNROLL
    for (int i = 0; i < KDA_BLOCK; i++)
        x[i] = kl_vload(U + i * ld);
}

/* Rows beyond m are whatever lies in the scratch there: they are computed and not stored. */
static void substitute_down(int64_t m, const float *A, int64_t lda, const float *beta, float *U, float *residual, int64_t ld)
{
    kl_v r[KDA_BLOCK];
    load_rows(U, ld, r);
UNROLL
    for (int j = 0; j < KDA_BLOCK; j++) {
        if (j >= m)
            break;
        if (residual)
            kl_vstore(residual + j * ld, r[j]);
        kl_v u = beta ? r[j] * beta[j] : r[j];
        kl_vstore(U + j * ld, u);
UNROLL
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
UNROLL
    for (int i = KDA_BLOCK - 1; i >= 0; i--) {
        if (i >= m)
            continue;
        if (residual)
            kl_vstore(residual + i * ld, z[i]);
        kl_v y = beta ? z[i] * beta[i] : z[i];
        kl_vstore(Y + i * ld, y);
UNROLL
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

INLINE void apply_block_down(int from_diagonal, int64_t m, const float *A, int64_t lda, const float *U, float *O, int64_t ld)
{
    kl_v o[KDA_BLOCK];
    load_rows(O, ld, o);
UNROLL
    for (int j = 0; j < KDA_BLOCK; j++) {
        if (j >= m)
            break;
        kl_v u = kl_vload(U + j * ld);
UNROLL
        for (int i = j + from_diagonal; i < KDA_BLOCK; i++)
            o[i] += A[i * lda + j] * u;
    }
UNROLL
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
