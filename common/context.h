/* Everything that outlasts a call lives here, created and owned by the caller. */
#ifndef KL_COMMON_CONTEXT_H
#define KL_COMMON_CONTEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "common/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kl_device { KL_CPU = 0, KL_CUDA } kl_device;

typedef struct kl_ctx_options {
    kl_device device;
    int device_index; /* which accelerator */
    int threads;      /* CPU threads; 0: as many as OpenMP would use */
} kl_ctx_options;

/* Not thread-safe: one context for each host thread that issues work. Fields are read-only to callers. */
typedef struct kl_ctx {
    kl_device device;
    int device_index;
    int threads;
    bool hopper;        /* kernels run there as they were compiled for 9.0: clusters, bulk copies, wgmma */
    size_t shared_most; /* bytes of shared memory that a block may have */
    void *stream; /* cudaStream_t */
    void *blas;   /* products that have been asked for (common/gpu_product.cu) */
} kl_ctx;

/* options may be NULL: CPU, all threads. KL_EDEVICE when the device is not there. */
kl_status kl_ctx_create(kl_ctx **ctx, const kl_ctx_options *options);
void kl_ctx_destroy(kl_ctx *ctx); /* NULL is allowed */
const char *kl_device_name(kl_device device); /* "cpu", "cuda" */

#ifdef __cplusplus
}
#endif
#endif
