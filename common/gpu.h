/* Devices, their memory, their streams and their clocks, for the harness and the tests; kernels are launched by
 * common/device.cuh. Compiled from gpu.cu with a toolkit, from gpu_absent.c without one, and from gpu_emulated.cc when
 * the kernels run on the host (make EMULATE=1); callers cannot tell but by the answers. */
#ifndef KL_COMMON_GPU_H
#define KL_COMMON_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/context.h"
#include "common/dtype.h"
#include "common/status.h"

#ifdef __cplusplus
extern "C" {
#endif

bool kl_gpu_compiled(void);           /* was a CUDA toolkit there at build time? */
bool kl_gpu_emulated(void);           /* are kernels run on the host, for tests only? */
int kl_gpu_count(void);               /* usable devices; 0 without driver or device */
const char *kl_gpu_toolkit(void);     /* "13.0", or "none" */
void kl_gpu_describe(int index, char *text, size_t size); /* "NVIDIA H100 80GB HBM3, sm_90" or why not */
kl_status kl_gpu_check(int index);    /* KL_EDEVICE naming what is missing, or ok */
int kl_gpu_multiprocessors(const kl_ctx *ctx);

/* Launches that an emulated device has run, one entry a name with the most shared memory that any asked for; false beyond
 * the last, and on a real device. */
bool kl_gpu_launched(int i, const char **name, size_t *shared);
/* What an emulated device shall pretend to be: compute capability (90: 9.0), bytes of memory, and whether it runs what is
 * launched or only checks that it could. For contexts created from then on. */
void kl_gpu_emulate(int capability, size_t memory, bool runs);
/* Can a device of that capability run a build for these architectures (CUDA_ARCHS: 900 is 9.0's own code, others what everything from them
 * on can run)? *hopper: as it was compiled for 9.0. Names what is missing. */
kl_status kl_gpu_check_capability(int index, int capability, const int *archs, int count, bool *hopper);
/* KL_EUNSUPPORTED naming `who` and the device, unless kernels run there as compiled for 9.0. */
kl_status kl_gpu_require_hopper(const kl_ctx *ctx, const char *who);

/* The context's stream, what the device offers, and what is kept of cuBLASLt; called by kl_ctx_create and kl_ctx_destroy. */
kl_status kl_gpu_open(kl_ctx *ctx);
void kl_gpu_close(kl_ctx *ctx);
void kl_gpu_products_close(kl_ctx *ctx);

/* Device memory, 256-byte aligned; bytes may be 0. KL_ENOMEM says how much was asked for and how much is free. */
kl_status kl_gpu_alloc(const kl_ctx *ctx, void **memory, size_t bytes);
void kl_gpu_free(const kl_ctx *ctx, void *memory);
kl_status kl_gpu_memory(const kl_ctx *ctx, size_t *free_bytes, size_t *total_bytes);
/* On the stream, between any two places; done when it returns. */
kl_status kl_gpu_copy(const kl_ctx *ctx, void *dst, const void *src, size_t bytes);
kl_status kl_gpu_move(const kl_ctx *ctx, void *dst, const void *src, size_t bytes); /* within the device; does not wait */
kl_status kl_gpu_fill(const kl_ctx *ctx, void *dst, int byte, size_t bytes); /* does not wait */
/* Waits for the stream; reports what any kernel before it did wrong. */
kl_status kl_gpu_sync(const kl_ctx *ctx);

/* Two marks on the stream and the time between them. */
typedef struct kl_gpu_clock kl_gpu_clock;
kl_status kl_gpu_clock_create(const kl_ctx *ctx, kl_gpu_clock **clock);
void kl_gpu_clock_destroy(kl_gpu_clock *clock);
kl_status kl_gpu_clock_start(const kl_ctx *ctx, kl_gpu_clock *clock);
kl_status kl_gpu_clock_stop(const kl_ctx *ctx, kl_gpu_clock *clock, double *seconds); /* waits */

/* What is launched between begin and end is recorded, not run; a graph replays it. */
typedef struct kl_gpu_graph kl_gpu_graph;
kl_status kl_gpu_graph_begin(const kl_ctx *ctx);
kl_status kl_gpu_graph_end(const kl_ctx *ctx, kl_gpu_graph **graph); /* also after a failure in between: then *graph is NULL */
kl_status kl_gpu_graph_launch(const kl_ctx *ctx, kl_gpu_graph *graph);
void kl_gpu_graph_destroy(kl_gpu_graph *graph);

/* y [M,N] = alpha a b + beta c: a [M,K] and b [K,N] bfloat16, or stored the other way round; c and y (which may be one)
 * bfloat16 or float; rows `stride` elements apart; sums in float. Through cuBLASLt, which is asked once a shape for the way to
 * do it; the answer is kept in the context. KL_EUNSUPPORTED without the library. */
typedef struct kl_product {
    int64_t M, N, K;
    int64_t a_stride, b_stride, y_stride;
    bool a_transposed, b_transposed; /* a is stored [K,M], b [N,K] */
    kl_dtype y_dtype;
    int64_t count;                           /* of such products, one behind the other; 0: one */
    int64_t a_next, b_next, y_next;          /* elements from one to the next */
    bool scattered;                          /* instead a, b and y are tables on the device of `count` addresses, multiples of 16; beta is 0 */
} kl_product;
enum { KL_PRODUCT_WORKSPACE = 32 << 20 };
kl_status kl_gpu_product(kl_ctx *ctx, const kl_product *shape, float alpha, const void *a, const void *b, float beta, const void *c,
                         void *y, void *workspace, size_t bytes);

/* keys [n] below 2^bits into ascending order, equal ones as they stood; values [n] go with them. */
size_t kl_gpu_sort_workspace(const kl_ctx *ctx, int64_t n, int bits);
kl_status kl_gpu_sort(kl_ctx *ctx, int64_t n, int bits, const uint32_t *keys, uint32_t *sorted, const int32_t *values, int32_t *order,
                      void *workspace, size_t bytes);

/* A named range on the profiler's time line (NVTX); no more than a label elsewhere. */
void kl_gpu_range_push(const char *name);
void kl_gpu_range_pop(void);

#ifdef __cplusplus
}

/* A range that ends with its scope. */
struct kl_range {
    explicit kl_range(const char *name) { kl_gpu_range_push(name); }
    ~kl_range() { kl_gpu_range_pop(); }
    kl_range(const kl_range &) = delete;
};
#endif
#endif
