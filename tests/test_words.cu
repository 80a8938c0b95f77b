/* Words of common/device.cuh against plain loops: tensor copies, and the matrix unit of a warpgroup on what they leave in shared
 * memory. On a device, or on the one that is emulated. */
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

extern "C" {
#include <cmocka.h>
}

#include "common/device.cuh"
#include "common/gpu.h"
#include "tests/expect.h"

static kl_ctx *ctx;

static int open_device(void **)
{
    kl_ctx_options options = {};
    options.device = KL_CUDA;
    return kl_gpu_count() ? kl_failed(kl_ctx_create(&ctx, &options)) : 0;
}

static int close_device(void **)
{
    kl_ctx_destroy(ctx);
    ctx = NULL;
    return 0;
}

/* Memory of the device with the host's copy beside it. */
template <class T> struct mirrored {
    std::vector<T> host;
    T *device = NULL;
    explicit mirrored(size_t count) : host(count) { assert_ok(kl_gpu_alloc(ctx, (void **)&device, count * sizeof(T))); }
    ~mirrored() { kl_gpu_free(ctx, device); }
    void send() { assert_ok(kl_gpu_copy(ctx, device, host.data(), host.size() * sizeof(T))); }
    void fetch() { assert_ok(kl_gpu_copy(ctx, host.data(), device, host.size() * sizeof(T))); }
};

/* Small whole numbers, so that every sum is exact. */
static void fill(std::vector<uint16_t> &x)
{
    uint32_t seed = 12345;
    for (uint16_t &v : x)
        v = kl_f32_to_bf16((float)(int)((seed = seed * 1664525u + 1013904223u) >> 29) - 3.5f);
}

/* ---- copies ---- */

enum { BOX_BYTES = 8192 };

struct box_place { int x[5]; };

template <int dims> __device__ void load(void *to, const kl_tensor_map *map, const int *x, uint64_t *bar)
{
    if constexpr (dims == 2)
        kl_tensor_load(to, map, x[0], x[1], bar);
    else if constexpr (dims == 3)
        kl_tensor_load(to, map, x[0], x[1], x[2], bar);
    else if constexpr (dims == 4)
        kl_tensor_load(to, map, x[0], x[1], x[2], x[3], bar);
    else
        kl_tensor_load(to, map, x[0], x[1], x[2], x[3], x[4], bar);
}
template <int dims> __device__ void store(const kl_tensor_map *map, const void *from, const int *x)
{
    if constexpr (dims == 2)
        kl_tensor_store(map, from, x[0], x[1]);
    else if constexpr (dims == 3)
        kl_tensor_store(map, from, x[0], x[1], x[2]);
    else if constexpr (dims == 4)
        kl_tensor_store(map, from, x[0], x[1], x[2], x[3]);
    else
        kl_tensor_store(map, from, x[0], x[1], x[2], x[3], x[4]);
}

/* seen: the box as it lies in shared memory; the box is stored again through `to`. */
template <int dims>
__global__ void copy_box(const __grid_constant__ kl_tensor_map from, const __grid_constant__ kl_tensor_map to, box_place at, int bytes, uint16_t *seen)
{
    KL_SHARED(shared);
    uint64_t *bar = (uint64_t *)(shared + BOX_BYTES);
    if (threadIdx.x == 0) {
        kl_tensor_prefetch(&from);
        kl_mbar_init(bar, 1);
        kl_mbar_init_fence();
        kl_mbar_expect(bar, bytes);
        load<dims>(shared, &from, at.x, bar);
    }
    __syncthreads();
    kl_mbar_wait(bar, 0);
    for (int i = (int)threadIdx.x; i < bytes / 2; i += (int)blockDim.x)
        seen[i] = ((uint16_t *)shared)[i];
    if (threadIdx.x == 0) {
        store<dims>(&to, shared, at.x);
        kl_bulk_commit();
        kl_bulk_wait<0>();
    }
}

