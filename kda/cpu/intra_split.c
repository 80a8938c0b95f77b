#include "kda/cpu/intra_split.h"

#include "common/split.h"
#include "kda/cpu/walk.h"

kda_halves_scratch kda_halves_take(kl_arena *a, int64_t C, int64_t Kp)
{
    kda_halves_scratch s = {.columns = KL_TAKE(a, char, kl_split_bytes(C / 2, Kp)), .rows0 = KL_TAKE(a, char, kl_split_bytes(16, Kp))};
    s.rows1 = KL_TAKE(a, char, kl_split_bytes(16, Kp));
    s.across = KL_TAKE(a, float, 32 * 16);
    s.product = KL_TAKE(a, float, Kp + 16);
    return s;
}

/* P(j->a) y_j of tokens [s, s + h), a = s + h - 1 */
static void pack_columns(kda_tokens t, int64_t s, int64_t h, const float *y, const kda_halves_scratch *x)
{
    for (int64_t c = 0; c < t.width; c += 32) {
        bool both = c + KL_LANES < t.width;
        char *to = x->columns + (size_t)(c / 32) * KL_SPLIT_BLOCK;
        for (int64_t j = h - 16; j >= 0; j -= 16) {
            bool first = j == h - 16;
            kda_transpose_up(t, first, s + j, c, y, x->product, x->across, 16);
            if (both)
                kda_transpose_up(t, first, s + j, c + KL_LANES, y, x->product + KL_LANES, x->across + 256, 16);
            kda_pack_tile(3, x->across, both ? x->across + 256 : NULL, 16, to + kl_split_bytes(j, t.width));
        }
    }
}

/* x_i P(a->i) of tokens [i, i + 16) */
static void pack_rows(kda_tokens t, bool first, int64_t i, const float *x0, const float *x1, const kda_halves_scratch *x)
{
    for (int64_t c = 0; c < t.width; c += 32) {
        size_t to = (size_t)(c / 32) * KL_SPLIT_BLOCK;
        kda_pack_down(t, first, false, i, 16, c, x0, x1, x->product + c, x->rows0 + to, x->rows1 + to);
    }
}

void kda_off_diagonal_split(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda,
                            const kda_halves_scratch *x)
{
    for (int64_t h = KDA_BLOCK; h < t.n; h *= 2)
        for (int64_t s = 0; s + h < t.n; s += 2 * h) {
            /* A[i,j] = (x_i P(a->i)) . (P(j->a) y_j) */
            pack_columns(t, s, h, y, x);
            for (int64_t i = s + h; i < s + 2 * h && i < t.n; i += 16) {
                pack_rows(t, i == s + h, i, x0, x1, x);
                kl_split_product(KL_SPLIT_THREE, NULL, 0, 16, h, t.width, x->rows0, t.width, x->columns, t.width, A0 + i * lda + s, lda, NULL);
                if (x1)
                    kl_split_product(KL_SPLIT_SIX, NULL, 0, 16, h, t.width, x->rows1, t.width, x->columns, t.width, A1 + i * lda + s, lda, NULL);
            }
        }
}
