/* The words of common/device.cuh on the host: a launch runs its grid block after block (cluster after cluster), one fiber a
 * thread, switching where threads wait for one another. Included from there only, with KL_EMULATE.
 *
 * What it catches: wrong indices, races that need no timing, divergent collectives, deadlocks, reads of unwritten shared
 * memory (NaN), writes beyond it, misaligned bulk copies. What it cannot: missing fences, and the speed of anything. */
#ifndef KL_COMMON_EMULATE_H
#define KL_COMMON_EMULATE_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "common/dtype.h"

/* With the address sanitizer: memory that nobody may touch until it is unpoisoned. */
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define KL_POISON(p, bytes) __asan_poison_memory_region(p, bytes)
#define KL_UNPOISON(p, bytes) __asan_unpoison_memory_region(p, bytes)
#else
#define KL_POISON(p, bytes) ((void)(p), (void)(bytes))
#define KL_UNPOISON(p, bytes) ((void)(p), (void)(bytes))
#endif

/* ---- CUDA's own words ---- */
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define KL_SHARED(name) unsigned char *name = kl_emulated->block->shared

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }

struct kl_emulated_block {
    unsigned char *shared;
    dim3 index;
    int rank;      /* in its cluster */
    int live;      /* threads that have not returned */
    struct kl_emulated_cluster *cluster;
    struct { int arrived, generation; } barrier[16];
};
struct kl_emulated_thread {
    kl_emulated_block *block;
    struct kl_emulated_warp *warp;
    dim3 index;
    int lane;
};
extern thread_local kl_emulated_thread *kl_emulated;
extern thread_local dim3 kl_emulated_grid, kl_emulated_threads;

#define threadIdx (kl_emulated->index)
#define blockIdx (kl_emulated->block->index)
#define gridDim (kl_emulated_grid)
#define blockDim (kl_emulated_threads)

/* Run once by the last of the lanes in mask to come: args[lane] is what that lane handed over. */
typedef void (*kl_warp_work)(void *args[32], uint32_t mask);
void kl_emulated_collective(const char *name, uint32_t mask, void *args, kl_warp_work work);
/* Lets others run until ready(what) holds. */
void kl_emulated_wait(const char *name, bool (*ready)(void *what), void *what);
void kl_emulated_block_barrier(int id, int threads, bool wait);
void kl_emulated_cluster_barrier();
unsigned char *kl_emulated_peer(const void *shared, int rank); /* the same place in another block of the cluster */
[[noreturn]] void kl_emulated_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
extern bool kl_emulated_runs;   /* false: launches are checked, not run */
extern bool kl_emulated_hopper; /* false: words as in common/device_plain.cuh */
kl_status kl_emulated_run(const char *name, const kl_grid &g, const std::function<void()> &body);

static inline kl_status kl_cuda(int error, const char *what)
{
    return error ? kl_error(KL_EDEVICE, "%s: error %d", what, error) : kl_ok();
}

template <class... P, class... A>
kl_status kl_launch(const kl_ctx *ctx, const char *name, const kl_grid &g, void (*kernel)(P...), A... args)
{
    KL_TRY(kl_launch_fits(ctx, name, g));
    kl_emulated_hopper = ctx->hopper;
    return kl_emulated_run(name, g, [=]() { kernel(P(args)...); });
}

template <class... P> int kl_resident_clusters(const kl_ctx *ctx, const kl_grid &g, void (*)(P...)) { return ctx->hopper ? 16 / g.cluster : 0; }

static inline void __syncthreads() { kl_emulated_block_barrier(0, 0, true); }
static inline void kl_barrier(int id, int threads) { kl_emulated_block_barrier(id, threads, true); }
static inline void kl_barrier_arrive(int id, int threads) { kl_emulated_block_barrier(id, threads, false); }
static inline void __syncwarp(uint32_t mask = 0xffffffffu)
{
    kl_emulated_collective("__syncwarp", mask, NULL, [](void **, uint32_t) {});
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned) { kl_emulated_wait("__nanosleep", [](void *) { return true; }, NULL); }

