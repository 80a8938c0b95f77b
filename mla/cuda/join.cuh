/* Joining what several parts have left of a tile: a = sum_i 2^(lse_i - lse) a_i. A block takes 128 columns of one row, its
 * warps take the parts in turn. */
#ifndef KL_MLA_CUDA_JOIN_CUH
#define KL_MLA_CUDA_JOIN_CUH

#include "mla/cuda/attend.cuh"

namespace {

enum { QUARTERS = MLA_R / 128, AT_ONCE = 8 };

template <int JOINERS> struct join_room {
    float4 sum[JOINERS][32];
    float weight[MLA_MOST_PARTS];
};

__device__ __forceinline__ int64_t slot_row(const attention &p, const mla_join &j, int i, int r)
{
    return (int64_t)mla_slot(j.part + i, i == 0) * p.table.room + r;
}

/* Weights of the parts; done by one warp. */
__device__ void weigh(const attention &p, const mla_join &j, int r, bool tell, float *weight)
{
    float lse[MLA_MOST_PARTS / 32], top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MLA_MOST_PARTS / 32; i++) {
        int part = 32 * i + kl_lane();
        lse[i] = part < j.parts ? p.sum_lse[slot_row(p, j, part, r)] : -INFINITY;
        top = fmaxf(top, lse[i]);
    }
    for (int m = 16; m; m >>= 1)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
#pragma unroll
    for (int i = 0; i < MLA_MOST_PARTS / 32; i++) {
        lse[i] = kl_exp2(lse[i] - top);
        sum += lse[i];
    }
    sum = kl_warp_sum(sum);
    float share = 1.0f / sum;
#pragma unroll
    for (int i = 0; i < MLA_MOST_PARTS / 32; i++)
        weight[32 * i + kl_lane()] = lse[i] * share;
    if (tell && p.lse && kl_lane() == 0)
        p.lse[j.row + r] = (top + kl_log2(sum)) * 0.693147181f;
}

/* The sums of AT_ONCE parts, every JOINERS-th from `first` on. */
template <int JOINERS> __device__ __forceinline__ void load_parts(const attention &p, const mla_join &j, int r, int column, int first, float4 x[AT_ONCE])
{
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
        if (first + i * JOINERS < j.parts)
            x[i] = *(const float4 *)(p.sum + slot_row(p, j, first + i * JOINERS, r) * MLA_R + column);
}

template <int JOINERS> __device__ void join_row(const attention &p, const mla_join &j, int r, int quarter, join_room<JOINERS> &s)
{
    int warp = (int)threadIdx.x / 32, lane = kl_lane(), column = quarter * 128 + 4 * lane;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f}, x[AT_ONCE];
    load_parts<JOINERS>(p, j, r, column, warp, x);
    if (warp == 0)
        weigh(p, j, r, quarter == 0, s.weight);
    __syncthreads();
    for (int first = warp; first < j.parts; first += AT_ONCE * JOINERS) {
        if (first > warp)
            load_parts<JOINERS>(p, j, r, column, first, x);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i * JOINERS < j.parts) {
                float w = s.weight[first + i * JOINERS];
                sum.x += w * x[i].x, sum.y += w * x[i].y, sum.z += w * x[i].z, sum.w += w * x[i].w;
            }
    }
    s.sum[warp][lane] = sum;
    __syncthreads();
    if (warp)
        return;
    for (int i = 1; i < JOINERS; i++) {
        float4 other = s.sum[i][lane];
        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    *(uint2 *)(p.a + (int64_t)(j.row + r) * MLA_R + column) = make_uint2(kl_pack_bf16(sum.x, sum.y), kl_pack_bf16(sum.z, sum.w));
}

template <int JOINERS> __global__ void __launch_bounds__(32 * JOINERS, 32 / JOINERS) join(const __grid_constant__ attention p)
{
    KL_SHARED(memory);
    int quarter = (int)(blockIdx.x % QUARTERS), r = (int)(blockIdx.x / QUARTERS) % p.table.room;
    mla_join j = mla_pieces_of(p.table).join[blockIdx.x / (QUARTERS * p.table.room)];
    kl_grid_wait();
    kl_grid_release();
    if (r < j.rows)
        join_row(p, j, r, quarter, *(join_room<JOINERS> *)memory);
}

} // namespace

#endif
