/* The one table that verify, bench, the tests and dispatch walk. A family exports its rows as a
 * constant array (kda_variants() and so on); the problem is that family's problem struct. */
#ifndef KL_COMMON_VARIANT_H
#define KL_COMMON_VARIANT_H

#include <stddef.h>

#include "common/context.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kl_pass { KL_FORWARD = 0, KL_BACKWARD } kl_pass;

/* The minimum that a problem needs: every input read once, every output written once. */
typedef struct kl_cost {
    double flops, bytes;
} kl_cost;

typedef struct kl_variant {
    const char *family; /* "kda", "dplr", "mla", "moe" */
    const char *name;   /* "recurrent", "chunk", ...: unique in its family and device */
    kl_device device;
    const char *summary; /* one line for listings */
    /* Can this variant run this (already valid) problem? KL_EUNSUPPORTED names what it lacks. */
    kl_status (*check)(const void *problem, kl_pass pass);
    /* Bytes of workspace; 0 is a fine answer. */
    size_t (*workspace)(const kl_ctx *ctx, const void *problem, kl_pass pass);
    /* Validate, then run. workspace is 64-byte aligned and at least workspace() bytes. */
    kl_status (*forward)(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
    kl_status (*backward)(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes); /* NULL: none */
    kl_cost (*cost)(const void *problem, kl_pass pass);
} kl_variant;

#ifdef __cplusplus
}
#endif
#endif
