/* What the operations share: memory in cells of 8 adjacent elements, a warp across a row, sums of a block. */
#ifndef KL_HARNESS_CUDA_CELLS_CUH
#define KL_HARNESS_CUDA_CELLS_CUH

#include "common/arena.h"
#include "harness/cuda/ops_cuda.h"
#include "kda/cuda/numbers.cuh"

enum { CELL = 8 };

/* N elements at p, to be looked at later. */
template <class A, int N = CELL> __device__ __forceinline__ kda_row<A, N> fetch_cell(const void *p, int64_t i)
{
    kda_row<A, N> c;
    c.fetch((const A *)p + i);
    return c;
}

/* 8 weights. */
__device__ __forceinline__ void get_weights(float w[CELL], const void *weight, int64_t i, kl_dtype type)
{
    if (type == KL_BF16)
        fetch_cell<uint16_t>(weight, i).get(w);
    else
        fetch_cell<float>(weight, i).get(w);
}

/* Sum over the block, whole warps of it; every thread gets it, in the same order of additions. memory: a number a warp. */
template <class T> __device__ __forceinline__ T block_sum(T x, T *memory)
{
    int warps = (int)blockDim.x / 32;
    for (int m = 16; m; m >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, m);
    __syncthreads();
    if (kl_lane() == 0)
        memory[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = memory[0];
    for (int i = 1; i < warps; i++)
        sum += memory[i];
    return sum;
}

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline kl_grid grid_of(int64_t blocks, int threads, size_t shared = 0)
{
    kl_grid g;
    g.x = blocks;
    g.threads = threads;
    g.shared = shared;
    return g;
}

/* Whether rows of that width and stride at those addresses come in whole cells. */
inline bool in_cells(int64_t width, int64_t stride, uintptr_t addresses) { return width % CELL == 0 && stride % CELL == 0 && addresses % 16 == 0; }

inline int64_t stride_or(int64_t stride, int64_t width) { return stride ? stride : width; }

#endif
