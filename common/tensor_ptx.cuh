/* The copy engine's tensor copies (sm_90): boxes of a tensor in global memory, described by a kl_tensor_map, to and from shared memory.
 * Included from common/device_ptx.cuh only. */
#include "common/tensor.cuh"

/* Lives in kernel parameters: const __grid_constant__ kl_tensor_map map, or within a struct that is such a parameter. */
struct alignas(128) kl_tensor_map {
    uint64_t opaque[16];
};

/* For 2 to 5 dimensions:
 *
 * kl_tensor_load: the box that begins at (x0, x1, ...), x0 the column, none negative, to shared memory (a multiple of 128, of 1024 for
 * whole patterns of KL_SWIZZLE_128); zeros where it lies beyond the tensor. bar counts the bytes of a whole box.
 * kl_tensor_load_multicast: to the same place in every block of the cluster whose bit is set, each block's own barrier counting.
 * kl_tensor_store: the box back; what lies beyond, by whole 16 bytes of a row, is not written. Grouped and awaited as kl_bulk_store is. */
#define KL_TENSOR_WORDS(dims)                                                                                                             \
    __device__ __forceinline__ void kl_tensor_load(void *shared, const kl_tensor_map *map, KL_INTS##dims, uint64_t *bar)                  \
    {                                                                                                                                     \
        asm volatile("cp.async.bulk.tensor." #dims "d.shared::cluster.global.mbarrier::complete_tx::bytes "                               \
                     "[%0], [%1, {" KL_NAMES##dims "}], [%2];"                                                                            \
                     :: "r"(kl_shared_address(shared)), "l"(map), "r"(kl_shared_address(bar)), "n"(0), KL_VALUES##dims : "memory");       \
    }                                                                                                                                     \
    __device__ __forceinline__ void kl_tensor_load_multicast(void *shared, const kl_tensor_map *map, KL_INTS##dims, uint64_t *bar,        \
                                                             uint16_t blocks)                                                             \
    {                                                                                                                                     \
        asm volatile("cp.async.bulk.tensor." #dims "d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "            \
                     "[%0], [%1, {" KL_NAMES##dims "}], [%2], %3;"                                                                        \
                     :: "r"(kl_shared_address(shared)), "l"(map), "r"(kl_shared_address(bar)), "h"(blocks), KL_VALUES##dims : "memory");  \
    }                                                                                                                                     \
    __device__ __forceinline__ void kl_tensor_store(const kl_tensor_map *map, const void *shared, KL_INTS##dims)                          \
    {                                                                                                                                     \
        asm volatile("cp.async.bulk.tensor." #dims "d.global.shared::cta.bulk_group [%1, {" KL_NAMES##dims "}], [%0];"                    \
                     :: "r"(kl_shared_address(shared)), "l"(map), "n"(0), "n"(0), KL_VALUES##dims : "memory");                            \
    }
#define KL_NAMES2 "%4, %5"
#define KL_NAMES3 KL_NAMES2 ", %6"
#define KL_NAMES4 KL_NAMES3 ", %7"
#define KL_NAMES5 KL_NAMES4 ", %8"
#define KL_VALUES2 "r"(x0), "r"(x1)
#define KL_VALUES3 KL_VALUES2, "r"(x2)
#define KL_VALUES4 KL_VALUES3, "r"(x3)
#define KL_VALUES5 KL_VALUES4, "r"(x4)
KL_TENSOR_WORDS(2)
KL_TENSOR_WORDS(3)
KL_TENSOR_WORDS(4)
KL_TENSOR_WORDS(5)
#undef KL_TENSOR_WORDS

/* Fetches the description itself ahead of its first use. */
__device__ __forceinline__ void kl_tensor_prefetch(const kl_tensor_map *map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }
