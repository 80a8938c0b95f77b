/* The words of common/device.cuh on hardware. Included from there only. Those between KL_HOPPER and its #endif have another,
 * plain form for everything but 9.0 in common/device_plain.cuh. */
#include <cuda_runtime.h>

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KL_HOPPER
#endif

#define KL_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

/* ---- launching ---- */

inline kl_status kl_cuda(cudaError_t e, const char *what)
{
    if (e == cudaSuccess)
        return kl_ok();
    return kl_error(e == cudaErrorMemoryAllocation ? KL_ENOMEM : KL_EDEVICE, "%s: %s (%s)", what, cudaGetErrorString(e), cudaGetErrorName(e));
}

/* What a kernel must be told before its first launch with a grid of this kind. */
inline kl_status kl_launch_prepare(const kl_ctx *ctx, const char *name, const kl_grid &g, const void *kernel)
{
    KL_TRY(kl_launch_fits(ctx, name, g));
    if (g.shared > 48 * 1024)
        KL_TRY(kl_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)g.shared), name));
    if (g.cluster > 8)
        KL_TRY(kl_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name));
    return kl_ok();
}

inline cudaLaunchConfig_t kl_launch_config(const kl_ctx *ctx, const kl_grid &g, cudaLaunchAttribute attribute[3])
{
    cudaLaunchConfig_t c = {};
    c.gridDim = dim3((unsigned)g.x, (unsigned)g.y, (unsigned)g.z);
    c.blockDim = dim3((unsigned)g.threads);
    c.dynamicSmemBytes = g.shared;
    c.stream = (cudaStream_t)ctx->stream;
    c.attrs = attribute;
    if (g.cluster > 1) {
        cudaLaunchAttribute &a = attribute[c.numAttrs++];
        a.id = cudaLaunchAttributeClusterDimension;
        a.val.clusterDim.x = (unsigned)g.cluster;
        a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (g.overlap && ctx->hopper) {
        cudaLaunchAttribute &a = attribute[c.numAttrs++];
        a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        a.val.programmaticStreamSerializationAllowed = 1;
    }
    if (g.resident) {
        cudaLaunchAttribute &a = attribute[c.numAttrs++];
        a.id = cudaLaunchAttributeCooperative;
        a.val.cooperative = 1;
    }
    return c;
}

/* Puts one grid on the context's stream. An empty grid is no launch. */
template <class... P, class... A>
kl_status kl_launch(const kl_ctx *ctx, const char *name, const kl_grid &g, void (*kernel)(P...), A... args)
{
    if (g.x <= 0 || g.y <= 0 || g.z <= 0)
        return kl_ok();
    if (g.x > INT32_MAX || g.y > 65535 || g.z > 65535)
        return kl_error(KL_EUNSUPPORTED, "%s: expected a grid of at most 2147483647 x 65535 x 65535, got %lld x %lld x %lld", name,
                        (long long)g.x, (long long)g.y, (long long)g.z);
    KL_TRY(kl_launch_prepare(ctx, name, g, (const void *)kernel));
    cudaLaunchAttribute attribute[3];
    cudaLaunchConfig_t c = kl_launch_config(ctx, g, attribute);
    return kl_cuda(cudaLaunchKernelEx(&c, kernel, P(args)...), name);
}

/* How many clusters of such a grid the device holds at a time; 0 when it cannot say. */
template <class... P> int kl_resident_clusters(const kl_ctx *ctx, const kl_grid &g, void (*kernel)(P...))
{
    int count = 0;
    if (!ctx->hopper || kl_failed(kl_launch_prepare(ctx, "clusters", g, (const void *)kernel)))
        return 0;
    cudaLaunchAttribute attribute[3];
    cudaLaunchConfig_t c = kl_launch_config(ctx, g, attribute);
    return cudaOccupancyMaxActiveClusters(&count, kernel, &c) == cudaSuccess ? count : 0;
}

/* ---- numbers ---- */

/* Two floats to two bf16, round to nearest even; low in the lower half. */
__device__ __forceinline__ uint32_t kl_pack_bf16(float low, float high)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ uint16_t kl_to_bf16(float x)
{
    uint16_t r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
/* 2^x, log2 x, 1/x, 1/sqrt(x): about 2^-22 relative; subnormal results are flushed to zero. */
__device__ __forceinline__ float kl_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float kl_log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float kl_rcp(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float kl_rsqrt(float x)
{
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
/* Nearest tf32, as mma_tf32 wants its operands. */
__device__ __forceinline__ uint32_t kl_to_tf32(float x)
{
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

/* ---- matrix unit ---- */

/* c [16 x 8] += a [16 x 16] b [16 x 8], bf16 operands, float sums. */
__device__ __forceinline__ void kl_mma(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* c [16 x 8] += a [16 x 8] b [8 x 8] in tf32: a = (g,t) (g+8,t) (g,t+4) (g+8,t+4), b = (t,g) (t+4,g). */
__device__ __forceinline__ void kl_mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t kl_shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* Four (two) 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + j gives the address of row j of matrix i, and
 * gets element pair (row g, columns 2t, 2t+1) of each; transposed, pair (rows 2t, 2t+1, column g). */
__device__ __forceinline__ void kl_ldmatrix4(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(kl_shared_address(row)) : "memory");
}
__device__ __forceinline__ void kl_ldmatrix4_trans(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(kl_shared_address(row)) : "memory");
}
__device__ __forceinline__ void kl_ldmatrix2(uint32_t r[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(kl_shared_address(row)) : "memory");
}
__device__ __forceinline__ void kl_ldmatrix2_trans(uint32_t r[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(kl_shared_address(row)) : "memory");
}
#ifdef KL_HOPPER
/* The way back. */
__device__ __forceinline__ void kl_stmatrix4(void *row, const uint32_t r[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(kl_shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void kl_stmatrix4_trans(void *row, const uint32_t r[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(kl_shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
#endif
/* An 8 x 8 matrix of 16-bit elements across the warp, transposed. */
__device__ __forceinline__ uint32_t kl_movmatrix_trans(uint32_t x)
{
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

/* The lane, by an instruction that is neither moved nor shared between uses. */
__device__ __forceinline__ int kl_lane_anew()
{
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

/* ---- barriers ---- */

/* Barrier id 1..15 among `threads` threads of the block (whole warps). */
__device__ __forceinline__ void kl_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void kl_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }

/* mbarriers: 8 bytes of shared memory; a phase ends when its arrivals and its bytes have come. */
__device__ __forceinline__ void kl_mbar_init(uint64_t *bar, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(kl_shared_address(bar)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void kl_mbar_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(kl_shared_address(bar)) : "memory");
}
/* Has that phase ended by now? Asked early, the answer is there when it is wanted. Acquires like the wait if so. */
__device__ __forceinline__ bool kl_mbar_test(uint64_t *bar, int parity)
{
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(kl_shared_address(bar)), "r"(parity) : "memory");
    return done;
}
#ifdef KL_HOPPER
/* After kl_mbar_init, before anyone else (the copy engine, the cluster) uses the barriers; then a block or cluster sync. */
__device__ __forceinline__ void kl_mbar_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}
/* Arrive, and let the phase wait for `bytes` more. */
__device__ __forceinline__ void kl_mbar_expect(uint64_t *bar, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(kl_shared_address(bar)), "r"(bytes) : "memory");
}
/* The same barrier in block `rank` of the cluster. Says that this thread (its warp, after __syncwarp) has read what it
 * wanted; it publishes no stores to other blocks, which would cost a fence of the whole device. */
__device__ __forceinline__ void kl_mbar_arrive_at(uint64_t *bar, int rank)
{
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [a]; }"
                 :: "r"(kl_shared_address(bar)), "r"(rank) : "memory");
}
/* Waits until the phase of that parity has ended; 1 passes on a fresh barrier. Acquires what the block wrote before its
 * arrivals, and what copies wrote that the barrier counted. */
__device__ __forceinline__ void kl_mbar_wait(uint64_t *bar, int parity)
{
    uint32_t done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(kl_shared_address(bar)), "r"(parity) : "memory");
}

/* ---- asynchronous copies ---- */

/* Ordinary stores of this thread become visible to bulk copies (call before the barrier that hands over). */
__device__ __forceinline__ void kl_fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
/* The same for shared memory alone, much cheaper: global writes before it are not waited for. */
__device__ __forceinline__ void kl_fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* bytes and both addresses multiples of 16; bar counts the bytes. One thread expects and, for that phase, issues all loads and
 * then says kl_bulk_issued; where a thread expects for another one, that one's phase has one load. */
__device__ __forceinline__ void kl_bulk_load(void *shared, const void *global, int bytes, uint64_t *bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(kl_shared_address(shared)), "l"(global), "r"(bytes), "r"(kl_shared_address(bar)) : "memory");
}
/* The same of what is read once: the second cache keeps everything else rather than this. */
__device__ __forceinline__ void kl_bulk_load_once(void *shared, const void *global, int bytes, uint64_t *bar)
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 :: "r"(kl_shared_address(shared)), "l"(global), "r"(bytes), "r"(kl_shared_address(bar)), "l"(policy) : "memory");
}
/* No more loads of this thread belong to the phase. */
__device__ __forceinline__ void kl_bulk_issued(uint64_t *) {}
/* To the same place in every block of the cluster whose bit is set, each block's own barrier counting. */
__device__ __forceinline__ void kl_bulk_load_multicast(void *shared, const void *global, int bytes, uint64_t *bar, uint16_t blocks)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 :: "r"(kl_shared_address(shared)), "l"(global), "r"(bytes), "r"(kl_shared_address(bar)), "h"(blocks) : "memory");
}
__device__ __forceinline__ void kl_bulk_store(void *global, const void *shared, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(global), "r"(kl_shared_address(shared)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void kl_bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until at most `left` of this thread's groups of stores are unfinished; _read: until their shared memory is free again. */
template <int left> __device__ __forceinline__ void kl_bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" :: "n"(left) : "memory"); }
template <int left> __device__ __forceinline__ void kl_bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(left) : "memory"); }
#endif

