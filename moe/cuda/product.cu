/* Grouped products, launched. */
#include "common/gpu.h"
#include "moe/cuda/product.cuh"

namespace {

template <moe_kind KIND> using many = moe_form<2, 128, 4, KIND>;
template <moe_kind KIND> using few = moe_form<1, 64, 4, KIND>;

template <class F> kl_status launch(const kl_ctx *ctx, const char *name, const moe_product &p)
{
    kl_grid g;
    g.threads = MOE_PRODUCT_THREADS;
    g.shared = sizeof(typename F::shared);
    g.cluster = F::CLUSTER;
    g.overlap = true;
    g.x = F::CLUSTER;
    int clusters = F::CLUSTER > 1 ? kl_resident_clusters(ctx, g, moe_products<F>) : kl_gpu_multiprocessors(ctx);
    g.x = (int64_t)clusters * F::CLUSTER;
    return kl_launch(ctx, name, g, moe_products<F>, p);
}

template <moe_kind KIND> kl_status launch_either(const kl_ctx *ctx, const char *name, const moe_product &p, bool small)
{
    return small ? launch<few<KIND>>(ctx, name, p) : launch<many<KIND>>(ctx, name, p);
}

} // namespace

moe_tiling moe_tiling_of(int64_t rows, int64_t experts)
{
    bool small = rows < 96 * experts;
    return {small, small ? few<MOE_PLAIN>::CLUSTER : many<MOE_PLAIN>::CLUSTER, small ? few<MOE_PLAIN>::MOST : many<MOE_PLAIN>::MOST};
}

int moe_tile_of(const moe_tiling &cut, int64_t rows)
{
    int64_t groups = moe_ceil(rows, cut.blocks * cut.most);
    return groups > 16 ? cut.most : groups ? (int)moe_ceil(rows, 8 * cut.blocks * groups) * 8 : 8;
}

kl_status moe_device_product(const kl_ctx *ctx, const char *name, const moe_product &given, moe_kind kind, bool small)
{
    kl_range range(name);
    moe_product p = given;
    kl_tensor_shape s;
    s.size[0] = p.K, s.size[1] = p.x_rows;
    s.stride[1] = p.K;
    s.box[0] = MOE_K, s.box[1] = MOE_BOX;
    KL_TRY(kl_tensor_describe(&p.x_map, name, p.x, s));
    switch (kind) {
    case MOE_PLAIN: return launch_either<MOE_PLAIN>(ctx, name, p, small);
    case MOE_SWIGLU: return launch_either<MOE_SWIGLU>(ctx, name, p, small);
    default: return launch_either<MOE_TRANSPOSED>(ctx, name, p, small);
    }
}
