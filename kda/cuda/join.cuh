/* What the state S before a part adds to the part. A walk is affine in the state: where a part was walked over from zero state and,
 * without v, from the columns of the identity,
 *
 *     o_i = (o_i from zero) + Q_i S      Q_i: what the walk of the identity has in place of o_i
 *     S'  = (S' from zero) + M S         M:   the state that it ends with
 *
 * so the part need not be walked over again once S is known. The outputs by products in bf16, as the walk itself makes them; the
 * state in float, by products in tf32 of the high and low parts of both operands (2^-21). Everything is asked for before any of it
 * is used, and the code is short: it is as cold as the numbers. */
#ifndef KL_KDA_CUDA_JOIN_CUH
#define KL_KDA_CUDA_JOIN_CUH

#include "kda/cuda/walk.cuh"

enum { KDA_JOIN_THREADS = 256, KDA_JOIN_TOKENS = 64, KDA_JOIN_COLUMNS = 128, KDA_JOIN_STATE_COLUMNS = 16 };

/* A part of one head. State tables are [K,V]. */
struct kda_joint {
    const float *S, *B, *M; /* M: [d / 8][i / 16] A fragments of M[i, d] */
    float *next;            /* S', with the strides of p; NULL: not wanted */
    const uint16_t *Q;      /* [all tokens][HV][KP] */
    int64_t token, tokens, head; /* the part's first token, and how many */
};

/* Shared memory: S as B operands, of two channels in bf16, rows on different banks; or columns of S in halves of tf32. */
template <int KP> union kda_join_room {
    uint32_t s[KP / 2][KDA_JOIN_COLUMNS + 8];
    struct {
        uint32_t high[KDA_JOIN_STATE_COLUMNS / 8][KP][8], low[KDA_JOIN_STATE_COLUMNS / 8][KP][8];
    } part;
};

/* ---- outputs: a block takes 64 tokens and 128 columns of V, a warp 16 tokens and 64 columns ---- */

/* Four columns of channel c of S; whole: V is a multiple of 4. */
template <bool whole> __device__ __forceinline__ float4 kda_join_columns(const kda_walk &p, const float *S, int c, int x)
{
    float4 r = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float *from = S + c * p.V + x;
    if (c >= p.K || x >= p.V)
        return r;
    if (whole)
        return *(const float4 *)from;
    r.x = from[0];
    r.y = x + 1 < p.V ? from[1] : 0.0f;
    r.z = x + 2 < p.V ? from[2] : 0.0f;
    r.w = x + 3 < p.V ? from[3] : 0.0f;
    return r;
}

/* Two neighbouring columns of o, of which `columns` exist; whole: both or none, at once. */
template <bool whole> __device__ __forceinline__ uint32_t kda_join_pair(const uint16_t *o, int columns)
{
    if (whole)
        return columns > 0 ? *(const uint32_t *)o : 0;
    return (columns > 0 ? o[0] : 0u) | (columns > 1 ? (uint32_t)o[1] << 16 : 0u);
}
template <bool whole> __device__ __forceinline__ void kda_join_put(uint16_t *o, uint32_t pair, int columns)
{
    if (whole) {
        if (columns > 0)
            *(uint32_t *)o = pair;
        return;
    }
    if (columns > 0)
        o[0] = (uint16_t)pair;
    if (columns > 1)
        o[1] = (uint16_t)(pair >> 16);
}

