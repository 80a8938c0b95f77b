/* The diagonal blocks of A and Aqk where decays within a block are too deep for an inverse: the block is halved four times,
 * and between the halves (tokens i and j of a level m are i = .1..., j = .0... with the highest different bit m)
 *
 *     A[i,j] = x_i . y_j   with x_i = k_i P(middle->i), y_j = k_j P(j->middle)
 *
 * where a token is a row or a column but never both, so one row of operands a token serves. Level 0 is the diagonal, where
 * nothing decays. All factors are at most 1: the only thing that can happen is underflow to what the exact result is too. */
#ifndef KL_KDA_CUDA_PREPARE_LEVELS_CUH
#define KL_KDA_CUDA_PREPARE_LEVELS_CUH

#include "kda/cuda/prepare_operands.cuh"

/* The factors of level m for the 16 tokens, times k and q, to x and y. */
template <int KP>
__device__ __forceinline__ void kda_make_level(int m, const kda_pair a[16], const float *k_norm, const float *q_norm, const unsigned char *k,
                                               const unsigned char *q, unsigned char *x, unsigned char *y, const kda_owner<KP> &own)
{
    kda_pair one = {1.0f, 1.0f}, f[16], P = one;
#pragma unroll
    for (int i = 15; i >= 0; i--) {
        f[i] = P = !m || (i & (m - 1)) == m - 1 ? one : P * a[i < 15 ? i + 1 : 15];
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        P = i & (m - 1) ? P * a[i] : a[i];
        if (i & m)
            f[i] = P;
        int at = own.at(i);
        *(uint32_t *)(x + at) = kda_packed(k_norm[i] * kda_unpack(*(const uint32_t *)(k + at)) * f[i]);
        *(uint32_t *)(y + at) = kda_packed(q_norm[i] * kda_unpack(*(const uint32_t *)(q + at)) * f[i]);
    }
}

/* Takes over from part what belongs to level m. */
__device__ __forceinline__ void kda_take_level(float c[8], const float part[8], int m)
{
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = kda_block_row(e), j = kda_block_column(e), bits = i ^ j;
        bool here = m ? i > j && bits >= m && bits < 2 * m : i == j;
        c[e] = here ? part[e] : c[e];
    }
}

#endif
