/* The matrix unit of a warpgroup (sm_90a): four warps, the first one's number a multiple of 4, do each of these together.
 * Included from common/device_ptx.cuh only. */

/* An operand in shared memory that has k on one side and n (of the other operand: m) on the other; what follows says n for both.
 * kl_operand: 16 bytes hold 8 values of k of one n. kl_operand_n: 16 bytes hold 8 values of n of one k. */
struct kl_operand {
    uint64_t descriptor;
};
struct kl_operand_n {
    uint64_t descriptor;
};
__device__ __forceinline__ uint64_t kl_descriptor_of(const void *shared, int leading, int stride, int swizzle)
{
    return (uint64_t)(kl_shared_address(shared) >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)(swizzle ? 4 - swizzle : 0) << 62;
}
/* 8 x 8 core matrices of 128 bytes: 8 columns of 16 bytes, 8 values of k each. Bytes from one core to the next along k and along
 * n, multiples of 16. */
__device__ __forceinline__ kl_operand kl_operand_of(const void *shared, int along_k, int along_n)
{
    return {kl_descriptor_of(shared, along_k, along_n, KL_SWIZZLE_NONE)};
}
/* Rows as a swizzled kl_tensor_load leaves them, from a multiple of 8 rows on. Row n holds 16, 32 or 64 values of k (32, 64 or 128 bytes),
 * rows follow one another; 16 values of k further: kl_operand_at(x, 32), while the row lasts. */
__device__ __forceinline__ kl_operand kl_operand_rows(const void *shared, kl_swizzle swizzle = KL_SWIZZLE_128)
{
    return {kl_descriptor_of(shared, 16, 8 * kl_swizzle_bytes(swizzle), swizzle)};
}
/* Row k holds 16, 32 or 64 values of n; `panel` bytes further begin the rows of the next n. 16 values of k further: kl_operand_at by 16 rows. */
__device__ __forceinline__ kl_operand_n kl_operand_columns(const void *shared, int panel, kl_swizzle swizzle = KL_SWIZZLE_128)
{
    return {kl_descriptor_of(shared, panel, 8 * kl_swizzle_bytes(swizzle), swizzle)};
}
__device__ __forceinline__ kl_operand kl_operand_at(kl_operand x, int bytes) { return {x.descriptor + (uint64_t)(int64_t)(bytes >> 4)}; }
__device__ __forceinline__ kl_operand_n kl_operand_at(kl_operand_n x, int bytes) { return {x.descriptor + (uint64_t)(int64_t)(bytes >> 4)}; }

