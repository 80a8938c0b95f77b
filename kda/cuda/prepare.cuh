/* Preparation of one tile of one head by a group: four warps that meet at a named barrier of their own, so that several
 * groups can work in one block.
 *
 *     kda_prepare_ahead ahead = kda_prepare_load<KP>(source, hv, token, tokens, room, thread);
 *     kda_prepare_tile<KP>(source, head, ahead, tokens, room, tile, thread, barrier, [&] { the next kda_prepare_load });
 *
 * load starts asynchronous copies of the raw rows into the group's room and returns at once; tile waits for them, makes
 * the tile (tile.cuh) at a 16-byte aligned shared address and calls back, in all threads of the group, as soon as the
 * rows in the room may be overwritten. thread counts 0..127 within the group. All threads of the group call both.
 *
 * The tile's memory must be free when thread 0 of the group calls (a thread 0 that stored from it waits for the reads
 * first). On return the tile is complete and visible to bulk copies issued by any thread of the group. */
#ifndef KL_KDA_CUDA_PREPARE_CUH
#define KL_KDA_CUDA_PREPARE_CUH

#include "kda/cuda/tile.cuh"
#include "kda/internal.h"

enum { KDA_GROUP = 128 }; /* threads of a group */

/* What preparation reads: pointers, strides in elements, options with their defaults resolved. */
struct kda_tile_source {
    const uint16_t *q, *k, *g, *beta;
    const float *A_log, *dt_bias;
    int64_t q_stride, k_stride, g_stride, beta_stride;
    int K, G, share; /* share: value heads a query/key head */
    int gate, beta_kind;
    float lower_bound, scale;
    bool qk_l2norm, no_delta;
    bool q_wide, k_wide, g_wide; /* rows of a head are whole, aligned 16-byte pieces */
};
kda_tile_source kda_tile_source_of(const kda_problem *p);

/* What a thread keeps of a head: the gate's rate and bias for its channels. */
template <int KP> struct kda_prepare_head {
    static constexpr int units = KP > 128 ? 2 : 1; /* pairs of channels a thread owns */
    float rate, bias[2 * units];
};

/* What a thread carries from load to tile. */
struct kda_prepare_ahead {
    uint32_t beta; /* threads 0..31: of token `thread` */
};

/* A group's room, in bytes from a 1024-byte aligned start. */
template <int KP> struct kda_prepare_room {
    static constexpr int rows = 32 * KP * 2;
    static constexpr int q = 0, k = rows, g = 2 * rows, block_decay = 3 * rows /* float [2][KP] */,
                         T = block_decay + 8 * KP /* float [2][16][16] */, norm = T + 2048 /* float [2][32]: of k, of q */,
                         beta = norm + 256 /* float [32] */, vote = beta + 128 /* int [4] */, bytes = vote + 16;
};

template <int KP>
__device__ kda_prepare_head<KP> kda_prepare_head_of(const kda_tile_source &s, int hv, int thread);

/* Tokens [token, token + tokens) of the packed tensors, 1..32 of them. */
template <int KP>
__device__ kda_prepare_ahead kda_prepare_load(const kda_tile_source &s, int hv, int64_t token, int tokens, unsigned char *room, int thread);

template <int KP, class Free>
__device__ void kda_prepare_tile(const kda_tile_source &s, const kda_prepare_head<KP> &head, kda_prepare_ahead ahead, int tokens,
                                 unsigned char *room, unsigned char *tile, int thread, int barrier, Free rows_are_free);

/* Every tile of every head into tiles [tile number][HV], kda_tile_bytes(K) each. table: kda_sequences_upload's. */
kl_status kda_cuda_prepare(const kl_ctx *ctx, const kda_problem *p, const void *table, void *tiles);

#endif
