/* Sorting, by CUB: radix sort is stable, so equal keys keep their order and the result is one. */
#include <cub/device/device_radix_sort.cuh>

#include "common/device.cuh"
#include "common/gpu.h"

size_t kl_gpu_sort_workspace(const kl_ctx *, int64_t n, int bits)
{
    size_t bytes = 0;
    cub::DeviceRadixSort::SortPairs(nullptr, bytes, (const uint32_t *)nullptr, (uint32_t *)nullptr, (const int32_t *)nullptr, (int32_t *)nullptr,
                                    n, 0, bits);
    return bytes;
}

kl_status kl_gpu_sort(kl_ctx *ctx, int64_t n, int bits, const uint32_t *keys, uint32_t *sorted, const int32_t *values, int32_t *order,
                      void *workspace, size_t bytes)
{
    return kl_cuda(cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, sorted, values, order, n, 0, bits, (cudaStream_t)ctx->stream), "sort");
}
