/* Sparse mixture of experts with a shared expert; with E = 0 the dense SwiGLU MLP.
 *
 * Legend: T tokens, D hidden, E routed experts, I their inner size, Is the shared expert's inner size.
 *
 *     s = sigmoid(router x) (or softmax);  chosen = top_k of s + bias, within the best topk_group groups;
 *     w_e = s_e / (sum of the chosen s + 1e-20) * scale;
 *     y = sum over chosen of w_e expert_e(x) + shared(x),   expert(x) = w2( silu(w1 x) (.) w3 x )
 *
 * Router in float. Ties: the lowest index wins. A group's score is the sum of its two best s + bias. */
#ifndef KL_MOE_H
#define KL_MOE_H

#include <stdint.h>

#include "common/context.h"
#include "common/dtype.h"
#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum moe_router { MOE_SIGMOID = 0, MOE_SOFTMAX } moe_router;

typedef struct moe_problem {
    int64_t T, D;
    int64_t E, I, top_k;            /* E = 0: no routed experts, then router, w1, w3, w2 are unused */
    int64_t Is;                     /* 0: no shared expert */
    int64_t n_group, topk_group;    /* 0 or 1 group: no grouping */
    moe_router router_kind;
    bool renormalize;
    bool biased_weights;            /* weights from s + bias, as the shipped remote code does */
    float scale;                    /* routed_scaling_factor; 0: 1 */
    kl_dtype dtype;                 /* of x, y and their gradients; CPU: F32 */
    kl_dtype weight_dtype;          /* of the expert and shared weights: F32, BF16, F16 */
    kl_dtype router_dtype;          /* of router */
    const void *x;                  /* [T,D], contiguous */
    const void *router;             /* [E,D] */
    const float *bias;              /* [E], choice only; NULL: 0 */
    const void *const *w1, *const *w3; /* [E] pointers to [I,D]: gate, up */
    const void *const *w2;          /* [E] pointers to [D,I]: down */
    const void *shared_w1, *shared_w3, *shared_w2; /* [Is,D], [Is,D], [D,Is] */
    void *y;                        /* [T,D]; never x */
    int32_t *chosen;                /* [T,top_k] expert ids, best first; NULL: not wanted */
    float *chosen_weight;           /* [T,top_k] combine weights; NULL: not wanted */
} moe_problem;

/* dx overwrites; weight gradients (float) accumulate. NULL: not wanted. The bias has no gradient. */
typedef struct moe_grads {
    const void *dy;                 /* [T,D] */
    void *dx;                       /* [T,D] */
    float *drouter;                 /* [E,D] */
    float *const *dw1, *const *dw3, *const *dw2; /* [E] pointers */
    float *dshared_w1, *dshared_w3, *dshared_w2;
} moe_grads;

kl_status moe_validate(const kl_ctx *ctx, const moe_problem *p);
kl_status moe_validate_grads(const moe_problem *p, const moe_grads *g);

const kl_variant *moe_variants(int *count);
const kl_variant *moe_pick(kl_device device, const char *name, const moe_problem *p, kl_pass pass);

size_t moe_workspace(const kl_ctx *ctx, const moe_problem *p, kl_pass pass);
kl_status moe_forward(kl_ctx *ctx, const moe_problem *p, void *workspace, size_t bytes);
/* Recomputes the forward pass it needs; p->y is not read. */
kl_status moe_backward(kl_ctx *ctx, const moe_problem *p, const moe_grads *g, void *workspace, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
