/* Checked truncation: may a part start from zero state, a tile or a few before its first token?
 *
 * The walk takes the state through a tile by S' = M S + kg^T Tb v with M = Diag(decay) - kg^T w, so a state that is left out
 * before tiles a, .., b changes the one behind them by M_b .. M_a S. From the numbers that the walk itself will multiply with,
 * whatever the gate, beta and the length of the keys,
 *
 *     |M|_2 <= max_c decay_c + sum_j |kg_j|_2 |w_j|_2 <= max_c decay_c + KP sum_j max_c |kg_jc| max_c |w_jc|
 *
 * and by 1.01 more at most for the roundings of S and u to bf16. Where the product of these falls below 2^-KDA_FORGOTTEN the part
 * starts from zero. That is exact to the rounding of float as long as the state left out is no more than
 * 2^(KDA_FORGOTTEN - 24) = 2^40 times what the tiles since have written: a bound of 2^-24 alone would be relative to the state
 * left out, which may be much larger than its successor. A channel that keeps its state keeps decay near 1: no proof. */
#ifndef KL_KDA_CUDA_TRUNCATE_CUH
#define KL_KDA_CUDA_TRUNCATE_CUH

#include "kda/cuda/core_tile.cuh"

enum { KDA_FORGOTTEN = 64, KDA_LOOK_BACK = 4 /* tiles at most */ };

/* The larger of two pairs of bf16 without sign, as integers: NaN is larger than all numbers. */
__device__ __forceinline__ uint32_t kda_larger_pair(uint32_t a, uint32_t b)
{
    b &= 0x7fff7fffu;
    uint32_t low = max(a & 0xffffu, b & 0xffffu), high = max(a >> 16, b >> 16);
    return low | high << 16;
}
__device__ __forceinline__ float kda_larger_half(uint32_t a) { return kl_bf16_low(max(a & 0xffffu, a >> 16)); }

/* What a warp finds in its quarter of a tile's channels: lane j has max |w_jc| and max |kg_jc| of token j, all have max decay_c. */
struct kda_tile_maxima {
    float w, kg, decay;
};

template <int KP> __device__ __forceinline__ kda_tile_maxima kda_look_at(const unsigned char *tile, int quarter)
{
    using at = kda_core_tile<KP>;
    constexpr int CHANNELS = KP / 4;
    int lane = kl_lane(), first = quarter * CHANNELS;
    /* A cell of w holds 8 channels of a token, a cell of kg 8 tokens of a channel. */
    uint4 w[CHANNELS / 8], kg[CHANNELS / 8];
#pragma unroll
    for (int i = 0; i < CHANNELS / 8; i++) {
        w[i] = *(const uint4 *)(tile + kda_core_w<KP>(first + 8 * i, lane));
        kg[i] = *(const uint4 *)(tile + kda_core_kg<KP>(first + 8 * i + (lane & 7), lane & 24));
    }
    float decay = lane < CHANNELS ? ((const float *)(tile + at::decay))[first + lane] : 0.0f;
    uint32_t most = 0, pair[4] = {};
#pragma unroll
    for (int i = 0; i < CHANNELS / 8; i++) {
        most = kda_larger_pair(kda_larger_pair(kda_larger_pair(kda_larger_pair(most, w[i].x), w[i].y), w[i].z), w[i].w);
        pair[0] = kda_larger_pair(pair[0], kg[i].x);
        pair[1] = kda_larger_pair(pair[1], kg[i].y);
        pair[2] = kda_larger_pair(pair[2], kg[i].z);
        pair[3] = kda_larger_pair(pair[3], kg[i].w);
    }
    /* across the 8 lanes of a group of 8 tokens; then lane j takes token j's half of its pair */
#pragma unroll
    for (int i = 0; i < 4; i++)
        for (int m = 4; m; m >>= 1)
            pair[i] = kda_larger_pair(pair[i], __shfl_xor_sync(0xffffffffu, pair[i], m));
    int p = lane >> 1 & 3;
    uint32_t own = p == 0 ? pair[0] : p == 1 ? pair[1] : p == 2 ? pair[2] : pair[3];
    for (int m = 16; m; m >>= 1)
        decay = fmaxf(decay, __shfl_xor_sync(0xffffffffu, decay, m));
    return {kda_larger_half(most), lane & 1 ? kl_bf16_high(own) : kl_bf16_low(own), decay};
}

/* Shared memory of a block that looks. */
struct kda_look_room {
    float w[4][32], kg[4][32], decay[4];
};

/* log2 of the bound of one tile, by four warps. */
template <int KP> __device__ __forceinline__ float kda_log2_bound(const unsigned char *tile, kda_look_room &m)
{
    int lane = kl_lane(), quarter = (int)threadIdx.x / 32;
    kda_tile_maxima own = kda_look_at<KP>(tile, quarter);
    __syncthreads();
    m.w[quarter][lane] = own.w;
    m.kg[quarter][lane] = own.kg;
    m.decay[quarter] = own.decay;
    __syncthreads();
    float w = 0.0f, kg = 0.0f, decay = 0.0f;
    for (int i = 0; i < 4; i++) {
        w = __uint_as_float(max(__float_as_uint(w), __float_as_uint(m.w[i][lane])));
        kg = __uint_as_float(max(__float_as_uint(kg), __float_as_uint(m.kg[i][lane])));
        decay = fmaxf(decay, m.decay[i]);
    }
    /* 1e-35 for each of the 32 products that may have been flushed to zero */
    return kl_log2(1.01f * (decay + (float)KP * (kl_warp_sum(w * kg) + 32.0f * 1e-35f))) + 0.001f;
}

/* The tile from which a part that begins with tile `begin` of its sequence may start with zero state, -1: none is proven. tiles:
 * the sequence's first tile. Goes on looking while what was found promises enough at the same pace. By four warps. */
template <int KP> __device__ __forceinline__ int kda_forgotten_since(const unsigned char *tiles, int64_t apart, int begin, kda_look_room &m)
{
    float bound = 0.0f;
    for (int i = 1; i <= KDA_LOOK_BACK && i <= begin; i++) {
        bound += kda_log2_bound<KP>(tiles + (begin - i) * apart, m);
        if (bound < -(float)KDA_FORGOTTEN)
            return begin - i;
        if (!(bound < -(float)(KDA_FORGOTTEN * i / KDA_LOOK_BACK)))
            break;
    }
    return -1;
}

#endif
