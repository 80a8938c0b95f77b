/* What a tensor copy is described by, on hardware and emulated. Included by the words of common/device.cuh. */
#ifndef KL_COMMON_TENSOR_CUH
#define KL_COMMON_TENSOR_CUH

/* How rows of 2^(swizzle + 4) bytes lie in shared memory: piece i of 16 bytes of a row at i ^ (number of its 128-byte line, modulo
 * 2^swizzle), counted from address 0, so that a column of 8 rows meets all banks. The matrix unit reads such rows as they lie. */
enum kl_swizzle { KL_SWIZZLE_NONE = 0, KL_SWIZZLE_32, KL_SWIZZLE_64, KL_SWIZZLE_128 };
constexpr __host__ __device__ int kl_swizzle_bytes(kl_swizzle s) { return 16 << s; }

/* A bf16 tensor in global memory and the box that one copy moves; index 0 is the column, the innermost. */
struct kl_tensor_shape {
    int dims = 2;            /* 2 to 5 */
    int64_t size[5] = {};    /* elements; outside of them boxes read zeros and write nothing */
    int64_t stride[5] = {};  /* elements from one to the next, multiples of 8; [0] is not read */
    int box[5] = {};         /* elements, at most 256; with a swizzle box[0] fills a row */
    kl_swizzle swizzle = KL_SWIZZLE_128;
};

/* The parameters of a copy's words, by the number of dimensions. */
#define KL_INTS2 int x0, int x1
#define KL_INTS3 KL_INTS2, int x2
#define KL_INTS4 KL_INTS3, int x3
#define KL_INTS5 KL_INTS4, int x4

#endif