/* The names of the first 4, 8, ... operands of an assembler text, and the sums that they stand for. */
#define KL_TEXT_4 "%0,%1,%2,%3"
#define KL_TEXT_8 KL_TEXT_4 ",%4,%5,%6,%7"
#define KL_TEXT_12 KL_TEXT_8 ",%8,%9,%10,%11"
#define KL_TEXT_16 KL_TEXT_12 ",%12,%13,%14,%15"
#define KL_TEXT_20 KL_TEXT_16 ",%16,%17,%18,%19"
#define KL_TEXT_24 KL_TEXT_20 ",%20,%21,%22,%23"
#define KL_TEXT_28 KL_TEXT_24 ",%24,%25,%26,%27"
#define KL_TEXT_32 KL_TEXT_28 ",%28,%29,%30,%31"
#define KL_TEXT_36 KL_TEXT_32 ",%32,%33,%34,%35"
#define KL_TEXT_40 KL_TEXT_36 ",%36,%37,%38,%39"
#define KL_TEXT_44 KL_TEXT_40 ",%40,%41,%42,%43"
#define KL_TEXT_48 KL_TEXT_44 ",%44,%45,%46,%47"
#define KL_TEXT_52 KL_TEXT_48 ",%48,%49,%50,%51"
#define KL_TEXT_56 KL_TEXT_52 ",%52,%53,%54,%55"
#define KL_TEXT_60 KL_TEXT_56 ",%56,%57,%58,%59"
#define KL_TEXT_64 KL_TEXT_60 ",%60,%61,%62,%63"
#define KL_TEXT_68 KL_TEXT_64 ",%64,%65,%66,%67"
#define KL_TEXT_72 KL_TEXT_68 ",%68,%69,%70,%71"
#define KL_TEXT_76 KL_TEXT_72 ",%72,%73,%74,%75"
#define KL_TEXT_80 KL_TEXT_76 ",%76,%77,%78,%79"
#define KL_TEXT_84 KL_TEXT_80 ",%80,%81,%82,%83"
#define KL_TEXT_88 KL_TEXT_84 ",%84,%85,%86,%87"
#define KL_TEXT_92 KL_TEXT_88 ",%88,%89,%90,%91"
#define KL_TEXT_96 KL_TEXT_92 ",%92,%93,%94,%95"
#define KL_TEXT_100 KL_TEXT_96 ",%96,%97,%98,%99"
#define KL_TEXT_104 KL_TEXT_100 ",%100,%101,%102,%103"
#define KL_TEXT_108 KL_TEXT_104 ",%104,%105,%106,%107"
#define KL_TEXT_112 KL_TEXT_108 ",%108,%109,%110,%111"
#define KL_TEXT_116 KL_TEXT_112 ",%112,%113,%114,%115"
#define KL_TEXT_120 KL_TEXT_116 ",%116,%117,%118,%119"
#define KL_TEXT_124 KL_TEXT_120 ",%120,%121,%122,%123"
#define KL_TEXT_128 KL_TEXT_124 ",%124,%125,%126,%127"
#define KL_FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define KL_SUMS_4 KL_FOUR(0)
#define KL_SUMS_8 KL_SUMS_4, KL_FOUR(4)
#define KL_SUMS_12 KL_SUMS_8, KL_FOUR(8)
#define KL_SUMS_16 KL_SUMS_12, KL_FOUR(12)
#define KL_SUMS_20 KL_SUMS_16, KL_FOUR(16)
#define KL_SUMS_24 KL_SUMS_20, KL_FOUR(20)
#define KL_SUMS_28 KL_SUMS_24, KL_FOUR(24)
#define KL_SUMS_32 KL_SUMS_28, KL_FOUR(28)
#define KL_SUMS_36 KL_SUMS_32, KL_FOUR(32)
#define KL_SUMS_40 KL_SUMS_36, KL_FOUR(36)
#define KL_SUMS_44 KL_SUMS_40, KL_FOUR(40)
#define KL_SUMS_48 KL_SUMS_44, KL_FOUR(44)
#define KL_SUMS_52 KL_SUMS_48, KL_FOUR(48)
#define KL_SUMS_56 KL_SUMS_52, KL_FOUR(52)
#define KL_SUMS_60 KL_SUMS_56, KL_FOUR(56)
#define KL_SUMS_64 KL_SUMS_60, KL_FOUR(60)
#define KL_SUMS_68 KL_SUMS_64, KL_FOUR(64)
#define KL_SUMS_72 KL_SUMS_68, KL_FOUR(68)
#define KL_SUMS_76 KL_SUMS_72, KL_FOUR(72)
#define KL_SUMS_80 KL_SUMS_76, KL_FOUR(76)
#define KL_SUMS_84 KL_SUMS_80, KL_FOUR(80)
#define KL_SUMS_88 KL_SUMS_84, KL_FOUR(84)
#define KL_SUMS_92 KL_SUMS_88, KL_FOUR(88)
#define KL_SUMS_96 KL_SUMS_92, KL_FOUR(92)
#define KL_SUMS_100 KL_SUMS_96, KL_FOUR(96)
#define KL_SUMS_104 KL_SUMS_100, KL_FOUR(100)
#define KL_SUMS_108 KL_SUMS_104, KL_FOUR(104)
#define KL_SUMS_112 KL_SUMS_108, KL_FOUR(108)
#define KL_SUMS_116 KL_SUMS_112, KL_FOUR(112)
#define KL_SUMS_120 KL_SUMS_116, KL_FOUR(116)
#define KL_SUMS_124 KL_SUMS_120, KL_FOUR(120)
#define KL_SUMS_128 KL_SUMS_124, KL_FOUR(124)

/* m64 x N x k16 with `sums` numbers a thread, and the names of the seven operands after those; a from registers, a from shared memory.
 * a_n, b_n: does 16 bytes hold values of n (of m)? */
