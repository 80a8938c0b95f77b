/* Words of common/device.cuh that are made of Hopper's own instructions, for devices from 8.0 on that are not 9.0: the same
 * meaning from ordinary copies, with no clusters and no overlap of launches. Included from common/device_ptx.cuh only. */

__device__ __forceinline__ void *kl_row_of_lane(void *row, int lane) { return (void *)__shfl_sync(0xffffffffu, (unsigned long long)row, lane); }
__device__ __forceinline__ void kl_stmatrix4(void *row, const uint32_t r[4])
{
    int g = (int)(threadIdx.x & 31) >> 2, t = (int)threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 4; i++)
        ((uint32_t *)kl_row_of_lane(row, 8 * i + g))[t] = r[i];
}
__device__ __forceinline__ void kl_stmatrix4_trans(void *row, const uint32_t r[4])
{
    int g = (int)(threadIdx.x & 31) >> 2, t = (int)threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ((uint16_t *)kl_row_of_lane(row, 8 * i + 2 * t))[g] = (uint16_t)r[i];
        ((uint16_t *)kl_row_of_lane(row, 8 * i + 2 * t + 1))[g] = (uint16_t)(r[i] >> 16);
    }
}

/* What has no plain form is not launched there. */
struct kl_operand {};
__device__ __forceinline__ kl_operand kl_operand_of(const void *, int, int) { return {}; }
__device__ __forceinline__ kl_operand kl_operand_at(kl_operand x, int) { return x; }
template <int N, bool add = true, class... X> __device__ __forceinline__ void kl_wgmma(X...) { __trap(); }
__device__ __forceinline__ void kl_wgmma_fence() {}
__device__ __forceinline__ void kl_wgmma_commit() {}
template <int left> __device__ __forceinline__ void kl_wgmma_wait() {}

/* ---- barriers: the arrival that kl_mbar_expect makes comes with kl_bulk_issued, when the copies are done ---- */

__device__ __forceinline__ void kl_mbar_init_fence() {}
__device__ __forceinline__ void kl_mbar_expect(uint64_t *, int) {}
__device__ __forceinline__ void kl_mbar_arrive_at(uint64_t *bar, int) { kl_mbar_arrive(bar); }
__device__ __forceinline__ void kl_mbar_wait(uint64_t *bar, int parity)
{
    while (!kl_mbar_test(bar, parity))
        __nanosleep(20);
}

/* ---- bulk copies, 16 bytes at a time ---- */

__device__ __forceinline__ void kl_fence_async() {}
__device__ __forceinline__ void kl_fence_async_shared() {}
__device__ __forceinline__ void kl_bulk_load(void *shared, const void *global, int bytes, uint64_t *)
{
#pragma unroll 8
    for (int i = 0; i < bytes; i += 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(kl_shared_address(shared) + i), "l"((const char *)global + i) : "memory");
}
__device__ __forceinline__ void kl_bulk_load_once(void *shared, const void *global, int bytes, uint64_t *bar) { kl_bulk_load(shared, global, bytes, bar); }
__device__ __forceinline__ void kl_bulk_issued(uint64_t *bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(kl_shared_address(bar)) : "memory");
}
__device__ __forceinline__ void kl_bulk_load_multicast(void *shared, const void *global, int bytes, uint64_t *bar, uint16_t)
{
    kl_bulk_load(shared, global, bytes, bar);
}
__device__ __forceinline__ void kl_bulk_store(void *global, const void *shared, int bytes)
{
#pragma unroll 8
    for (int i = 0; i < bytes; i += 16)
        *(uint4 *)((char *)global + i) = *(const uint4 *)((const char *)shared + i);
}
__device__ __forceinline__ void kl_bulk_commit() {}
template <int left> __device__ __forceinline__ void kl_bulk_wait() {}
template <int left> __device__ __forceinline__ void kl_bulk_wait_read() {}

/* ---- clusters of one block, launches one after another ---- */

__device__ __forceinline__ int kl_cluster_rank() { return 0; }
__device__ __forceinline__ void kl_cluster_sync() { __syncthreads(); }
template <class T> __device__ __forceinline__ T *kl_peer(T *shared, int) { return shared; }
__device__ __forceinline__ void kl_grid_wait() {}
__device__ __forceinline__ void kl_grid_release() {}
template <int count> __device__ __forceinline__ void kl_registers_fewer() {}
template <int count> __device__ __forceinline__ void kl_registers_more() {}
