/* The vocabulary that kernels are written in, and how they are launched.
 *
 * With a CUDA toolkit the words are inline PTX, for 9.0 and in a plainer form for 8.0 and everything later. With KL_EMULATE they
 * are ordinary C++, and a launch runs the grid on the host, one fiber a thread (common/emulate.h): the same kernel
 * source is then tested, and run under the address sanitizer, on machines without a GPU. So a kernel uses these words and
 * CUDA's own __syncthreads, __syncwarp, __shfl_*_sync and friends, and no PTX of its own.
 *
 * Shared memory is dynamic only: KL_SHARED(name) declares it. Its bytes are undefined at the start (NaN when emulated).
 *
 * Fragments of mma.sync m16n8k16, lane = 4 g + t:
 *     A [16 x 16] a[0] = (g, 2t..2t+1)  a[1] = (g+8, 2t..)  a[2] = (g, 2t+8..)  a[3] = (g+8, 2t+8..)   two bf16 each, lower column low
 *     B [16 x 8]  b[0] = (2t..2t+1, g)  b[1] = (2t+8.., g)                                             lower row low
 *     C [16 x 8]  c[0], c[1] = (g, 2t), (g, 2t+1)   c[2], c[3] = (g+8, 2t), (g+8, 2t+1)                float */
#ifndef KL_COMMON_DEVICE_CUH
#define KL_COMMON_DEVICE_CUH

#include <cstddef>
#include <cstdint>

#include "common/context.h"
#include "common/dtype.h"
#include "common/status.h"

struct kl_grid {
    int64_t x = 1, y = 1, z = 1; /* blocks; y and z at most 65,535: never a user's size */
    int threads = 128;
    size_t shared = 0;           /* bytes of dynamic shared memory */
    int cluster = 1;             /* blocks along x that form a cluster */
    bool overlap = false;        /* may start while the launch before it drains; the kernel calls kl_grid_wait() */
    bool resident = false;       /* all blocks run at the same time and may wait for one another; refused when they do not fit */
};

/* Does the device have what the grid asks for? */
inline kl_status kl_launch_fits(const kl_ctx *ctx, const char *name, const kl_grid &g)
{
    if (g.cluster > 1 && !ctx->hopper)
        return kl_error(KL_EUNSUPPORTED, "%s: clusters: expected a device of compute capability 9.0 and code for it; use --device cpu", name);
    if (g.shared > ctx->shared_most)
        return kl_error(KL_EUNSUPPORTED, "%s: shared memory: expected a device with %zu bytes a block, got %zu; use --device cpu", name, g.shared,
                        ctx->shared_most);
    return kl_ok();
}

#ifdef KL_EMULATE
#include "common/emulate.h"
#else
#include "common/device_ptx.cuh"
#endif

__device__ __forceinline__ float kl_bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float kl_bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float kl_load_bf16(const uint16_t *p) { return __uint_as_float((uint32_t)*p << 16); }

/* e^x, ln x through powers of two; __expf and __logf are CUDA's alone. */
__device__ __forceinline__ float kl_exp(float x) { return kl_exp2(x * 1.44269504f); }
__device__ __forceinline__ float kl_log(float x) { return kl_log2(x) * 0.693147181f; }

/* Sum over the lanes of a warp; every lane gets it, in the same order of additions. */
__device__ __forceinline__ float kl_warp_sum(float x)
{
    for (int m = 16; m; m >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, m);
    return x;
}

/* KL_LANE_ANEW, defined ahead of this by a file with a long loop: asked anew at every use, so that what follows from it is worked out where
 * it is wanted and not kept in registers all along. */
#ifdef KL_LANE_ANEW
__device__ __forceinline__ int kl_lane() { return kl_lane_anew(); }
#else
__device__ __forceinline__ int kl_lane() { return (int)(threadIdx.x & 31); }
#endif

/* Copies bytes from host memory to dst on the stream, through kernel parameters: the source may go as soon as
 * this returns, nothing waits, and a captured graph keeps the values. For tables of a few kilobytes to a megabyte. */
kl_status kl_upload(const kl_ctx *ctx, void *dst, const void *src, size_t bytes);

/* The description of a tensor at `base` (a multiple of 16), made on the host, for kl_tensor_load and kl_tensor_store; name: for messages. */
kl_status kl_tensor_describe(kl_tensor_map *map, const char *name, const void *base, const kl_tensor_shape &shape);

#endif
