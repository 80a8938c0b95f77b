/* Running products that go straight into packed operands of the matrix unit (common/split.h), 32 channels at a time. */
#ifndef KL_KDA_CPU_WALK_H
#define KL_KDA_CPU_WALK_H

#include "common/split.h"
#include "kda/cpu/intra.h"

/* Rows [r, r + count) of channels [c, c + 32), downwards: x0 P(->i) in two parts and, unless x1 is NULL, x1 P(->i) in three,
 * or its negative; to tile rows to0 and to1 on. first: P begins here; else it goes on from product [32], where it is left. */
KL_INLINE void kda_pack_down(kda_tokens t, bool first, bool negative, int64_t r, int64_t count, int64_t c, const float *x0, const float *x1,
                             float *product, char *to0, char *to1)
{
    bool both = c + KL_LANES < t.width;
    int64_t beyond = both ? KL_LANES : 0;
    kl_v zero = {0}, p0 = first ? kl_vset(1.0f) : kl_vload(product);
    kl_v p1 = !both ? zero : first ? kl_vset(1.0f) : kl_vload(product + KL_LANES);
    for (int64_t i = 0, at = r * t.ld + c; i < count; i++, at += t.ld) {
        p0 *= kl_vload(t.decay + at);
        p1 *= kl_vload(t.decay + at + beyond);
        kl_split_pairs(2, kl_vload(x0 + at) * p0, kl_vload(x0 + at + beyond) * p1, to0 + i * 64);
        if (!x1)
            continue;
        kl_v y0 = kl_vload(x1 + at) * p0, y1 = kl_vload(x1 + at + beyond) * p1;
        kl_split_pairs(3, negative ? zero - y0 : y0, negative ? zero - y1 : y1, to1 + i * 64);
    }
    kl_vstore(product, p0);
    kl_vstore(product + KL_LANES, p1);
}

/* Sixteen rows from r on of sixteen channels from c on, upwards: x P(j->), transposed to [16 channels, 16 tokens]. */
KL_INLINE void kda_transpose_up(kda_tokens t, bool first, int64_t r, int64_t c, const float *x, float *product, float *to, int64_t ld_to)
{
    kl_v y[16], p = first ? kl_vset(1.0f) : kl_vload(product);
KL_UNROLL
    for (int j = 15; j >= 0; j--) {
        int64_t at = (r + j) * t.ld + c;
        y[j] = kl_vload(x + at) * p;
        p *= kl_vload(t.decay + at);
    }
    kl_vstore(product, p);
    kl_vtranspose(y);
KL_UNROLL
    for (int j = 0; j < 16; j++)
        kl_vstore(to + j * ld_to, y[j]);
}

/* A tile's sixteen rows from those of two float matrices, x1 NULL: 0. */
KL_INLINE void kda_pack_tile(int parts, const float *x0, const float *x1, int64_t ld, char *to)
{
    for (int64_t r = 0; r < 16; r++)
        kl_split_pairs(parts, kl_vload(x0 + r * ld), x1 ? kl_vload(x1 + r * ld) : (kl_v){0}, to + r * 64);
}

#endif