template <class T> struct kl_shuffle {
    T value, result;
    int from; /* lane */
};
template <class T> T kl_emulated_shuffle(uint32_t mask, T value, int from)
{
    kl_shuffle<T> s = {value, value, from};
    kl_emulated_collective("shuffle", mask, &s, [](void *args[32], uint32_t) {
        for (int lane = 0; lane < 32; lane++)
            if (kl_shuffle<T> *mine = (kl_shuffle<T> *)args[lane]) {
                if (!args[mine->from])
                    kl_emulated_fail("shuffle: lane %d reads lane %d, which does not take part", lane, mine->from);
                mine->result = ((kl_shuffle<T> *)args[mine->from])->value;
            }
    });
    return s.result;
}
template <class T> T __shfl_sync(uint32_t mask, T v, int from, int width = 32)
{
    int lane = kl_emulated->lane;
    return kl_emulated_shuffle(mask, v, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32)
{
    int lane = kl_emulated->lane, from = lane ^ bits;
    return kl_emulated_shuffle(mask, v, (from & ~(width - 1)) == (lane & ~(width - 1)) ? from : lane);
}
template <class T> T __shfl_down_sync(uint32_t mask, T v, unsigned by, int width = 32)
{
    int lane = kl_emulated->lane, from = lane + (int)by;
    return kl_emulated_shuffle(mask, v, from / width == lane / width && from < 32 ? from : lane);
}
template <class T> T __shfl_up_sync(uint32_t mask, T v, unsigned by, int width = 32)
{
    int lane = kl_emulated->lane, from = lane - (int)by;
    return kl_emulated_shuffle(mask, v, from >= 0 && from / width == lane / width ? from : lane);
}
static inline uint32_t __ballot_sync(uint32_t mask, int predicate)
{
    struct vote { uint32_t mine, all; } v = {predicate != 0, 0};
    kl_emulated_collective("ballot", mask, &v, [](void *args[32], uint32_t) {
        uint32_t all = 0;
        for (int lane = 0; lane < 32; lane++)
            if (args[lane])
                all |= ((vote *)args[lane])->mine << lane;
        for (int lane = 0; lane < 32; lane++)
            if (args[lane])
                ((vote *)args[lane])->all = all;
    });
    return v.all;
}
static inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <bool most> uint32_t kl_emulated_reduce(uint32_t mask, uint32_t value)
{
    kl_emulated_collective("reduce", mask, &value, [](void *args[32], uint32_t) {
        uint32_t all = most ? 0 : UINT32_MAX;
        for (int lane = 0; lane < 32; lane++)
            if (const uint32_t *mine = (const uint32_t *)args[lane])
                all = (*mine > all) == most ? *mine : all;
        for (int lane = 0; lane < 32; lane++)
            if (args[lane])
                *(uint32_t *)args[lane] = all;
    });
    return value;
}
static inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t v) { return kl_emulated_reduce<true>(mask, v); }
static inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t v) { return kl_emulated_reduce<false>(mask, v); }
static inline int __syncthreads_or(int predicate)
{
    int *seen = (int *)kl_emulated->block->shared - 4; /* room kept before shared memory */
    __syncthreads();
    *seen = 0;
    __syncthreads();
    *seen |= predicate != 0;
    __syncthreads();
    return *seen;
}

