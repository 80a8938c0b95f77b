/* Tensor copies and a warpgroup's matrix unit on the host. Included from common/emulate.h only. */
#include "common/tensor.cuh"

/* Where a swizzled pattern keeps the byte that would lie at p: 16-byte pieces within 128 bytes change places by the 128-byte line. */
template <class T> static inline T *kl_swizzled(T *p, kl_swizzle swizzle)
{
    uintptr_t at = (uintptr_t)p, mask = (1u << swizzle) - 1;
    return (T *)(at ^ (at >> 7 & mask) << 4);
}

/* ---- tensor copies ---- */
struct alignas(64) kl_tensor_map {
    unsigned char *base;
    kl_tensor_shape shape;
};
struct kl_emulated_box {
    const kl_tensor_map *map;
    int64_t at[5];
};
static inline int kl_emulated_box_bytes(const kl_tensor_shape &s)
{
    int elements = 1;
    for (int i = 0; i < s.dims; i++)
        elements *= s.box[i];
    return 2 * elements;
}
/* put(element in global memory or NULL outside, its place in shared memory) for every element of the box. */
template <class Put> void kl_emulated_each(const kl_emulated_box &b, int dims, unsigned char *shared, Put put)
{
    const kl_tensor_shape &s = b.map->shape;
    if (dims != s.dims || (uintptr_t)shared % 128)
        kl_emulated_fail("tensor copy: expected %d coordinates and shared memory at a multiple of 128, got %d and %p", s.dims, dims, (void *)shared);
    for (int d = 0; d < dims; d++)
        if (b.at[d] < 0)
            kl_emulated_fail("tensor copy: coordinate %d is %lld: the hardware takes none below 0", d, (long long)b.at[d]);
    int elements = kl_emulated_box_bytes(s) / 2;
    for (int i = 0; i < elements; i++) {
        int64_t rest = i, offset = 0;
        bool inside = true;
        for (int d = 0; d < dims; d++) {
            int64_t x = b.at[d] + rest % s.box[d];
            rest /= s.box[d];
            inside = inside && x < s.size[d];
            offset += x * (d ? s.stride[d] : 1);
        }
        put(inside ? (uint16_t *)b.map->base + offset : NULL, kl_swizzled((uint16_t *)shared + i, s.swizzle));
    }
}
static inline void kl_emulated_tensor_load(const kl_emulated_box &b, int dims, void *shared, uint64_t *bar)
{
    kl_emulated_each(b, dims, (unsigned char *)shared, [](const uint16_t *global, uint16_t *to) { *to = global ? *global : 0; });
    kl_emulated_bytes(bar, kl_emulated_box_bytes(b.map->shape));
}
static inline void kl_emulated_tensor_multicast(const kl_emulated_box &b, int dims, void *shared, uint64_t *bar, uint16_t blocks)
{
    for (int rank = 0; rank < 16; rank++)
        if (blocks >> rank & 1)
            kl_emulated_tensor_load(b, dims, kl_emulated_peer(shared, rank), (uint64_t *)kl_emulated_peer(bar, rank));
}
static inline void kl_emulated_tensor_store(const kl_emulated_box &b, int dims, const void *shared)
{
    if (b.map->shape.size[0] % 8)
        kl_emulated_fail("tensor store: rows of %lld elements: the hardware writes whole 16 bytes", (long long)b.map->shape.size[0]);
    kl_emulated_each(b, dims, (unsigned char *)shared, [](uint16_t *global, const uint16_t *from) {
        if (global)
            *global = *from;
    });
}
#define KL_TENSOR_WORDS(dims)                                                                                                              \
    static inline void kl_tensor_load(void *shared, const kl_tensor_map *map, KL_INTS##dims, uint64_t *bar)                                \
    {                                                                                                                                      \
        kl_emulated_tensor_load({map, {KL_COORDINATES##dims}}, dims, shared, bar);                                                         \
    }                                                                                                                                      \
    static inline void kl_tensor_load_multicast(void *shared, const kl_tensor_map *map, KL_INTS##dims, uint64_t *bar, uint16_t blocks)     \
    {                                                                                                                                      \
        kl_emulated_tensor_multicast({map, {KL_COORDINATES##dims}}, dims, shared, bar, blocks);                                            \
    }                                                                                                                                      \
    static inline void kl_tensor_store(const kl_tensor_map *map, const void *shared, KL_INTS##dims)                                        \
    {                                                                                                                                      \
        kl_emulated_tensor_store({map, {KL_COORDINATES##dims}}, dims, shared);                                                             \
    }
#define KL_COORDINATES2 x0, x1
#define KL_COORDINATES3 x0, x1, x2
#define KL_COORDINATES4 x0, x1, x2, x3
#define KL_COORDINATES5 x0, x1, x2, x3, x4
KL_TENSOR_WORDS(2)
KL_TENSOR_WORDS(3)
KL_TENSOR_WORDS(4)
KL_TENSOR_WORDS(5)
#undef KL_TENSOR_WORDS
static inline void kl_tensor_prefetch(const kl_tensor_map *) {}

/* ---- a warpgroup's matrix unit: each warp does its 16 rows ---- */
struct kl_operand {
    const unsigned char *shared;
    int along_k, along_n;
    kl_swizzle swizzle;
    float get(int k, int n) const
    {
        int row = swizzle ? kl_swizzle_bytes(swizzle) : 16;
        return kl_bf16_to_f32(*kl_swizzled((const uint16_t *)(shared + k / 8 * along_k + n / 8 * along_n + n % 8 * row) + k % 8, swizzle));
    }
};
struct kl_operand_n {
    const unsigned char *shared;
    int panel;
    kl_swizzle swizzle;
    float get(int k, int n) const
    {
        int row = kl_swizzle_bytes(swizzle);
        return kl_bf16_to_f32(*kl_swizzled((const uint16_t *)(shared + n / (row / 2) * panel + k * row) + n % (row / 2), swizzle));
    }
};
static inline kl_operand kl_operand_of(const void *shared, int along_k, int along_n)
{
    if ((uintptr_t)shared % 16 || along_k % 16 || along_n % 16)
        kl_emulated_fail("operand: expected an address and strides that are multiples of 16");
    return {(const unsigned char *)shared, along_k, along_n, KL_SWIZZLE_NONE};
}
static inline void kl_emulated_pattern(const void *shared, int panel, kl_swizzle swizzle)
{
    int pattern = 8 * kl_swizzle_bytes(swizzle);
    if (swizzle == KL_SWIZZLE_NONE || (uintptr_t)shared % (size_t)pattern || panel % pattern)
        kl_emulated_fail("operand: expected swizzled rows from a multiple of %d bytes on, panels of such a multiple", pattern);
}
static inline kl_operand kl_operand_rows(const void *shared, kl_swizzle swizzle = KL_SWIZZLE_128)
{
    kl_emulated_pattern(shared, 0, swizzle);
    return {(const unsigned char *)shared, 16, 8 * kl_swizzle_bytes(swizzle), swizzle};
}
static inline kl_operand_n kl_operand_columns(const void *shared, int panel, kl_swizzle swizzle = KL_SWIZZLE_128)
{
    kl_emulated_pattern(shared, panel, swizzle);
    return {(const unsigned char *)shared, panel, swizzle};
}
static inline kl_operand kl_operand_at(kl_operand x, int bytes) { return x.shared += bytes, x; }
static inline kl_operand_n kl_operand_at(kl_operand_n x, int bytes) { return x.shared += bytes, x; }

/* a [16 x 16] of this warp: from the registers of its lanes, or from shared memory, where all 64 rows are. */
template <class A> struct kl_wgmma_a {
    A operand;
    static void get(float a[16][16], kl_wgmma_a *const lane[32])
    {
        int first = (int)threadIdx.x / 32 % 4 * 16;
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < 16; k++)
                a[row][k] = lane[0]->operand.get(k, first + row);
    }
};
template <> struct kl_wgmma_a<const uint32_t *> {
    const uint32_t *operand;
    static void get(float a[16][16], kl_wgmma_a *const lane[32])
    {
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++)
                    a[l / 4 + 8 * (i & 1)][2 * (l % 4) + h + 8 * (i >> 1)] = kl_bf16_to_f32((uint16_t)(lane[l]->operand[i] >> (16 * h)));
    }
};
template <class A, class B> struct kl_wgmma_args : kl_wgmma_a<A> {
    B b;
    float *c;
};
template <int N, class A, class B> void kl_emulated_wgmma(float *c, A a, B b, bool add)
{
    static_assert(N <= 192 ? N % 8 == 0 : N % 16 == 0 && N <= 256, "N: a multiple of 8, of 16 beyond 192");
    if (!kl_emulated_hopper)
        kl_emulated_fail("wgmma: expected a device of 9.0");
    using arguments = kl_wgmma_args<A, B>;
    arguments m = {{a}, b, c};
    for (int i = 0; i < N / 2 && !add; i++)
        c[i] = 0.0f;
    kl_emulated_collective("wgmma", 0xffffffffu, &m, [](void *args[32], uint32_t) {
        float rows[16][16];
        kl_wgmma_a<A> *lane[32];
        for (int l = 0; l < 32; l++)
            lane[l] = (arguments *)args[l];
        kl_wgmma_a<A>::get(rows, lane);
        B b = ((arguments *)args[0])->b;
        for (int n = 0; n < N; n++) {
            float column[16];
            for (int k = 0; k < 16; k++)
                column[k] = b.get(k, n);
            for (int row = 0; row < 16; row++) {
                float sum = 0.0f;
                for (int k = 0; k < 16; k++)
                    sum += rows[row][k] * column[k];
                ((arguments *)args[row % 8 * 4 + n % 8 / 2])->c[n / 8 * 4 + row / 8 * 2 + n % 2] += sum;
            }
        }
    });
}
static inline const uint32_t *kl_wgmma_operand(const uint32_t *a) { return a; }
static inline kl_operand kl_wgmma_operand(kl_operand x) { return x; }
static inline kl_operand_n kl_wgmma_operand(kl_operand_n x) { return x; }
template <int N, class A, class B> static inline void kl_wgmma(float *c, const A &a, const B &b, bool add)
{
    kl_emulated_wgmma<N>(c, kl_wgmma_operand(a), kl_wgmma_operand(b), add);
}
template <int N, bool add = true, class A, class B> static inline void kl_wgmma(float *c, const A &a, const B &b)
{
    kl_wgmma<N>(c, a, b, add);
}
template <class T> static inline void kl_pin(T &) {}
static inline void kl_wgmma_fence() {}
static inline void kl_wgmma_commit() {}
template <int left> static inline void kl_wgmma_wait() {}
