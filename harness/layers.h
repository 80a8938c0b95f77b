/* The operations around the three families: norms, embedding, gated unit, projections, loss, optimizers. Each is a variant
 * of the family "layers", one row an operation and device, and its problem says which operation it is.
 *
 * On a device all tensors, ids and targets too, lie in its memory; types are BF16 or F32 where a dtype stands, float where
 * not. Gradients of activations overwrite, of parameters accumulate.
 *
 * Legend: T packed tokens, D hidden, I width of the unit, N and K outputs and inputs of a projection. Strides: elements from
 * row to row, 0: dense. Products take bfloat16 operands: what is float is rounded into the workspace first. */
#ifndef KL_HARNESS_LAYERS_H
#define KL_HARNESS_LAYERS_H

#include "common/dtype.h"
#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum layers_op {
    LAYERS_RMSNORM = 0, LAYERS_EMBED, LAYERS_SWIGLU, LAYERS_LINEAR, LAYERS_MLP, LAYERS_HEAD_LOSS, LAYERS_ADAMW, LAYERS_MUON, LAYERS_SUMSQ, LAYERS_OPS
} layers_op;

/* sum = x + add;  y = sum (mean sum^2 + eps)^-1/2 (.) weight.  Without add, sum is x and not written. */
typedef struct layers_rmsnorm {
    int64_t T, D;
    float eps;
    kl_dtype x_dtype, y_dtype, weight_dtype; /* of x, add, sum, dsum, dx; of y, dy */
    int64_t x_stride, y_stride;              /* of the same */
    const void *x;                           /* [T,D] */
    const void *add;                         /* [T,D]; NULL: none */
    void *sum;                               /* [T,D], may be x; backward reads it instead of x and add */
    const void *weight;                      /* [D] */
    void *y;                                 /* [T,D] */
} layers_rmsnorm;
typedef struct layers_rmsnorm_grads {
    const void *dy;   /* [T,D] */
    const void *dsum; /* [T,D] that comes to sum from elsewhere; NULL: none */
    void *dx;         /* [T,D] of sum, hence of x and of add; may be dsum; NULL: not wanted */
    float *dweight;   /* [D]; NULL: not wanted */
} layers_rmsnorm_grads;

/* y[t] = weight[ids[t]].  An id that is none of 0 .. vocab-1 gives NaN, and no gradient. */
typedef struct layers_embed {
    int64_t T, D, vocab;
    kl_dtype dtype, weight_dtype;
    const int32_t *ids; /* [T] */
    const void *weight; /* [vocab,D] */
    void *y;            /* [T,D] */
} layers_embed;
typedef struct layers_embed_grads {
    const void *dy; /* [T,D] */
    float *dweight; /* [vocab,D] */
} layers_embed_grads;

/* y = silu(gate) (.) up.  gate and up may be halves of one matrix: in_stride 2 I. */
typedef struct layers_swiglu {
    int64_t T, I;
    kl_dtype dtype;
    int64_t in_stride; /* of gate, up and their gradients */
    const void *gate, *up; /* [T,I] */
    void *y;           /* [T,I]; backward: made anew when not NULL */
} layers_swiglu;
typedef struct layers_swiglu_grads {
    const void *dy;    /* [T,I] */
    void *dgate, *dup; /* [T,I], may be gate and up */
} layers_swiglu_grads;

/* y = x weight^T (+ y when it accumulates).  Several projections of one x are one, their weights stacked: its rows of y
 * hold the projections side by side. */
typedef struct layers_linear {
    int64_t T, N, K;
    kl_dtype x_dtype, y_dtype, weight_dtype; /* of x and dx; of y and dy */
    int64_t x_stride, y_stride;
    bool accumulate;
    const void *x;      /* [T,K] */
    const void *weight; /* [N,K] */
    void *y;            /* [T,N] */
} layers_linear;
typedef struct layers_linear_grads {
    const void *dy; /* [T,N] */
    void *dx;       /* [T,K]; NULL: not wanted */
    float *dweight; /* [N,K]; NULL: not wanted */
    bool accumulate; /* dx += */
} layers_linear_grads;

/* hidden = x gate_up^T = [gate | up];  y = (silu(gate) (.) up) down^T.  The weights of gate and up are stacked. */
typedef struct layers_mlp {
    int64_t T, D, I;
    kl_dtype dtype, weight_dtype;
    const void *x;       /* [T,D] */
    const void *gate_up; /* [2I,D] */
    const void *down;    /* [D,I] */
    void *hidden;        /* [T,2I]; backward reads it */
    void *y;             /* [T,D] */
} layers_mlp;
typedef struct layers_mlp_grads {
    const void *dy;  /* [T,D] */
    void *dx;        /* [T,D]; NULL: not wanted */
    float *dgate_up; /* [2I,D]; NULL: not wanted */
    float *ddown;    /* [D,I]; NULL: not wanted */
    bool accumulate; /* dx += */
} layers_mlp_grads;