template <int KP, bool whole>
__device__ __forceinline__ void kda_join_outputs(kda_join_room<KP> &m, const kda_walk &p, const kda_joint &at, int first, int column)
{
    constexpr int TILES = KDA_JOIN_COLUMNS / 2 / 8, QUADS = KDA_JOIN_COLUMNS / 4, ROWS = KDA_JOIN_THREADS / QUADS, SHARE = KP / 2 / ROWS;
    int warp = (int)threadIdx.x / 32, t = kl_lane() & 3, g = kl_lane() >> 2, row = first + 16 * (warp & 3) + g;
    int own = (int)threadIdx.x / QUADS, quad = 4 * ((int)threadIdx.x % QUADS), half = KDA_JOIN_COLUMNS / 2 * (warp >> 2);
    float4 s[SHARE][2];
#pragma unroll
    for (int i = 0; i < SHARE; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
            s[i][j] = kda_join_columns<whole>(p, at.S, 2 * (own + ROWS * i) + j, column + quad);
    column += half + 2 * t;
    const uint16_t *Q = at.Q + ((at.token + row) * p.HV + at.head) * KP + 2 * t;
    uint16_t *o = p.o + (at.token + row) * p.o_stride + at.head * p.V + column;
    uint32_t a[KP / 16][4], was[TILES][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        bool there = row + 8 * i < at.tokens;
#pragma unroll
        for (int c = 0; c < KP / 8; c++)
            a[c / 2][i + 2 * (c & 1)] = there ? *(const uint32_t *)(Q + 8 * i * p.HV * KP + 8 * c) : 0;
#pragma unroll
        for (int n = 0; n < TILES; n++)
            was[n][i] = there ? kda_join_pair<whole>(o + 8 * i * p.o_stride + 8 * n, p.V - column - 8 * n) : 0;
    }
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        *(uint4 *)&m.s[own + ROWS * i][quad] = make_uint4(kl_pack_bf16(s[i][0].x, s[i][1].x), kl_pack_bf16(s[i][0].y, s[i][1].y),
                                                          kl_pack_bf16(s[i][0].z, s[i][1].z), kl_pack_bf16(s[i][0].w, s[i][1].w));
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        float x[4] = {kl_bf16_low(was[n][0]), kl_bf16_high(was[n][0]), kl_bf16_low(was[n][1]), kl_bf16_high(was[n][1])};
#pragma unroll
        for (int c = 0; c < KP / 16; c++) {
            uint32_t b[2] = {m.s[8 * c + t][half + 8 * n + g], m.s[8 * c + 4 + t][half + 8 * n + g]};
            kl_mma(x, a[c], b);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (row + 8 * i < at.tokens)
                kda_join_put<whole>(o + 8 * i * p.o_stride + 8 * n, kl_pack_bf16(x[2 * i], x[2 * i + 1]), p.V - column - 8 * n);
    }
}

/* ---- the state behind: a block takes 16 columns of V, a warp 16 channels ---- */

__device__ __forceinline__ void kda_join_split(uint32_t &high, uint32_t &low, float x)
{
    high = kl_to_tf32(x);
    low = kl_to_tf32(x - __uint_as_float(high));
}

template <int KP> __device__ __forceinline__ void kda_join_state(kda_join_room<KP> &m, const kda_walk &p, const kda_joint &at, int column)
{
    constexpr int PANELS = KDA_JOIN_STATE_COLUMNS / 8, SHARE = KP * KDA_JOIN_STATE_COLUMNS / KDA_JOIN_THREADS;
    int t = kl_lane() & 3, g = kl_lane() >> 2, row = (int)threadIdx.x / 32 * 16;
    bool own = row < KP;
    float4 M[KP / 8];
    float sum[PANELS][4], s[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        int c = ((int)threadIdx.x + i * KDA_JOIN_THREADS) / KDA_JOIN_STATE_COLUMNS, x = column + (int)threadIdx.x % KDA_JOIN_STATE_COLUMNS;
        s[i] = c < p.K && x < p.V ? at.S[c * p.V + x] : 0.0f;
    }
#pragma unroll
    for (int d = 0; d < KP / 8; d++)
        M[d] = own ? *(const float4 *)(at.M + ((d * (KP / 16) + row / 16) * 32 + kl_lane()) * 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int n = 0; n < PANELS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int c = row + g + 8 * (i >> 1), x = column + 8 * n + 2 * t + (i & 1);
            sum[n][i] = c < p.K && x < p.V ? at.B[c * p.V + x] : 0.0f;
        }
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        int c = ((int)threadIdx.x + i * KDA_JOIN_THREADS) / KDA_JOIN_STATE_COLUMNS, x = (int)threadIdx.x % KDA_JOIN_STATE_COLUMNS;
        kda_join_split(m.part.high[x / 8][c][x % 8], m.part.low[x / 8][c][x % 8], s[i]);
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < KP / 8; d++) {
        uint32_t high[4], low[4];
        kda_join_split(high[0], low[0], M[d].x);
        kda_join_split(high[1], low[1], M[d].y);
        kda_join_split(high[2], low[2], M[d].z);
        kda_join_split(high[3], low[3], M[d].w);
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
            const uint32_t b[2] = {m.part.high[n][8 * d + t][g], m.part.high[n][8 * d + t + 4][g]};
            const uint32_t rest[2] = {m.part.low[n][8 * d + t][g], m.part.low[n][8 * d + t + 4][g]};
            kl_mma_tf32(sum[n], low, b);
            kl_mma_tf32(sum[n], high, rest);
            kl_mma_tf32(sum[n], high, b);
        }
    }
#pragma unroll
    for (int n = 0; n < PANELS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int c = row + g + 8 * (i >> 1), x = column + 8 * n + 2 * t + (i & 1);
            if (c < p.K && x < p.V)
                at.next[c * p.channel_stride + x * p.column_stride] = sum[n][i];
        }
}

#endif
