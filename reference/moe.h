/* Mixture of experts, token by token: a router chooses top_k of E experts, a shared expert is always added.
 *
 *   l = W_router x,   s = sigmoid(l) or softmax(l),   chosen = the top_k of s + bias
 *   weight_e = scaling s_e / (sum over chosen of s + 1e-20)      (not divided when renormalize = 0)
 *   y = sum over chosen of weight_e w2_e( silu(w1_e x) * w3_e x ) + the shared expert, ungated and unscaled
 *
 * Groups: the experts are cut into n_group runs of E/n_group; a group's score is the sum of its two best s + bias; only experts of the
 * topk_group best groups can be chosen. Among equals the lowest index wins. The bias takes part in the choice alone and has no gradient. */
#ifndef REFERENCE_MOE_H
#define REFERENCE_MOE_H

#include "reference/real.h"

typedef enum { REF_ROUTER_SIGMOID, REF_ROUTER_SOFTMAX } ref_router_kind;

typedef struct {
    int64_t T, D, E, I;        /* tokens, hidden size, experts (0 = the shared one alone), width of an expert */
    int64_t Is;                /* width of the shared expert, 0 = there is none */
    int64_t top_k;             /* at most topk_group * E/n_group */
    int64_t n_group;           /* divides E; 0 or 1 = no groups */
    int64_t topk_group;
    ref_router_kind router;
    int renormalize;
    int biased_weights;        /* 1: the weights are made of s + bias too, as the shipped remote code does */
    real scaling;              /* routed_scaling_factor; 0 means 1 */
    const real *x;             /* [T,D] */
    const real *w_router;      /* [E,D] */
    const real *bias;          /* [E], NULL = 0 */
    const real *const *w1;     /* [E] pointers to [I,D] (gate) */
    const real *const *w2;     /* [E] pointers to [D,I] (down) */
    const real *const *w3;     /* [E] pointers to [I,D] (up) */
    const real *s1, *s3;       /* [Is,D] shared expert, not read when Is = 0 */
    const real *s2;            /* [D,Is] */
} ref_moe;

/* The router alone: ids [T,top_k], the best expert first, and weights [T,top_k]. Returns 0, or -1 when out of memory. */
int ref_moe_route(const ref_moe *p, int64_t *ids, real *weights);

/* y [T,D], overwritten. Returns 0, or -1 when out of memory. */
int ref_moe_forward(const ref_moe *p, real *y);

typedef struct {
    real *dx;                  /* [T,D]; this and the following may be NULL */
    real *dw_router;           /* [E,D] */
    real *const *dw1;          /* [E] pointers to [I,D] */
    real *const *dw2;          /* [E] pointers to [D,I] */
    real *const *dw3;          /* [E] pointers to [I,D] */
    real *ds1, *ds3;           /* [Is,D] */
    real *ds2;                 /* [D,Is] */
} ref_moe_grad;

/* dy [T,D]; adds to the gradients in d. Returns 0, or -1 when out of memory. */
int ref_moe_backward(const ref_moe *p, const real *dy, const ref_moe_grad *d);

#endif