/* loss[t] = -log softmax(x[t] weight^T)[targets[t]], 0 where the target is negative; logits are never held for more than a
 * tile of tokens. The backward pass gives losses and gradients at once, of grad_scale times the sum of the losses. */
typedef struct layers_head_loss {
    int64_t T, D, vocab;
    kl_dtype x_dtype, weight_dtype;
    float grad_scale;
    const void *x;          /* [T,D] */
    const void *weight;     /* [vocab,D] */
    const int32_t *targets; /* [T], below vocab */
    float *loss;            /* [T]; NULL: not wanted */
    double *sum;            /* [2]: the sum of the losses, and how many targets counted; NULL: not wanted */
} layers_head_loss;
typedef struct layers_head_loss_grads {
    void *dx;       /* [T,D]; NULL: not wanted */
    float *dweight; /* [vocab,D]; NULL: not wanted */
} layers_head_loss_grads;

/* *sum = the sum of x^2, in double and in a fixed order (+ *sum when it accumulates). */
typedef struct layers_sumsq {
    int64_t n;
    kl_dtype dtype;
    bool accumulate;
    const void *x; /* [n] */
    double *sum;
} layers_sumsq;

/* Gradients are scaled by clip / norm first where the norm, the root of *sumsq, is larger; NULL: never. So clipping needs no
 * word from the host.
 *     m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
 *     w = w - lr ( (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps) + decay w ) */
typedef struct layers_adamw {
    int64_t n, step;
    double lr, beta1, beta2, eps, decay, clip;
    const double *sumsq;
    kl_dtype g_dtype;
    float *w, *m, *v; /* [n] */
    const void *g;    /* [n] */
    uint16_t *copy;   /* [n] the new w in bfloat16; NULL: not wanted */
} layers_adamw;

/* Jordan's Muon with the scale of Moonlight, so that AdamW's learning rate serves:
 *     m = momentum m + g;  u = g + momentum m (Nesterov)
 *     X = u / |u|;  steps times  X = a X + (b A + c A A) X,  A = X X^T
 *     w = w - lr ( 0.2 sqrt(max(rows, columns)) X + decay w ) */
typedef struct layers_muon {
    int64_t rows, columns;
    int64_t count; /* of such matrices, one behind the other, each made orthogonal by itself; 0: one */
    double lr, momentum, decay, clip;
    int steps; /* 0: 5 */
    const double *sumsq;
    kl_dtype g_dtype;
    float *w, *m;   /* [count,rows,columns] */
    const void *g;  /* [count,rows,columns] */
    uint16_t *copy; /* [count,rows,columns]; NULL: not wanted */
} layers_muon;
#define LAYERS_MUON_A 3.4445
#define LAYERS_MUON_B (-4.7750)
#define LAYERS_MUON_C 2.0315
#define LAYERS_MUON_SCALE 0.2
enum { LAYERS_MUON_STEPS = 5 };

typedef struct layers_problem {
    layers_op op;
    union {
        layers_rmsnorm rmsnorm;
        layers_embed embed;
        layers_swiglu swiglu;
        layers_linear linear;
        layers_mlp mlp;
        layers_head_loss head_loss;
        layers_adamw adamw;
        layers_muon muon;
        layers_sumsq sumsq;
    };
} layers_problem;
typedef union layers_grads {
    layers_rmsnorm_grads rmsnorm;
    layers_embed_grads embed;
    layers_swiglu_grads swiglu;
    layers_linear_grads linear;
    layers_mlp_grads mlp;
    layers_head_loss_grads head_loss;
} layers_grads;

const char *layers_name(layers_op op); /* "rmsnorm", ..., also of its variants */
bool layers_has_backward(layers_op op);

/* The registered variants, and the one for an operation on a device; NULL: none. */
const kl_variant *layers_variants(int *count);
const kl_variant *layers_pick(kl_device device, layers_op op);

/* Sizes, types, strides and pointers; grads NULL: a forward pass. Ids and targets are not looked at. */
kl_status layers_validate(const kl_ctx *ctx, const layers_problem *p, const layers_grads *g);

/* The tensors of a problem: what each is called and is for, and the field that points to it. One list for verify, bench and
 * the tests. */
typedef enum layers_role { LAYERS_INPUT, LAYERS_UPDATED, LAYERS_OUTPUT, LAYERS_GRADIENT } layers_role;
typedef struct layers_tensor {
    const char *name;
    void *field;     /* of type T **; it may hold NULL: not there */
    layers_role role;
    kl_dtype dtype;
    int64_t rows, columns, stride;
    kl_pass first, last; /* the passes that touch it */
    bool accumulates;    /* a gradient that is added to */
    bool optional;
} layers_tensor;
enum { LAYERS_TENSORS = 10 };
int layers_tensors(layers_problem *p, layers_grads *g, layers_tensor list[LAYERS_TENSORS]);

#ifdef __cplusplus
}
#endif
#endif
