/* The states carried from part to part, in float: S_{c+1} = M_c S_c + B_c. A block takes 8 columns of V of one head through all of
 * its sequence's parts, a warp 16 channels of the result. Products of the matrix unit in tf32, three of them for the high and low
 * parts of both operands (2^-21); the next M and B are on their way while this one is multiplied. */
#ifndef KL_KDA_CUDA_CARRY_CUH
#define KL_KDA_CUDA_CARRY_CUH

#include "kda/cuda/walk.cuh"

enum { KDA_CARRY_COLUMNS = 8 };

/* S, its high and low parts, in two places by turns. */
template <int KP> struct kda_carry_room {
    uint32_t high[2][KP][KDA_CARRY_COLUMNS], low[2][KP][KDA_CARRY_COLUMNS];
    int product[]; /* [count] */
};

/* Some columns of the states carried into the parts of one head. */
struct kda_carried {
    float *state;       /* the first's; B_c in the place of S_{c+1} where `product` says so, else S_{c+1} already; strides of p */
    const float *M;     /* of the first part, [d / 8][i / 16] A fragments of M[i, d] */
    const int *product; /* [count]: is S_c a sum with M_{c-1} S_{c-1}? */
    int64_t state_apart, M_apart, product_apart;
    int count, column;
};

__device__ __forceinline__ void kda_split_tf32(uint32_t &high, uint32_t &low, float x)
{
    high = kl_to_tf32(x);
    low = kl_to_tf32(x - __uint_as_float(high));
}

/* What a thread has of M and of B for one step, as A fragments and as accumulators. */
template <int KP> struct kda_carry_step {
    float M[KP / 8][4], B[4];

    __device__ __forceinline__ void load(const kda_carried &at, const kda_walk &p, int c, int row)
    {
        int t = kl_lane() & 3, g = kl_lane() >> 2;
        const float *M_from = at.M + (c - 1) * at.M_apart, *B_from = at.state + c * at.state_apart;
#pragma unroll
        for (int d = 0; d < KP / 8; d++) {
            float4 x = *(const float4 *)(M_from + ((d * (KP / 16) + row / 16) * 32 + kl_lane()) * 4);
            M[d][0] = x.x, M[d][1] = x.y, M[d][2] = x.z, M[d][3] = x.w;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = row + g + 8 * (i >> 1), x = at.column + 2 * t + (i & 1);
            B[i] = r < p.K && x < p.V ? B_from[r * p.channel_stride + x * p.column_stride] : 0.0f;
        }
    }
};

/* All 2 KP threads of a block. */
template <int KP> __device__ __forceinline__ void kda_carry(kda_carry_room<KP> &m, const kda_walk &p, const kda_carried &at)
{
    int t = kl_lane() & 3, g = kl_lane() >> 2, row = (int)threadIdx.x / 32 * 16, place = 0;
    for (int c = (int)threadIdx.x; c < at.count; c += 2 * KP)
        m.product[c] = c > 0 && at.product[c * at.product_apart];
    __syncthreads();
    auto next_after = [&](int c) {
        do
            c++;
        while (c < at.count && !m.product[c]);
        return c;
    };
    auto put = [&](int r, int x, float y) { kda_split_tf32(m.high[place][r][x], m.low[place][r][x], y); };
    int c = next_after(0);
    bool held = false; /* is S_{c-1} in its place? */
    kda_carry_step<KP> step[2];
    if (c < at.count)
        step[0].load(at, p, c, row);
    auto take = [&](kda_carry_step<KP> &now, kda_carry_step<KP> &ahead) {
        if (!held) {
            const float *from = at.state + (c - 1) * at.state_apart;
            for (int i = (int)threadIdx.x; i < KP * KDA_CARRY_COLUMNS; i += 2 * KP) {
                int r = i / KDA_CARRY_COLUMNS, x = i % KDA_CARRY_COLUMNS;
                put(r, x, r < p.K && at.column + x < p.V ? from[r * p.channel_stride + (at.column + x) * p.column_stride] : 0.0f);
            }
        }
        __syncthreads();
        int next = next_after(c);
        if (next < at.count)
            ahead.load(at, p, next, row);
        float sum[2][4] = {{now.B[0], now.B[1], now.B[2], now.B[3]}};
#pragma unroll
        for (int d = 0; d < KP / 8; d++) {
            uint32_t a[2][4], b[2][2];
#pragma unroll
            for (int i = 0; i < 4; i++)
                kda_split_tf32(a[0][i], a[1][i], now.M[d][i]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                b[0][i] = m.high[place][8 * d + t + 4 * i][g];
                b[1][i] = m.low[place][8 * d + t + 4 * i][g];
            }
            kl_mma_tf32(sum[1], a[1], b[0]);
            kl_mma_tf32(sum[0], a[0], b[0]);
            kl_mma_tf32(sum[1], a[0], b[1]);
        }
        place ^= 1;
        held = next == c + 1;
        float *to = at.state + c * at.state_apart;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = row + g + 8 * (i >> 1), x = 2 * t + (i & 1);
            float y = sum[0][i] + sum[1][i];
            put(r, x, y);
            if (r < p.K && at.column + x < p.V)
                to[r * p.channel_stride + (at.column + x) * p.column_stride] = y;
        }
        if (!held)
            __syncthreads();
        c = next;
    };
    while (c < at.count) {
        take(step[0], step[1]);
        if (c < at.count)
            take(step[1], step[0]);
    }
}

#endif
