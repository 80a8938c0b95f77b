/* What the files of the family share: sizes and addresses with the problem's defaults resolved, the checks of a call, and the
 * functions behind the rows of the variant table. No part of the contract. */
#ifndef KL_MLA_INTERNAL_H
#define KL_MLA_INTERNAL_H

#include <math.h>

#include "common/arena.h"
#include "mla/mla.h"

static inline int64_t mla_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t mla_max(int64_t a, int64_t b) { return a > b ? a : b; }

static inline float mla_scale(const mla_problem *p)
{
    return p->scale != 0.0f ? p->scale : 1.0f / sqrtf((float)(p->Dn + p->Dr));
}
static inline int64_t mla_q_stride(const mla_problem *p) { return p->q_stride ? p->q_stride : p->H * (p->Dn + p->Dr); }
static inline int64_t mla_queries(const mla_problem *p, int64_t n) { return p->cu_q[n + 1] - p->cu_q[n]; }

/* Elements of one expanded key row: [k (Dn) | pe (Dr) | v (Dv)]. */
static inline int64_t mla_row(const mla_problem *p) { return p->Dn + p->Dr + p->Dv; }

/* The address of element `column` of latent row `row`. */
static inline const void *mla_latent_at(const mla_problem *p, int64_t row, int64_t column)
{
    size_t element = (size_t)row * (size_t)(p->R + p->Dr) + (size_t)column;
    return (const char *)p->latent + element * kl_dtype_size(p->latent_dtype);
}
/* The address of row `row` (0 .. Dn+Dv-1) of the weights of head h, at `column`. */
static inline const void *mla_weight_at(const mla_problem *p, int64_t h, int64_t row, int64_t column)
{
    size_t element = ((size_t)h * (size_t)(p->Dn + p->Dv) + (size_t)row) * (size_t)p->R + (size_t)column;
    return (const char *)p->kv_b + element * kl_dtype_size(p->weight_dtype);
}

/* What mla_rope() and mla_rope_bf16() are asked. */
typedef struct mla_rotation {
    void *x;
    kl_dtype dtype;
    int64_t rows, heads, Dr, row_stride, head_stride;
    const int64_t *position;
    float theta;
    bool inverse;
} mla_rotation;

#ifdef __cplusplus
extern "C" {
#endif

kl_status mla_cpu_rope(kl_ctx *ctx, const mla_rotation *r);
kl_status mla_cuda_rope(kl_ctx *ctx, const mla_rotation *r);

/* mla_validate() without p->o, which a backward pass does not need. */
kl_status mla_validate_inputs(const kl_ctx *ctx, const mla_problem *p);
/* What every CPU entry point checks first: that the context is the cpu's, then the problem. */
kl_status mla_enter_cpu(const kl_ctx *ctx, const mla_problem *p, bool writes_o);
/* The same for CUDA: and that everything is bfloat16, rows are multiples of 16 bytes, and tensors begin at such. */
kl_status mla_enter_cuda(const kl_ctx *ctx, const mla_problem *p, const char *variant, bool writes_o);
/* What of that a variant's check can say of a problem: KL_EUNSUPPORTED names what it lacks. */
kl_status mla_check_bf16(const mla_problem *p, const char *variant);
/* The workspace of a call: present, aligned and large enough. */
kl_status mla_check_workspace(const void *workspace, size_t bytes, size_t needed);
/* Bytes of a carved arena; SIZE_MAX where they do not fit, so that no workspace is ever enough. */
static inline size_t mla_arena_bytes(const kl_arena *a) { return a->overflow ? SIZE_MAX : a->used; }

/* ---- CPU variants ---- */

/* Does the recurrent form run on AMX tiles here, for these sizes? */
bool mla_has_tiles(const mla_problem *p);

size_t mla_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status mla_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);

size_t mla_chunk_forward_workspace(const kl_ctx *ctx, const mla_problem *p);
size_t mla_chunk_backward_workspace(const kl_ctx *ctx, const mla_problem *p);
kl_status mla_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
kl_status mla_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);

/* ---- CUDA variants: bfloat16 queries, latents and weights ---- */

kl_status mla_cuda_recurrent_check(const void *problem, kl_pass pass);
size_t mla_cuda_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status mla_cuda_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);

kl_status mla_cuda_chunk_check(const void *problem, kl_pass pass);
size_t mla_cuda_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status mla_cuda_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
kl_status mla_cuda_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
