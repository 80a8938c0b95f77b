/* Experts' weights as tensors for the copy engine: the experts must lie evenly in memory. */
#ifndef KL_MOE_CUDA_WEIGHTS_CUH
#define KL_MOE_CUDA_WEIGHTS_CUH

#include "moe/cuda/chunk.cuh"

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

/* (column, row of eight, which of two, eight rows, expert). A box has 64 columns of 128 rows, or where the sums run along the rows, of 64; of two
 * weights half of them each, eight by eight. */
inline kl_status moe_describe(moe_product *p, const moe_weights &w, int64_t to_second, bool transposed)
{
    kl_tensor_shape s;
    s.dims = 5;
    int two = to_second ? 2 : 1;
    p->eights = (transposed ? 64 : 128) / (8 * two);
    const int64_t size[] = {w.columns, 8, two, w.rows / 8, w.E}, stride[] = {1, w.columns, to_second ? to_second : 8, 8 * w.columns, w.stride};
    const int box[] = {64, 8, two, p->eights, 1};
    for (int i = 0; i < 5; i++)
        s.size[i] = size[i], s.stride[i] = stride[i], s.box[i] = box[i];
    p->K = (int)(transposed ? two * w.rows : w.columns);
    p->width = (int)(transposed ? w.columns : two * w.rows);
    p->across = (int)moe_ceil(p->width, 256);
    return kl_tensor_describe(&p->weight, w.name, w.base, s);
}

/* w1 and w3 as one tensor, whichever lies first. */
inline kl_status moe_describe_two(moe_product *p, const moe_weights &w1, const moe_weights &w3, bool transposed)
{
    if (w1.stride != w3.stride)
        return kl_error(KL_EUNSUPPORTED, "moe: w3: expected experts as far apart as those of w1, %lld elements, got %lld", (long long)w1.stride, (long long)w3.stride);
    p->up_first = w3.base < w1.base;
    const moe_weights &low = p->up_first ? w3 : w1, &high = p->up_first ? w1 : w3;
    return moe_describe(p, low, high.base - low.base, transposed);
}

/* The three weights of the routed experts, or of the shared one. */
struct moe_expert_weights {
    moe_weights w1, w3, w2;
};
inline kl_status moe_expert_weights_of(moe_expert_weights *w, const moe_problem *p, bool shared)
{
    int64_t E = shared ? 1 : p->E, width = shared ? p->Is : p->I;
    KL_TRY(moe_weights_of(&w->w1, shared ? "shared_w1" : "w1", shared ? &p->shared_w1 : p->w1, E, width, p->D));
    KL_TRY(moe_weights_of(&w->w3, shared ? "shared_w3" : "w3", shared ? &p->shared_w3 : p->w3, E, width, p->D));
    return moe_weights_of(&w->w2, shared ? "shared_w2" : "w2", shared ? &p->shared_w2 : p->w2, E, p->D, width);
}

#endif
