/* A tile of the general recurrence: what its walk needs of 32 tokens of one head, in the blocks of tile.cuh.
 *
 * With S the state before the tile, P(j->i) the product of the decays of tokens j+1..i, q with the scale:
 *
 *     Aab[i,j] = a_i . P(j->i-1) b_j   Aak[i,j] = a_i . P(j->i-1) k_j   (j < i)
 *     Aqb[i,j] = q_i . P(j->i) b_j     Aqk[i,j] = q_i . P(j->i) k_j     (j <= i)
 *     W = (I - Aab)^-1 (a_i P(-1->i-1))      M = (I - Aab)^-1 Aak
 *     u = W S + M v                          u_i = a_i^T S_(i-1), what b_i writes
 *     o = qg S + Aqk v + Aqb u               qg_i = q_i P(-1->i)
 *     S' = Diag(P(-1->end)) S + kg^T v + bg^T u         kg_j = k_j P(j->end), bg_j = b_j P(j->end)
 *
 *     matrix      k        n        blocks, in this order
 *     W, qg       channel  token    [KP/16][2]
 *     kg, bg      token    channel  [2][KP/16]
 *     M,Aqk,Aqb   j        i        (0,0) (0,1) (1,1): zero above the diagonal
 *     decay       float [KP]: P(-1->end) */
#ifndef KL_KDA_CUDA_DPLR_TILE_CUH
#define KL_KDA_CUDA_DPLR_TILE_CUH

#include "kda/cuda/sequences.cuh"
#include "kda/cuda/tile.cuh"

template <int KP> struct dplr_tile {
    static constexpr int matrix = KP / 16 * 2 * KDA_BLOCK_BYTES, triangle = 3 * KDA_BLOCK_BYTES;
    static constexpr int W = 0, qg = matrix, kg = 2 * matrix, bg = 3 * matrix, M = 4 * matrix, Aqk = M + triangle, Aqb = Aqk + triangle,
                         decay = Aqb + triangle, bytes = decay + 4 * KP;
};

/* The problem as the kernels see it. Tiles lie [tile][head]. */
struct dplr_view {
    const uint16_t *q, *k, *a, *b, *g, *v;
    const float *h0;
    float *ht;
    uint16_t *o;
    int64_t H;
    int K, V;
    float scale;
    bool keys_by_16, values_by_16; /* are rows of K (of V) elements whole 16-byte pieces at such addresses? */
    kda_sequences sequences;
    unsigned char *tiles;
};

/* Puts two bf16, rows r and r+1 (r even) of column n, into block b of a matrix. */
__device__ __forceinline__ void dplr_put(unsigned char *matrix, int b, int r, int n, uint32_t pair)
{
    int lane = 4 * (n & 7) + (r >> 1 & 3), word = (n >> 3 & 1) * 2 + (r >> 3 & 1);
    *(uint32_t *)(matrix + kda_slot_of(b, lane) + 4 * kda_word_of(b, word)) = pair;
}

/* Block of a triangle, row and column counted in blocks of 16: j <= i. */
__device__ __forceinline__ int dplr_triangle_block(int j, int i) { return i + j; }

#endif
