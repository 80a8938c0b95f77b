/* Experts' weights as tensors for the copy engine: the experts must lie evenly in memory. */
#ifndef KL_MOE_CUDA_WEIGHTS_CUH
#define KL_MOE_CUDA_WEIGHTS_CUH

#include "moe/cuda/moe_cuda.cuh"

/* E matrices [rows,columns] of one kind. */
struct moe_weights {
    const char *name;
    const uint16_t *base;
    int64_t E, rows, columns, stride; /* elements from expert to expert */
};

inline kl_status moe_weights_of(moe_weights *w, const char *name, const void *const *table, int64_t E, int64_t rows, int64_t columns)
{
    *w = {name, (const uint16_t *)table[0], E, rows, columns, E > 1 ? (const uint16_t *)table[1] - (const uint16_t *)table[0] : rows * columns};
    if ((uintptr_t)table[0] % 16)
        return kl_error(KL_EUNSUPPORTED, "moe: %s: expected addresses that are multiples of 16, got %p", name, table[0]);
    for (int64_t e = 0; e < E; e++)
        if ((const uint16_t *)table[e] != w->base + e * w->stride || w->stride < rows * columns || w->stride % 8)
            return kl_error(KL_EUNSUPPORTED, "moe: %s: expected experts at even distances in memory, got expert %lld elsewhere", name, (long long)e);
    return kl_ok();
}

/* (column, row of eight, which of two, eight rows, expert): boxes of 64 columns and 128 rows, of two weights 64 each, eight by eight. */
inline kl_status moe_describe(kl_tensor_map *map, const moe_weights &w, int64_t to_second)
{
    kl_tensor_shape s;
    s.dims = 5;
    const int64_t size[] = {w.columns, 8, to_second ? 2 : 1, w.rows / 8, w.E}, stride[] = {1, w.columns, to_second ? to_second : 8, 8 * w.columns, w.stride};
    const int box[] = {64, 8, to_second ? 2 : 1, to_second ? 8 : 16, 1};
    for (int i = 0; i < 5; i++)
        s.size[i] = size[i], s.stride[i] = stride[i], s.box[i] = box[i];
    return kl_tensor_describe(map, w.name, w.base, s);
}

/* w1 and w3 as one tensor, whichever lies first. */
inline kl_status moe_describe_two(kl_tensor_map *map, const moe_weights &w1, const moe_weights &w3, bool *second_first)
{
    if (w1.stride != w3.stride)
        return kl_error(KL_EUNSUPPORTED, "moe: w3: expected experts as far apart as those of w1, %lld elements, got %lld", (long long)w1.stride, (long long)w3.stride);
    *second_first = w3.base < w1.base;
    const moe_weights &low = *second_first ? w3 : w1, &high = *second_first ? w1 : w3;
    return moe_describe(map, low, high.base - low.base);
}

#endif
