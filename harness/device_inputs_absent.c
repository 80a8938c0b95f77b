/* Without a CUDA toolkit: no context for a device is ever created, so nothing here is reached. */
#include "common/gpu.h"
#include "harness/device_inputs.h"

kl_status kl_device_inputs(const kl_ctx *ctx, const kda_problem *p, const kda_grads *g, kl_regime regime, uint64_t seed)
{
    return (void)ctx, (void)p, (void)g, (void)regime, (void)seed, kl_gpu_check(0);
}
kl_status kl_device_normal(const kl_ctx *ctx, void *x, kl_dtype type, int64_t count, float stddev, uint64_t seed)
{
    return (void)ctx, (void)x, (void)type, (void)count, (void)stddev, (void)seed, kl_gpu_check(0);
}
kl_status kl_device_general(const kl_ctx *ctx, const kda_problem *p, const dplr_problem *d)
{
    return (void)ctx, (void)p, (void)d, kl_gpu_check(0);
}
kl_status kl_device_slice(const kl_ctx *ctx, float *dst, const kl_slice *s)
{
    return (void)ctx, (void)dst, (void)s, kl_gpu_check(0);
}