static inline float __uint_as_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
static inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
static inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline int __ffs(uint32_t x) { return __builtin_ffs((int)x); }
static inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T v) { *p = v; }
template <class T> static inline void __stcg(T *p, T v) { *p = v; }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
static inline int atomicAdd(int *p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline unsigned atomicAdd(unsigned *p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline uint32_t atomicOr(uint32_t *p, uint32_t v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
static inline int atomicMax(int *p, int v)
{
    int old = *p;
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return old;
}

/* ---- numbers ---- */
static inline uint32_t kl_pack_bf16(float low, float high) { return kl_f32_to_bf16(low) | (uint32_t)kl_f32_to_bf16(high) << 16; }
static inline uint16_t kl_to_bf16(float x) { return kl_f32_to_bf16(x); }
static inline float kl_flushed(float x) { return fabsf(x) < 1.17549435e-38f ? 0.0f * x : x; }
static inline float kl_exp2(float x) { return kl_flushed(exp2f(x)); }
static inline float kl_log2(float x) { return log2f(kl_flushed(x)); }
static inline float kl_rcp(float x) { return kl_flushed(1.0f / kl_flushed(x)); }
static inline float kl_rsqrt(float x) { return 1.0f / sqrtf(kl_flushed(x)); }
static inline uint32_t kl_to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

/* ---- matrix unit ---- */
struct kl_mma_args { float *c; const uint32_t *a, *b; };
static inline void kl_mma(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    kl_mma_args m = {c, a, b};
    kl_emulated_collective("mma", 0xffffffffu, &m, [](void *args[32], uint32_t) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const kl_mma_args *l = (const kl_mma_args *)args[lane];
            int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++)
                    A[g + 8 * (i & 1)][2 * t + h + 8 * (i >> 1)] = kl_bf16_to_f32((uint16_t)(l->a[i] >> (16 * h)));
            for (int i = 0; i < 2; i++)
                for (int h = 0; h < 2; h++)
                    B[2 * t + h + 8 * i][g] = kl_bf16_to_f32((uint16_t)(l->b[i] >> (16 * h)));
        }
        for (int lane = 0; lane < 32; lane++) {
            float *c = ((const kl_mma_args *)args[lane])->c;
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + 8 * (i >> 1), col = 2 * (lane % 4) + (i & 1);
                float sum = 0.0f;
                for (int k = 0; k < 16; k++)
                    sum += A[row][k] * B[k][col];
                c[i] += sum;
            }
        }
    });
}
static inline void kl_mma_tf32(float c[4], const uint32_t a[4], const uint32_t b[2])
{
    kl_mma_args m = {c, a, b};
    kl_emulated_collective("mma_tf32", 0xffffffffu, &m, [](void *args[32], uint32_t) {
        float A[16][8], B[8][8];
        for (int lane = 0; lane < 32; lane++) {
            const kl_mma_args *l = (const kl_mma_args *)args[lane];
            int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; i++)
                A[g + 8 * (i & 1)][t + 4 * (i >> 1)] = __uint_as_float(l->a[i] & 0xffffe000u);
            for (int i = 0; i < 2; i++)
                B[t + 4 * i][g] = __uint_as_float(l->b[i] & 0xffffe000u);
        }
        for (int lane = 0; lane < 32; lane++) {
            float *c = ((const kl_mma_args *)args[lane])->c;
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + 8 * (i >> 1), col = 2 * (lane % 4) + (i & 1);
                float sum = 0.0f;
                for (int k = 0; k < 8; k++)
                    sum += A[row][k] * B[k][col];
                c[i] += sum;
            }
        }
    });
}

