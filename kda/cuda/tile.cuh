/* A tile: what the walk over the state needs of 32 tokens of one head, ready to be read as mma operands.
 *
 * With S the state before the tile, P(j->i) the product of the decays of tokens j+1..i, k and q after norm, q with the scale:
 *
 *     A[i,j]  = beta_i k_i . P(j->i) k_j  (j < i)          T = (I + A)^-1
 *     w       = T Diag(beta) (k_i P(-1->i))                u  = T Diag(beta) v - w S            u: what each token writes
 *     o_i     = S^T qg_i + sum_{j<=i} Aqk[i,j] u_j         qg_i = q_i P(-1->i),  Aqk[i,j] = q_i . P(j->i) k_j
 *     S'      = Diag(P(-1->end)) S + sum_j kg_j u_j^T      kg_j = k_j P(j->end)
 *
 * The walk keeps S^T [V,K] as accumulators, 16 columns of V a warp, so every matrix here is the B operand [k x n] of
 * mma m16n8k16, stored block by block, a block being k 16 x n 16 (512 bytes): lane l finds its four words
 * {b0, b1 of columns 0..7, b0, b1 of columns 8..15} in one 16-byte slot. Slots and words are permuted by the
 * block's number so that the threads that write them, each the owner of two channels, meet no bank twice.
 *
 *     matrix  k        n        blocks, in this order
 *     w, qg   channel  token    [KP/16][2]
 *     kg      token    channel  [2][KP/16]
 *     Tb,Aqk  j        i        (0,0) (0,1) (1,1): zero above the diagonal          Tb = T Diag(beta)
 *     decay   float [KP]: P(-1->end)
 *
 * KP is K rounded up to 64, 128 or 256; channels from K on are zero (decay: 1). Tokens beyond the sequence's end are
 * zero in every matrix and decay nothing. */
#ifndef KL_KDA_CUDA_TILE_CUH
#define KL_KDA_CUDA_TILE_CUH

#include "common/device.cuh"

enum { KDA_TILE = 32, KDA_BLOCK_BYTES = 512 };

template <int KP> struct kda_tile {
    static constexpr int matrix = KP / 16 * 2 * KDA_BLOCK_BYTES; /* bytes of w, of qg, of kg */
    static constexpr int w = 0, qg = matrix, kg = 2 * matrix, Tb = 3 * matrix, Aqk = Tb + 3 * KDA_BLOCK_BYTES,
                         decay = Aqk + 3 * KDA_BLOCK_BYTES, bytes = decay + 4 * KP;
};

static inline int kda_padded(int64_t K) { return K <= 64 ? 64 : K <= 128 ? 128 : 256; }
static inline size_t kda_tile_bytes(int64_t K) { return (size_t)kda_padded(K) * (3 * 2 * KDA_BLOCK_BYTES / 16 + 4) + 6 * KDA_BLOCK_BYTES; }

/* Byte offset of lane l's slot in block b of a matrix. */
__device__ __forceinline__ int kda_slot_of(int b, int lane)
{
    return b * KDA_BLOCK_BYTES + 16 * (lane ^ (lane >> 3 & 3) ^ ((b ^ b >> 2) & 1) << 2);
}
/* Which word of the slot holds word r = 2 (column half) + (row half). */
__device__ __forceinline__ int kda_word_of(int b, int r) { return r ^ (b & 2); }

/* Lane's two B fragments of block b: f[0..1] columns 0..7, f[2..3] columns 8..15. */
__device__ __forceinline__ void kda_read_block(uint32_t f[4], const unsigned char *matrix, int b)
{
    uint4 x = *(const uint4 *)(matrix + kda_slot_of(b, kl_lane()));
    bool swapped = b & 2;
    f[0] = swapped ? x.z : x.x;
    f[1] = swapped ? x.w : x.y;
    f[2] = swapped ? x.x : x.z;
    f[3] = swapped ? x.y : x.w;
}
__device__ __forceinline__ void kda_write_block(unsigned char *matrix, int b, const uint32_t f[4])
{
    bool swapped = b & 2;
    *(uint4 *)(matrix + kda_slot_of(b, kl_lane())) = swapped ? make_uint4(f[2], f[3], f[0], f[1]) : make_uint4(f[0], f[1], f[2], f[3]);
}

#endif