template <int dims> static void check_box(const kl_tensor_shape &s, const box_place &at)
{
    int64_t room = 1, elements = 1;
    for (int i = 0; i < dims; i++) {
        room += (s.size[i] - 1) * (i ? s.stride[i] : 1);
        elements *= s.box[i];
    }
    mirrored<uint16_t> from((size_t)room), to((size_t)room), seen((size_t)elements);
    fill(from.host);
    std::fill(to.host.begin(), to.host.end(), 0x7fff);
    from.send();
    to.send();
    kl_tensor_map source, target;
    assert_ok(kl_tensor_describe(&source, "source", from.device, s));
    assert_ok(kl_tensor_describe(&target, "target", to.device, s));
    kl_grid g;
    g.shared = BOX_BYTES + 16;
    assert_ok(kl_launch(ctx, "copy_box", g, copy_box<dims>, source, target, at, (int)(2 * elements), seen.device));
    to.fetch();
    seen.fetch();
    std::vector<uint16_t> want((size_t)room, 0x7fff);
    for (int64_t i = 0; i < elements; i++) {
        int64_t rest = i, offset = 0, byte = 2 * i;
        bool inside = true;
        for (int d = 0; d < dims; d++) {
            int64_t x = at.x[d] + rest % s.box[d];
            rest /= s.box[d];
            inside = inside && x < s.size[d];
            offset += x * (d ? s.stride[d] : 1);
        }
        byte ^= (byte >> 7 & ((1 << s.swizzle) - 1)) << 4;
        assert_int_equal(seen.host[(size_t)(byte / 2)], inside ? from.host[(size_t)offset] : 0);
        if (inside)
            want[(size_t)offset] = from.host[(size_t)offset];
    }
    assert_true(want == to.host);
}

static void a_box_is_copied_whatever_its_shape(void **)
{
    if (!ctx)
        skip();
    static const kl_swizzle swizzles[] = {KL_SWIZZLE_NONE, KL_SWIZZLE_32, KL_SWIZZLE_64, KL_SWIZZLE_128};
    for (kl_swizzle swizzle : swizzles) {
        int row = swizzle ? kl_swizzle_bytes(swizzle) / 2 : 24;
        kl_tensor_shape s;
        s.swizzle = swizzle;
        s.dims = 2;
        s.size[0] = 72, s.size[1] = 50, s.stride[1] = 80;
        s.box[0] = row, s.box[1] = 32;
        check_box<2>(s, {{0, 3}});
        check_box<2>(s, {{8, 30}});   /* over the last row */
        check_box<2>(s, {{64, 40}});  /* and over the last column */
        check_box<2>(s, {{72, 40}});  /* beyond it */
        s.dims = 3;
        s.size[2] = 3, s.stride[2] = 24, s.size[0] = 16; /* heads within a row */
        s.box[1] = 8, s.box[2] = 2;
        check_box<3>(s, {{0, 1, 1}});
        check_box<3>(s, {{0, 45, 2}});
        s.dims = 4;
        s.size[3] = 2, s.stride[3] = 80 * 50, s.box[3] = 1;
        check_box<4>(s, {{0, 1, 0, 1}});
        s.box[3] = 2;
        check_box<4>(s, {{0, 1, 0, 1}});
        s.dims = 5;
        s.size[4] = 2, s.stride[4] = 80 * 100, s.box[4] = 1;
        check_box<5>(s, {{0, 1, 0, 0, 0}});
    }
}

__global__ void copy_to_both(const __grid_constant__ kl_tensor_map from, uint16_t *seen)
{
    KL_SHARED(shared);
    uint64_t *bar = (uint64_t *)(shared + BOX_BYTES);
    if (threadIdx.x == 0) {
        kl_mbar_init(bar, 1);
        kl_mbar_init_fence();
        kl_mbar_expect(bar, 2 * 1024);
    }
    kl_cluster_sync();
    int rank = kl_cluster_rank();
    if (threadIdx.x == 0)
        kl_tensor_load_multicast(shared + 1024 * rank, &from, 0, 8 * rank, bar, 3);
    kl_mbar_wait(bar, 0);
    for (int i = (int)threadIdx.x; i < 1024; i += (int)blockDim.x)
        seen[1024 * rank + i] = ((uint16_t *)shared)[i];
    kl_cluster_sync();
}

static void a_box_goes_to_all_blocks_of_a_cluster(void **)
{
    if (!ctx)
        skip();
    mirrored<uint16_t> from(16 * 64), seen(2 * 16 * 64);
    fill(from.host);
    from.send();
    kl_tensor_shape s;
    s.size[0] = 64, s.size[1] = 16, s.stride[1] = 64;
    s.box[0] = 64, s.box[1] = 8;
    kl_tensor_map map;
    assert_ok(kl_tensor_describe(&map, "source", from.device, s));
    kl_grid g;
    g.x = g.cluster = 2;
    g.shared = BOX_BYTES + 16;
    assert_ok(kl_launch(ctx, "copy_to_both", g, copy_to_both, map, seen.device));
    seen.fetch();
    for (size_t i = 0; i < 2048; i++)
        assert_int_equal(seen.host[i ^ (i >> 6 & 7) << 3], from.host[i % 1024]);
}