#define KL_WGMMA(N, sums, x0, x1, x2, x3, x4, x5, x6)                                                                                   \
    template <> struct kl_wgmma_of<N> {                                                                                                 \
        template <bool a_n, bool b_n> static __device__ __forceinline__ void run(float *c, const uint32_t a[4], uint64_t b, int add)    \
        {                                                                                                                               \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #x5 ", 0; "                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" KL_TEXT_##sums "}, "                              \
                         "{%" #x0 ",%" #x1 ",%" #x2 ",%" #x3 "}, %" #x4 ", p, 1, 1, %" #x6 "; }"                                        \
                         : KL_SUMS_##sums : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(b_n));                    \
        }                                                                                                                               \
        template <bool a_n, bool b_n> static __device__ __forceinline__ void run(float *c, uint64_t a, uint64_t b, int add)             \
        {                                                                                                                               \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #x2 ", 0; "                                                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" KL_TEXT_##sums "}, "                              \
                         "%" #x0 ", %" #x1 ", p, 1, 1, %" #x3 ", %" #x4 "; }"                                                           \
                         : KL_SUMS_##sums : "l"(a), "l"(b), "r"(add), "n"(a_n), "n"(b_n));                                              \
        }                                                                                                                               \
    };
template <int N> struct kl_wgmma_of;
KL_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
KL_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
KL_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18)
KL_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
KL_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26)
KL_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
KL_WGMMA(56, 28, 28, 29, 30, 31, 32, 33, 34)
KL_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
KL_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42)
KL_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
KL_WGMMA(88, 44, 44, 45, 46, 47, 48, 49, 50)
KL_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
KL_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58)
KL_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
KL_WGMMA(120, 60, 60, 61, 62, 63, 64, 65, 66)
KL_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
KL_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74)
KL_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
KL_WGMMA(152, 76, 76, 77, 78, 79, 80, 81, 82)
KL_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
KL_WGMMA(168, 84, 84, 85, 86, 87, 88, 89, 90)
KL_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
KL_WGMMA(184, 92, 92, 93, 94, 95, 96, 97, 98)
KL_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
KL_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
KL_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
KL_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
KL_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef KL_WGMMA

template <class T> constexpr bool kl_is_operand_n = false;
template <> constexpr bool kl_is_operand_n<kl_operand_n> = true;
__device__ __forceinline__ const uint32_t *kl_wgmma_operand(const uint32_t *a) { return a; }
__device__ __forceinline__ uint64_t kl_wgmma_operand(kl_operand x) { return x.descriptor; }
__device__ __forceinline__ uint64_t kl_wgmma_operand(kl_operand_n x) { return x.descriptor; }

/* c [64 x N] += a [64 x 16] b [16 x N] (=, without add), N a multiple of 8, of 16 beyond 192: warp w of the four holds rows 16 w .. 16 w + 15 of c as for
 * kl_mma, in N / 8 pieces of four; a likewise (uint32_t[4]), or in shared memory, all 64 rows. b: kl_operand or kl_operand_n.
 * Asynchronous: kl_wgmma_fence() before the first after ordinary code wrote c or a, kl_wgmma_commit() after the last,
 * kl_wgmma_wait before c is read or a is written again. Products in flight on the same c have the same N. What ordinary stores
 * put into shared memory needs kl_fence_async_shared() by those who stored it, then a barrier. */
template <int N, class A, class B> __device__ __forceinline__ void kl_wgmma(float *c, const A &a, const B &b, bool add)
{
    kl_wgmma_of<N>::template run<kl_is_operand_n<A>, kl_is_operand_n<B>>(c, kl_wgmma_operand(a), kl_wgmma_operand(b), add);
}
template <int N, bool add = true, class A, class B> __device__ __forceinline__ void kl_wgmma(float *c, const A &a, const B &b)
{
    kl_wgmma<N>(c, a, b, add);
}
/* The compiler may neither compute x later than here nor use it earlier: for what products in flight read or write. */
__device__ __forceinline__ void kl_pin(float &x) { asm volatile("" : "+f"(x) :: "memory"); }
__device__ __forceinline__ void kl_pin(uint32_t &x) { asm volatile("" : "+r"(x) :: "memory"); }
template <class T, int count> __device__ __forceinline__ void kl_pin(T (&x)[count])
{
#pragma unroll
    for (int i = 0; i < count; i++)
        kl_pin(x[i]);
}
__device__ __forceinline__ void kl_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void kl_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left> __device__ __forceinline__ void kl_wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(left) : "memory"); }
