/* kda_off_diagonal on the matrix unit. Operands are packed a few rows at a time, so that they never leave the first cache. */
#ifndef KL_KDA_CPU_INTRA_SPLIT_H
#define KL_KDA_CPU_INTRA_SPLIT_H

#include "common/arena.h"
#include "kda/cpu/intra.h"

typedef struct kda_halves_scratch {
    char *columns, *rows0, *rows1; /* right operand [Kp,C/2]; left ones [16,Kp] */
    float *across, *product;       /* [32,16]; [Kp padded to 32] */
} kda_halves_scratch;
kda_halves_scratch kda_halves_take(kl_arena *a, int64_t C, int64_t Kp);

/* As kda_off_diagonal, t.n a multiple of 16: A0 to about 2^-18 of |x0| |y|, A1 as exact as floats are. */
void kda_off_diagonal_split(kda_tokens t, const float *x0, const float *x1, const float *y, float *A0, float *A1, int64_t lda,
                            const kda_halves_scratch *scratch);

#endif
