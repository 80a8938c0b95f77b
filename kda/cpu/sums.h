/* Sums over the lanes of eight vectors at once. */
#ifndef KL_KDA_CPU_SUMS_H
#define KL_KDA_CPU_SUMS_H

#include <stdbool.h>

#include "common/simd.h"

/* Lane pairs of two vectors: the low halves' sums of a and of b side by side, and so on down to single sums. */
static inline __attribute__((always_inline)) kl_v fold_8(kl_v a, kl_v b)
{
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
static inline __attribute__((always_inline)) kl_v fold_4(kl_v a, kl_v b)
{
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
static inline __attribute__((always_inline)) kl_v fold_2(kl_v a, kl_v b)
{
    return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
static inline __attribute__((always_inline)) kl_v fold_1(kl_v a)
{
    return a + __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

/* Lane 2j of the result is the sum of x[j]. */
static inline __attribute__((always_inline)) kl_v eight_sums(const kl_v x[8])
{
    return fold_1(fold_2(fold_4(fold_8(x[0], x[1]), fold_8(x[2], x[3])), fold_4(fold_8(x[4], x[5]), fold_8(x[6], x[7]))));
}

/* The sums of x[0], x[1] to to0[0], to0[1] and those of x[2], x[3] to to1 (unless NULL), or added to what is there. */
static inline __attribute__((always_inline)) void store_four_sums(const kl_v x[4], bool add, float *to0, float *to1)
{
    typedef float pair __attribute__((vector_size(8)));
    kl_v a = fold_4(fold_8(x[0], x[1]), fold_8(x[2], x[3]));
    a += __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    a = fold_1(a);
    pair sums[2] = {__builtin_shufflevector(a, a, 0, 4), __builtin_shufflevector(a, a, 8, 12)};
    float *to[2] = {to0, to1};
    for (int i = 0; i < 2; i++) {
        if (!to[i])
            continue;
        pair before = {0};
        if (add)
            memcpy(&before, to[i], sizeof before);
        sums[i] += before;
        memcpy(to[i], &sums[i], sizeof before);
    }
}

#endif