struct kl_matrix_args { uint32_t *r; unsigned char *row; };
template <int count, bool trans, bool store> void kl_emulated_matrices(uint32_t *r, const void *row)
{
    kl_matrix_args m = {r, (unsigned char *)row};
    kl_emulated_collective("matrices", 0xffffffffu, &m, [](void *args[32], uint32_t) {
        for (int i = 0; i < count; i++)
            for (int lane = 0; lane < 32; lane++)
                for (int h = 0; h < 2; h++) {
                    int y = lane / 4, x = 2 * (lane % 4) + h;
                    unsigned char *from = ((kl_matrix_args *)args[8 * i + (trans ? x : y)])->row;
                    if ((uintptr_t)from % 16)
                        kl_emulated_fail("ldmatrix or stmatrix: a row at an address that is no multiple of 16");
                    uint16_t *element = (uint16_t *)from + (trans ? y : x);
                    uint32_t *reg = &((kl_matrix_args *)args[lane])->r[i];
                    if (store)
                        *element = (uint16_t)(*reg >> (16 * h));
                    else
                        *reg = h ? (*reg & 0xffffu) | (uint32_t)*element << 16 : *element;
                }
    });
}
static inline void kl_ldmatrix4(uint32_t r[4], const void *row) { kl_emulated_matrices<4, false, false>(r, row); }
static inline void kl_ldmatrix4_trans(uint32_t r[4], const void *row) { kl_emulated_matrices<4, true, false>(r, row); }
static inline void kl_ldmatrix2(uint32_t r[2], const void *row) { kl_emulated_matrices<2, false, false>(r, row); }
static inline void kl_ldmatrix2_trans(uint32_t r[2], const void *row) { kl_emulated_matrices<2, true, false>(r, row); }
static inline void kl_stmatrix4(void *row, const uint32_t r[4]) { kl_emulated_matrices<4, false, true>((uint32_t *)r, row); }
static inline void kl_stmatrix4_trans(void *row, const uint32_t r[4]) { kl_emulated_matrices<4, true, true>((uint32_t *)r, row); }
static inline uint32_t kl_movmatrix_trans(uint32_t x)
{
    struct moved { uint32_t in, out; } v = {x, 0};
    kl_emulated_collective("movmatrix", 0xffffffffu, &v, [](void *args[32], uint32_t) {
        uint16_t M[8][8];
        for (int lane = 0; lane < 32; lane++)
            for (int h = 0; h < 2; h++)
                M[lane / 4][2 * (lane % 4) + h] = (uint16_t)(((moved *)args[lane])->in >> (16 * h));
        for (int lane = 0; lane < 32; lane++)
            ((moved *)args[lane])->out = M[2 * (lane % 4)][lane / 4] | (uint32_t)M[2 * (lane % 4) + 1][lane / 4] << 16;
    });
    return v.out;
}

/* ---- mbarriers: pending arrivals, arrivals a phase, phase, bytes outstanding ---- */
struct kl_mbar {
    int16_t pending, arrivals : 15;
    uint16_t phase : 1;
    int32_t bytes;
};
static_assert(sizeof(kl_mbar) == 8, "an mbarrier is 8 bytes");
static inline void kl_mbar_settle(kl_mbar *b)
{
    if (b->pending == 0 && b->bytes == 0) {
        b->phase ^= 1;
        b->pending = b->arrivals;
    }
}
static inline void kl_mbar_init(uint64_t *bar, int arrivals)
{
    kl_mbar *b = (kl_mbar *)bar;
    b->pending = b->arrivals = (int16_t)arrivals;
    b->phase = 0;
    b->bytes = 0;
}
static inline void kl_mbar_init_fence() {}
static inline void kl_emulated_arrive(kl_mbar *b, int bytes)
{
    if (b->pending <= 0)
        kl_emulated_fail("mbarrier: an arrival more than the phase expects");
    b->bytes += bytes;
    b->pending--;
    kl_mbar_settle(b);
}
static inline void kl_emulated_bytes(uint64_t *bar, int bytes)
{
    kl_mbar *b = (kl_mbar *)bar;
    if (!kl_emulated_hopper)
        return;
    b->bytes -= bytes;
    kl_mbar_settle(b);
}
static inline void kl_mbar_arrive(uint64_t *bar) { kl_emulated_arrive((kl_mbar *)bar, 0); }
static inline void kl_mbar_expect(uint64_t *bar, int bytes)
{
    if (kl_emulated_hopper)
        kl_emulated_arrive((kl_mbar *)bar, bytes);
}
static inline void kl_mbar_arrive_at(uint64_t *bar, int rank) { kl_emulated_arrive((kl_mbar *)kl_emulated_peer(bar, rank), 0); }
static inline void kl_mbar_wait(uint64_t *bar, int parity)
{
    struct waited { kl_mbar *bar; int parity; } w = {(kl_mbar *)bar, parity};
    kl_emulated_wait("mbarrier", [](void *what) { return (int)((waited *)what)->bar->phase != ((waited *)what)->parity; }, &w);
}