static void wrong_descriptions_are_refused(void **)
{
    kl_tensor_shape good;
    good.size[0] = 64, good.size[1] = 16, good.stride[1] = 64;
    good.box[0] = 64, good.box[1] = 8;
    kl_tensor_map map;
    alignas(16) static uint16_t memory[64 * 16];
    kl_tensor_shape s = good;
    expect_error(kl_tensor_describe(&map, "q", memory + 1, s), KL_EINVAL, "q: expected an address");
    s.stride[1] = 65;
    expect_error(kl_tensor_describe(&map, "q", memory, s), KL_EINVAL, "q: expected a multiple of 8 elements");
    s = good, s.dims = 6;
    expect_error(kl_tensor_describe(&map, "q", memory, s), KL_EINVAL, "q: expected 2 to 5 dimensions");
    s = good, s.size[1] = 0;
    expect_error(kl_tensor_describe(&map, "q", memory, s), KL_EINVAL, "q: expected 1 to 2^32");
    s = good, s.box[1] = 257;
    expect_error(kl_tensor_describe(&map, "q", memory, s), KL_EINVAL, "q: expected a box of");
    s = good, s.box[0] = 32;
    expect_error(kl_tensor_describe(&map, "q", memory, s), KL_EINVAL, "q: expected a box with rows of 128 bytes, got 64");
}

/* ---- products ---- */

enum operand_kind { REGISTERS, ROWS, COLUMNS };
enum { K = 64, M = 64 };

/* Shared memory of a [count x K] operand: in rows, K of them in as many panels as it takes; in columns, one row a value of k. */
static __host__ __device__ constexpr int operand_bytes(operand_kind kind, int count, kl_swizzle s)
{
    int width = (16 << s) / 2;
    return kind == ROWS ? K / width * count * (16 << s) : (count + width - 1) / width * K * (16 << s);
}

__device__ void load_operand(unsigned char *to, const kl_tensor_map *map, operand_kind kind, int count, kl_swizzle s, uint64_t *bar)
{
    int width = kl_swizzle_bytes(s) / 2, all = kind == ROWS ? K : count, rows = kind == ROWS ? count : K;
    for (int x = 0; x < all; x += width, to += rows * kl_swizzle_bytes(s))
        kl_tensor_load(to, map, x, 0, bar);
}

/* 16 values of k from k on. */
__device__ kl_operand rows_at(const void *shared, int k, int count, kl_swizzle s)
{
    int width = kl_swizzle_bytes(s) / 2;
    return kl_operand_at(kl_operand_rows((const unsigned char *)shared + k / width * count * kl_swizzle_bytes(s), s), k % width * 2);
}
__device__ kl_operand_n columns_at(const void *shared, int k, kl_swizzle s)
{
    return kl_operand_at(kl_operand_columns(shared, K * kl_swizzle_bytes(s), s), k * kl_swizzle_bytes(s));
}

