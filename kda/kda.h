/* Kimi Delta Attention: the operator, its problem struct and its entry points.
 *
 * Legend: B batch rows, T tokens, N sequences, H query/key heads, HV value heads (a multiple of H; value
 * head i uses query/key head i / (HV/H)), K and V head dimensions, G gate values a head, C chunk.
 * For every sequence and value head, with S [K,V] in float (Kimi Linear report, equation 1):
 *
 *     S <- Diag(e^g) S;   u = beta (v - S^T k);   S <- S + k u^T;   o = S^T (scale q)
 *
 * Tensors are packed token after token; a stride is the distance, in elements, from one token to the
 * next (0: contiguous) and must be at least the width of a token. Heads and channels are contiguous.
 * Inputs are owned by the caller and never written. On the CPU tensors are host memory and float; on CUDA every pointer
 * below is device memory except cu_seqlens, which is host memory on both and is read before the call returns. */
#ifndef KL_KDA_H
#define KL_KDA_H

#include <stdint.h>

#include "common/context.h"
#include "common/dtype.h"
#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KDA_MAX_DIM = 256, KDA_DEFAULT_CHUNK = 64 };

/* How the number in g becomes the natural-log decay of a token. */
typedef enum kda_gate {
    KDA_GATE_LOG = 0,  /* g is the decay, <= 0 */
    KDA_GATE_SOFTPLUS, /* -exp(A_log) softplus(g + dt_bias), softplus linear above 20 */
    KDA_GATE_BOUNDED,  /* lower_bound sigmoid(exp(A_log) (g + dt_bias)) */
} kda_gate;

typedef enum kda_beta {
    KDA_BETA_PLAIN = 0, /* beta as given */
    KDA_BETA_SIGMOID,   /* sigmoid(beta) */
    KDA_BETA_SIGMOID2,  /* 2 sigmoid(beta): negative eigenvalues */
} kda_beta;

typedef enum kda_state_layout {
    KDA_STATE_KV = 0, /* [K,V] */
    KDA_STATE_VK,     /* [V,K], "value first" */
} kda_state_layout;

typedef struct kda_problem {
    /* sizes; any T, N >= 0; K, V in 1..256 */
    int64_t B, T;
    int64_t N;                 /* sequences: B, or what cu_seqlens says */
    int64_t H, HV, K, V;
    int64_t G;                 /* gate values a value head: K (channel), a divisor of K (blocks of K/G), 1 (head: Gated DeltaNet), 0 (none: DeltaNet) */
    const int64_t *cu_seqlens; /* [N+1], host memory, from 0 to T, never decreasing; then B = 1. NULL: N = B sequences of T tokens */

    /* options */
    kl_dtype dtype;            /* of q, k, v, g, beta, o and their gradients */
    kl_dtype state_dtype;      /* of h0 and ht: F32, or BF16 where a variant offers it */
    kda_state_layout state_layout;
    float scale;               /* 0: K^-0.5 */
    kda_gate gate;
    float lower_bound;         /* in [-5, 0), only with KDA_GATE_BOUNDED */
    kda_beta beta_kind;
    bool qk_l2norm;            /* q, k <- x / sqrt(sum x^2 + 1e-6) inside */
    bool no_delta;             /* u = beta v: no erasing (GLA with G = K, Mamba2-like with G = 1) */
    int64_t chunk;             /* tokens a chunk: 16, 32, 64 or 128; 0: KDA_DEFAULT_CHUNK. Recurrent: only the spacing of chunk_states */

    /* inputs */
    const void *q, *k;         /* [B,T,H,K] */
    const void *v;             /* [B,T,HV,V] */
    const void *g;             /* [B,T,HV,G]; NULL when G = 0 */
    const void *beta;          /* [B,T,HV] */
    int64_t q_stride, k_stride, v_stride, g_stride, beta_stride;
    const float *A_log;        /* [HV], SOFTPLUS and BOUNDED */
    const float *dt_bias;      /* [HV,G], SOFTPLUS and BOUNDED; NULL: 0 */

    /* state */
    const void *h0;            /* [N or pool,HV,K,V] in state_layout; NULL: zero */
    void *ht;                  /* same shape; NULL: not wanted. May be h0: updated in place */
    const int64_t *state_index;/* [N]: sequence n reads and writes slot state_index[n] of a pool, all distinct; NULL: n. On CUDA it is
                                * device memory, read when the kernel runs: a sequence whose slot is outside the pool is left out (o unwritten) */
    int64_t state_pool;        /* slots in the pool; 0: N */

    /* outputs */
    void *o;                   /* [B,T,HV,V] */
    int64_t o_stride;
    float *chunk_states;       /* [sum over n of ceil(T_n/C),HV,K,V] in state_layout: the state before each chunk; NULL: not wanted */
    float *token_states;       /* [B*T,HV,K,V] in state_layout: the state after each token; recurrent only; NULL: not wanted */
} kda_problem;

/* Gradients. Any upstream may be NULL (zero); any result may be NULL (not wanted). Gradients of
 * activations and of the state overwrite; those of parameters (dA_log, ddt_bias) accumulate.
 * Strides are those of the forward tensors. */
typedef struct kda_grads {
    const void *d_o;           /* [B,T,HV,V] */
    const float *dht;          /* [N,HV,K,V] in state_layout, never indexed */
    void *dq, *dk, *dv;
    void *dg;                  /* before the gate */
    void *dbeta;               /* before the sigmoid */
    float *dA_log, *ddt_bias;
    float *dh0;                /* [N,HV,K,V] in state_layout, never indexed */
} kda_grads;

/* The fixed order: device, dtype, layout, shape, options. ctx may be NULL: sizes only. */
kl_status kda_validate(const kl_ctx *ctx, const kda_problem *p);
kl_status kda_validate_grads(const kda_problem *p, const kda_grads *g);

const kl_variant *kda_variants(int *count);
/* The row with that name on that device, or NULL; name NULL: what dispatch picks for this shape. */
const kl_variant *kda_pick(kl_device device, const char *name, const kda_problem *p, kl_pass pass);

/* Bytes that kda_forward / kda_backward need. */
size_t kda_workspace(const kl_ctx *ctx, const kda_problem *p, kl_pass pass);
kl_status kda_forward(kl_ctx *ctx, const kda_problem *p, void *workspace, size_t bytes);
kl_status kda_backward(kl_ctx *ctx, const kda_problem *p, const kda_grads *g, void *workspace, size_t bytes);

/* Number of chunks over all sequences: rows of chunk_states. */
int64_t kda_chunk_count(const kda_problem *p);

#ifdef __cplusplus
}
#endif
#endif
