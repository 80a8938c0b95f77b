/* Devices, their memory, their streams and their clocks, for the harness and the tests; kernels are launched by
 * common/device.cuh. Compiled from gpu.cu with a toolkit, from gpu_absent.c without one, and from gpu_emulated.cc when
 * the kernels run on the host (make EMULATE=1); callers cannot tell but by the answers. */
#ifndef KL_COMMON_GPU_H
#define KL_COMMON_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/context.h"
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
 * launched or only checks that it could. */
void kl_gpu_emulate(int capability, size_t memory, bool runs);
/* Kernels need bulk copies and clusters in places, so 9.0; the rest is written for 8.0 and later. */
kl_status kl_gpu_check_capability(int index, int capability);

/* The context's stream (and later its cuBLASLt handle); called by kl_ctx_create and kl_ctx_destroy. */
kl_status kl_gpu_open(kl_ctx *ctx);
void kl_gpu_close(kl_ctx *ctx);

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

/* y = a b, bfloat16 matrices [n,n] on the device, float sums: what the device reaches at best. KL_EUNSUPPORTED without cuBLASLt. */
typedef struct kl_gpu_product kl_gpu_product;
kl_status kl_gpu_product_create(const kl_ctx *ctx, kl_gpu_product **product, int64_t n);
kl_status kl_gpu_product_run(const kl_ctx *ctx, const kl_gpu_product *product, void *y, const void *a, const void *b);
void kl_gpu_product_destroy(const kl_ctx *ctx, kl_gpu_product *product);

/* A named range on the profiler's time line (NVTX); no more than a label elsewhere. */
void kl_gpu_range_push(const char *name);
void kl_gpu_range_pop(void);

#ifdef __cplusplus
}
#endif
#endif
