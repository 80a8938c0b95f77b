/* Sorting, by CUB: radix sort is stable, so equal keys keep their order and the result is one. A few thousand keys are sorted
 * by one block, in less time than the device-wide sort needs for its launches. */
#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "common/device.cuh"
#include "common/gpu.h"

namespace {

enum { THREADS = 1024, EACH = 8, FEW = THREADS * EACH };
typedef cub::BlockRadixSort<uint32_t, THREADS, EACH, int32_t> block_sort;

__global__ void __launch_bounds__(THREADS) sort_few(int n, int bits, const uint32_t *keys, uint32_t *sorted, const int32_t *values, int32_t *order)
{
    KL_SHARED(memory);
    uint32_t key[EACH];
    int32_t value[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int at = (int)threadIdx.x * EACH + i;
        key[i] = at < n ? keys[at] : 0xffffffffu;
        value[i] = at < n ? values[at] : 0;
    }
    block_sort(*(block_sort::TempStorage *)memory).SortBlockedToStriped(key, value, 0, bits);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int at = i * THREADS + (int)threadIdx.x;
        if (at < n) {
            sorted[at] = key[i];
            order[at] = value[i];
        }
    }
}

} // namespace

size_t kl_gpu_sort_workspace(const kl_ctx *, int64_t n, int bits)
{
    size_t bytes = 0;
    if (n > FEW)
        cub::DeviceRadixSort::SortPairs(nullptr, bytes, (const uint32_t *)nullptr, (uint32_t *)nullptr, (const int32_t *)nullptr, (int32_t *)nullptr,
                                        n, 0, bits);
    return bytes;
}

kl_status kl_gpu_sort(kl_ctx *ctx, int64_t n, int bits, const uint32_t *keys, uint32_t *sorted, const int32_t *values, int32_t *order,
                      void *workspace, size_t bytes)
{
    kl_grid one;
    one.x = n > 0;
    one.threads = THREADS;
    one.shared = sizeof(block_sort::TempStorage);
    if (n <= FEW)
        return kl_launch(ctx, "sort", one, sort_few, (int)n, bits, keys, sorted, values, order);
    return kl_cuda(cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, sorted, values, order, n, 0, bits, (cudaStream_t)ctx->stream), "sort");
}