template <int N, operand_kind ka, operand_kind kb, kl_swizzle s>
__global__ void __launch_bounds__(128) multiply(const __grid_constant__ kl_tensor_map map_a, const __grid_constant__ kl_tensor_map map_b, const uint16_t *a_rows, float *out)
{
    KL_SHARED(shared);
    constexpr int a_bytes = (operand_bytes(ka, M, s) + 1023) / 1024 * 1024, b_bytes = operand_bytes(kb, N, s);
    unsigned char *b = shared + a_bytes;
    uint64_t *bar = (uint64_t *)(b + b_bytes);
    if (threadIdx.x == 0) {
        kl_mbar_init(bar, 1);
        kl_mbar_init_fence();
        kl_mbar_expect(bar, b_bytes + (ka == REGISTERS ? 0 : operand_bytes(ka, M, s)));
        if (ka != REGISTERS)
            load_operand(shared, &map_a, ka, M, s, bar);
        load_operand(b, &map_b, kb, N, s, bar);
    }
    __syncthreads();
    kl_mbar_wait(bar, 0);
    int lane = kl_lane(), warp = (int)threadIdx.x / 32, row = 16 * warp + lane / 4, column = 2 * (lane % 4);
    float c[N / 2];
    uint32_t a[K / 16][4];
    for (int k = 0; k < K / 16; k++)
        for (int i = 0; i < 4; i++)
            a[k][i] = *(const uint32_t *)(a_rows + (row + 8 * (i & 1)) * K + 16 * k + column + 8 * (i >> 1));
    kl_wgmma_fence();
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
        auto go = [&](auto from, auto by) { kl_wgmma<N>(c, from, by, k > 0); };
        auto with = [&](auto by) {
            if constexpr (ka == REGISTERS)
                go((const uint32_t *)a[k], by);
            else if constexpr (ka == ROWS)
                go(rows_at(shared, 16 * k, M, s), by);
            else
                go(columns_at(shared, 16 * k, s), by);
        };
        if constexpr (kb == ROWS)
            with(rows_at(b, 16 * k, N, s));
        else
            with(columns_at(b, 16 * k, s));
    }
    kl_wgmma_commit();
    kl_wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++)
        out[(row + 8 * (i % 4 / 2)) * N + 8 * (i / 4) + column + i % 2] = c[i];
}

/* x is [count x K] in rows, [K x count] in columns. */
static float element(const std::vector<uint16_t> &x, operand_kind kind, int count, int i, int k)
{
    return kl_bf16_to_f32(x[(size_t)(kind == COLUMNS ? k * count + i : i * K + k)]);
}

static kl_tensor_map describe(const uint16_t *x, operand_kind kind, int count, kl_swizzle s)
{
    kl_tensor_shape t;
    t.size[0] = kind == COLUMNS ? count : K;
    t.size[1] = kind == COLUMNS ? K : count;
    t.stride[1] = t.size[0];
    t.box[0] = kl_swizzle_bytes(s) / 2;
    t.box[1] = (int)t.size[1];
    t.swizzle = s;
    kl_tensor_map map;
    assert_ok(kl_tensor_describe(&map, "operand", x, t));
    return map;
}

template <int N, operand_kind ka, operand_kind kb, kl_swizzle s = KL_SWIZZLE_128> static void check_product()
{
    mirrored<uint16_t> a(M * K), b(N * K);
    mirrored<float> c(M * N);
    fill(a.host);
    fill(b.host);
    b.host[3] = kl_f32_to_bf16(5.0f);
    a.send();
    b.send();
    kl_grid g;
    g.shared = (size_t)((operand_bytes(ka, M, s) + 1023) / 1024 * 1024 + operand_bytes(kb, N, s) + 16);
    assert_ok(kl_launch(ctx, "multiply", g, multiply<N, ka, kb, s>, describe(a.device, ka, M, s), describe(b.device, kb, N, s),
                        (const uint16_t *)a.device, c.device));
    c.fetch();
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++)
                sum += element(a.host, ka, M, i, k) * element(b.host, kb, N, j, k);
            if (!(c.host[(size_t)(i * N + j)] == sum))
                fail_msg("N %d, a %d, b %d, swizzle %d: c[%d][%d]: expected %g, got %g", N, (int)ka, (int)kb, (int)s, i, j, (double)sum,
                         (double)c.host[(size_t)(i * N + j)]);
        }
}

static void operands_are_read_as_copies_leave_them(void **)
{
    if (!ctx)
        skip();
    check_product<64, ROWS, ROWS>();
    check_product<128, REGISTERS, COLUMNS>();
    check_product<192, ROWS, COLUMNS>();
    check_product<256, COLUMNS, ROWS>();
    check_product<128, COLUMNS, COLUMNS>();
    check_product<176, REGISTERS, ROWS>();
    check_product<8, ROWS, ROWS>();
    check_product<64, ROWS, ROWS, KL_SWIZZLE_64>();
    check_product<64, COLUMNS, COLUMNS, KL_SWIZZLE_64>();
    check_product<32, REGISTERS, COLUMNS, KL_SWIZZLE_32>();
    check_product<32, ROWS, ROWS, KL_SWIZZLE_32>();
}

int main()
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_box_is_copied_whatever_its_shape),
        cmocka_unit_test(a_box_goes_to_all_blocks_of_a_cluster),
        cmocka_unit_test(wrong_descriptions_are_refused),
        cmocka_unit_test(operands_are_read_as_copies_leave_them),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