/* Starts the 128 bytes around an address on their way to the second cache. */
__device__ __forceinline__ void kl_prefetch(const void *global) { asm volatile("prefetch.global.L2 [%0];" :: "l"(global)); }

/* 16 bytes (4: kl_copy4) from global to shared, zeros when !valid; global must then still be a valid address. */
__device__ __forceinline__ void kl_copy16(void *shared, const void *global, bool valid = true)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(kl_shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void kl_copy4(void *shared, const void *global, bool valid = true)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(kl_shared_address(shared)), "l"(global), "r"(valid ? 4 : 0) : "memory");
}
/* Arrives at bar when the copies that this thread has issued so far are done; commits nothing. */
__device__ __forceinline__ void kl_copy_arrive(uint64_t *bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(kl_shared_address(bar)) : "memory");
}
__device__ __forceinline__ void kl_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> __device__ __forceinline__ void kl_copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory"); }

/* ---- between blocks that are resident together: numbers in global memory that only grow ---- */

__device__ __forceinline__ int kl_load_acquire(const int *p)
{
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void kl_store_release(int *p, int v) { asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }
/* Adds, publishing like the store. */
__device__ __forceinline__ void kl_add_release(int *p, int v) { asm volatile("red.release.gpu.global.add.s32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }
/* Waits until *p is at least v; what was written before it became so is there. */
__device__ __forceinline__ void kl_await(const int *p, int v)
{
    while (kl_load_acquire(p) < v)
        __nanosleep(20);
}

/* ---- clusters and grids ---- */

#ifdef KL_HOPPER
__device__ __forceinline__ int kl_cluster_rank()
{
    uint32_t r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return (int)r;
}
__device__ __forceinline__ void kl_cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* The same place in the shared memory of block `rank`. */
template <class T> __device__ __forceinline__ T *kl_peer(T *shared, int rank)
{
    T *p;
    asm("mapa.u64 %0, %1, %2;" : "=l"(p) : "l"(shared), "r"(rank));
    return p;
}
/* With kl_grid.overlap: what the launch before wrote is there after kl_grid_wait(); kl_grid_release() lets the next one start. */
__device__ __forceinline__ void kl_grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void kl_grid_release() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/* Registers a thread of this warpgroup may use from here on: a multiple of 8; all four warps call it. */
template <int count> __device__ __forceinline__ void kl_registers_fewer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(count)); }
template <int count> __device__ __forceinline__ void kl_registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(count)); }
#endif

#include "common/tensor_ptx.cuh"
#ifdef KL_HOPPER
#include "common/wgmma_ptx.cuh"
#else
#include "common/device_plain.cuh"
#endif
