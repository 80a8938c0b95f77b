/* The raw rows of a tile: what preparation reads of a problem, and how it comes into cells of shared memory. */
#ifndef KL_KDA_CUDA_PREPARE_ROWS_CUH
#define KL_KDA_CUDA_PREPARE_ROWS_CUH

#include "kda/cuda/gates.cuh"
#include "kda/cuda/intra.cuh"

/* Pointers, strides in elements, options with their defaults resolved. */
struct kda_tile_source {
    const uint16_t *q, *k, *g, *beta;
    const float *A_log, *dt_bias;
    int64_t q_stride, k_stride, g_stride, beta_stride;
    int K, G, share; /* share: value heads a query/key head */
    int gate, beta_kind;
    float lower_bound, scale;
    bool qk_l2norm, no_delta;
    bool wide, g_wide; /* rows of q and k (of g) are whole, aligned 16-byte pieces, and K = KP */
    bool g_cells;      /* not so of g, but 8 neighbouring channels share its number, and K = KP */
};

/* A tile's place in the tensors, and a thread's own in its rows: four threads a row, 16 bytes apart. */
struct kda_tile_rows {
    const uint16_t *q, *k, *g;
    int64_t token; /* the first; tokens, 1..32, follow */
    int tokens, hv;
};

__device__ __forceinline__ int64_t kda_key_head(const kda_tile_source &s, int hv) { return s.share == 1 ? hv : hv / s.share; }

__device__ __forceinline__ kda_tile_rows kda_locate_rows(const kda_tile_source &s, int hv, int64_t token, int tokens, int thread)
{
    int64_t row = token + (thread >> 2), h = kda_key_head(s, hv) * s.K + 8 * (thread & 3);
    return {s.q + row * s.q_stride + h, s.k + row * s.k_stride + h, s.g + row * s.g_stride + (int64_t)hv * s.G + 8 * (thread & 3), token, tokens, hv};
}

/* Asks for rows ahead of kda_load_rows, so that it finds them in the second cache. */
template <int KP> __device__ __forceinline__ void kda_fetch_rows(const kda_tile_source &s, const kda_tile_rows &at, int thread)
{
    if (!s.wide || thread >> 2 >= at.tokens || thread & 1)
        return;
#pragma unroll
    for (int c = 0; c < KP; c += 128) { /* threads 2, 6, .. of 128-byte aligned rows meet the second line */
        int second = c + (KP > 64 && thread & 2 ? 64 : 0);
        kl_prefetch(at.q + second);
        kl_prefetch(at.k + second);
        if (s.g_wide)
            kl_prefetch(at.g + second);
    }
}

/* Any alignment, any K: element by element. x: [token][K] of one head; channel c's number is x[c / block]; rest fills what
 * lies beyond the sequence or beyond K, and all of it without x. */
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

/* Whole pieces, as far as the sequence goes. */
template <int KP> __device__ __forceinline__ void kda_load_part(unsigned char *rows, const uint16_t *x, bool there, uint32_t rest, int thread)
{
#pragma unroll 1
    for (int j = 0; j < KP / 32; j++) {
        unsigned char *cell = rows + kda_cell(thread >> 2, (thread & 3) + 4 * j);
        if (there)
            kl_copy16(cell, x + 32 * j);
        else
            *(uint4 *)cell = make_uint4(rest, rest, rest, rest);
    }
}

/* g where it is not whole pieces. */
template <int KP> __device__ __forceinline__ void kda_load_shared_gates(const kda_tile_source &s, int hv, int64_t token, int tokens, unsigned char *rows, int thread)
{
    const uint16_t *g = s.g ? s.g + token * s.g_stride + (int64_t)hv * s.G : nullptr;
    uint32_t rest = kda_gate_rest(s.gate);
    int block = s.G ? s.K / s.G : 1;
    if (!s.g_cells) {
        kda_load_narrow<KP>(rows, g, s.g_stride, tokens, s.K, block, rest, thread);
        return;
    }
    int row = thread >> 2;
#pragma unroll
    for (int j = 0; j < KP / 32; j++) {
        int c = (thread & 3) + 4 * j;
        uint32_t x = g && row < tokens ? g[row * s.g_stride + (s.G == 1 ? 0 : 8 * c / block)] * 0x10001u : rest;
        *(uint4 *)(rows + kda_cell(row, c)) = make_uint4(x, x, x, x);
    }
}

/* What is not whole. */
template <int KP>
__device__ __forceinline__ void kda_load_other_rows(const kda_tile_source &s, int hv, int64_t token, int tokens, unsigned char *q, unsigned char *k,
                                                    unsigned char *g, int thread)
{
    kda_tile_rows at = kda_locate_rows(s, hv, token, tokens, thread);
    bool there = thread >> 2 < tokens;
    if (s.g_wide)
        kda_load_part<KP>(g, at.g, there, kda_gate_rest(s.gate), thread);
    else
        kda_load_shared_gates<KP>(s, hv, token, tokens, g, thread);
    if (s.wide) {
        kda_load_part<KP>(q, at.q, there, 0, thread);
        kda_load_part<KP>(k, at.k, there, 0, thread);
        return;
    }
    int64_t h = kda_key_head(s, hv) * s.K;
    kda_load_narrow<KP>(q, s.q + token * s.q_stride + h, s.q_stride, tokens, s.K, 1, 0, thread);
    kda_load_narrow<KP>(k, s.k + token * s.k_stride + h, s.k_stride, tokens, s.K, 1, 0, thread);
}

/* Starts the copies of a tile's rows; returns at once where rows are wide. */
template <int KP>
__device__ __forceinline__ void kda_load_rows(const kda_tile_source &s, const kda_tile_rows &at, unsigned char *q, unsigned char *k, unsigned char *g, int thread)
{
    if (s.wide && at.tokens == 32) {
        int cell = kda_cell(thread >> 2, thread & 3);
#pragma unroll
        for (int j = 0; j < KP / 32; j++) {
            int to = (cell ^ (j & 1) << 6) + 4096 * (j >> 1);
            if (s.g_wide)
                kl_copy16(g + to, at.g + 32 * j);
            kl_copy16(k + to, at.k + 32 * j);
            kl_copy16(q + to, at.q + 32 * j);
        }
        if (!s.g_wide)
            kda_load_shared_gates<KP>(s, at.hv, at.token, 32, g, thread);
    } else
        kda_load_other_rows<KP>(s, at.hv, at.token, at.tokens, q, k, g, thread);
    kl_copy_commit();
}

#endif
