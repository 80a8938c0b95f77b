/* The tile of tile.cuh for the walk by warpgroups: the same matrices as B operands [k x n] of wgmma, which reads them
 * straight from shared memory as 8 x 8 core matrices (8 columns n of 16 bytes, 8 values of k each):
 *
 *     matrix  k        n                          core (k / 8, n / 8) at
 *     RO      channel  -w of 32 tokens, then qg   1040 (k / 8) + 128 (n / 8)
 *     G       token    kg of KP channels          (16 KP + 16) (k / 8) + 128 (n / 8)
 *     Tb,Aqk  j        i                          512 (j / 8) + 128 (i / 8), zero above the diagonal
 *     decay   float [KP]
 *
 * so that [Tb v | 0] + S^T RO is [u^T | S^T qg^T]. The 16 bytes between rows of cores keep the threads that write them, each
 * the owner of two channels, on different banks. */
#ifndef KL_KDA_CUDA_CORE_TILE_CUH
#define KL_KDA_CUDA_CORE_TILE_CUH

#include "kda/cuda/tile.cuh"

template <int KP> struct kda_core_tile {
    static constexpr int RO_row = 8 * 128 + 16, G_row = 16 * KP + 16, T_row = 512; /* bytes from k to k + 8 */
    static constexpr int RO = 0, G = KP / 8 * RO_row, Tb = G + KDA_TILE / 8 * G_row, Aqk = Tb + 2048, decay = Aqk + 2048, bytes = decay + 4 * KP;
    static_assert(bytes % 16 == 0, "bulk copies move 16 bytes");
};

static inline size_t kda_core_tile_bytes(int64_t K) { return K <= 64 ? kda_core_tile<64>::bytes : kda_core_tile<128>::bytes; }

/* Byte offsets: of w and qg at (channel, token), of kg, of Tb and Aqk. */
template <int KP> __host__ __device__ __forceinline__ int kda_core_w(int c, int token)
{
    return kda_core_tile<KP>::RO + c / 8 * kda_core_tile<KP>::RO_row + token / 8 * 128 + token % 8 * 16 + c % 8 * 2;
}
template <int KP> __host__ __device__ __forceinline__ int kda_core_qg(int c, int token) { return kda_core_w<KP>(c, token) + 512; }
template <int KP> __host__ __device__ __forceinline__ int kda_core_kg(int c, int token)
{
    return kda_core_tile<KP>::G + token / 8 * kda_core_tile<KP>::G_row + c / 8 * 128 + c % 8 * 16 + token % 8 * 2;
}
__host__ __device__ __forceinline__ int kda_core_pair(int i, int j) { return j / 8 * 512 + i / 8 * 128 + i % 8 * 16 + j % 8 * 2; }

#endif