static inline bool kl_mbar_test(uint64_t *bar, int parity) { return (int)((kl_mbar *)bar)->phase != parity; }

/* ---- asynchronous copies happen at once ---- */
static inline void kl_fence_async() {}
static inline void kl_fence_async_shared() {}
static inline void kl_emulated_aligned(const char *what, const void *a, const void *b, int bytes)
{
    if ((uintptr_t)a % 16 || (uintptr_t)b % 16 || bytes % 16 || bytes <= 0)
        kl_emulated_fail("%s: expected addresses and a size that are multiples of 16, got %p, %p, %d", what, a, b, bytes);
}
static inline void kl_bulk_load(void *shared, const void *global, int bytes, uint64_t *bar)
{
    kl_emulated_aligned("bulk load", shared, global, bytes);
    memcpy(shared, global, (size_t)bytes);
    kl_emulated_bytes(bar, bytes);
}
static inline void kl_bulk_load_once(void *shared, const void *global, int bytes, uint64_t *bar) { kl_bulk_load(shared, global, bytes, bar); }
static inline void kl_bulk_issued(uint64_t *bar)
{
    if (!kl_emulated_hopper)
        kl_emulated_arrive((kl_mbar *)bar, 0);
}
static inline void kl_bulk_load_multicast(void *shared, const void *global, int bytes, uint64_t *bar, uint16_t blocks)
{
    kl_emulated_aligned("bulk load", shared, global, bytes);
    for (int rank = 0; rank < 16; rank++)
        if (blocks >> rank & 1) {
            memcpy(kl_emulated_peer(shared, rank), global, (size_t)bytes);
            kl_emulated_bytes((uint64_t *)kl_emulated_peer(bar, rank), bytes);
        }
}
static inline void kl_bulk_store(void *global, const void *shared, int bytes)
{
    kl_emulated_aligned("bulk store", shared, global, bytes);
    memcpy(global, shared, (size_t)bytes);
}
static inline void kl_bulk_commit() {}
template <int left> static inline void kl_bulk_wait() {}
template <int left> static inline void kl_bulk_wait_read() {}
static inline void kl_prefetch(const void *global) { (void)*(const volatile unsigned char *)global; }
static inline void kl_copy16(void *shared, const void *global, bool valid = true)
{
    kl_emulated_aligned("16-byte copy", shared, global, 16);
    if (valid)
        memcpy(shared, global, 16);
    else
        memset(shared, 0, 16);
}
static inline void kl_copy4(void *shared, const void *global, bool valid = true)
{
    if (valid)
        memcpy(shared, global, 4);
    else
        memset(shared, 0, 4);
}
static inline void kl_copy_arrive(uint64_t *bar) { kl_emulated_arrive((kl_mbar *)bar, 0); }
static inline void kl_copy_commit() {}
template <int left> static inline void kl_copy_wait() {}

/* ---- between resident blocks ---- */
static inline int kl_load_acquire(const int *p) { return *(const volatile int *)p; }
static inline void kl_store_release(int *p, int v) { *(volatile int *)p = v; }
static inline void kl_add_release(int *p, int v) { __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
static inline void kl_await(const int *p, int v)
{
    struct awaited { const int *p; int v; } a = {p, v};
    kl_emulated_wait("await", [](void *what) { return kl_load_acquire(((awaited *)what)->p) >= ((awaited *)what)->v; }, &a);
}

/* ---- clusters and grids ---- */
static inline int kl_cluster_rank() { return kl_emulated->block->rank; }
static inline void kl_cluster_sync() { kl_emulated_cluster_barrier(); }
template <class T> static inline T *kl_peer(T *shared, int rank) { return (T *)kl_emulated_peer(shared, rank); }
static inline void kl_grid_wait() {}
static inline void kl_grid_release() {}
static inline int kl_lane_anew() { return (int)(threadIdx.x & 31); }
template <int count> static inline void kl_registers_fewer() {}
template <int count> static inline void kl_registers_more() {}

#include "common/emulate_tensor.h"

#endif
