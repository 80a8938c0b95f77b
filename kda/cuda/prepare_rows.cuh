/* The raw rows of a tile: from the packed tensors into cells of shared memory. */
#ifndef KL_KDA_CUDA_PREPARE_ROWS_CUH
#define KL_KDA_CUDA_PREPARE_ROWS_CUH

#include "kda/cuda/gates.cuh"
#include "kda/cuda/intra.cuh"

/* x: [token][K] of one head, the first token's; rest fills what lies beyond the sequence or beyond K. */
template <int KP>
__device__ __forceinline__ void kda_load_wide(unsigned char *rows, const uint16_t *x, int64_t stride, int tokens, int K, uint32_t rest, int thread)
{
    constexpr int cells = KP / 8, step = 128 / cells;
    int c = thread % cells;
    if (__builtin_expect(tokens == 32 && K == KP, 1)) {
        const uint16_t *from = x + (thread / cells) * stride + 8 * c;
#pragma unroll
        for (int j = 0; j < 32 / step; j++, from += step * stride)
            kl_copy16(rows + kda_cell(thread / cells + j * step, c), from);
        return;
    }
#pragma unroll 1
    for (int j = 0; j < 32 / step; j++) {
        int token = thread / cells + j * step;
        unsigned char *cell = rows + kda_cell(token, c);
        bool there = token < tokens && 8 * c < K;
        if (there || !rest)
            kl_copy16(cell, there ? x + token * stride + 8 * c : x, there);
        else
            *(uint4 *)cell = make_uint4(rest, rest, rest, rest);
    }
}

/* The same from any address: channel c's number is x[c / block], block >= 1; nothing: G = 0. */
template <int KP>
__device__ __forceinline__ void kda_load_narrow(unsigned char *rows, const uint16_t *x, int64_t stride, int tokens, int K, int block, uint32_t rest, int thread)
{
#pragma unroll 1
    for (int at = thread; at < 32 * KP / 2; at += 128) {
        int token = at / (KP / 2), c = at % (KP / 2) * 2;
        uint32_t low = rest & 0xffff, high = rest >> 16;
        if (x && token < tokens && c < K)
            low = x[token * stride + c / block];
        if (x && token < tokens && c + 1 < K)
            high = x[token * stride + (c + 1) / block];
        *(uint32_t *)(rows + kda_cell(token, c / 8) + 2 * (c & 7)) = low | high << 16;
    }
}

#endif
