/* Problems with memory behind them: random ones of a named gate regime, reproducible from a seed, and the golden
 * ones. verify, bench and the tests build them here, run variants on them and score what comes out. */
#ifndef KL_HARNESS_PROBLEM_H
#define KL_HARNESS_PROBLEM_H

#include "common/compare.h"
#include "common/variant.h"
#include "kda/dplr.h"
#include "kda/kda.h"
#include "mla/mla.h"
#include "moe/moe.h"

typedef enum kl_family { KL_FAMILY_KDA = 0, KL_FAMILY_DPLR, KL_FAMILY_MLA, KL_FAMILY_MOE } kl_family;

/* Decays (natural log, a token), and what goes with them. */
typedef enum kl_regime {
    KL_REGIME_STRONG = 0, /* -5 sigmoid(N(0,1)) in every channel */
    KL_REGIME_SLOW,       /* uniform in (-0.01, 0), keys with cosine 0.8, beta near 0.95 */
    KL_REGIME_MIXED,      /* the first third of each head's channels slow, the others strong */
    KL_REGIME_ZERO,       /* none. From here on: the log gate only, and no name to ask for */
    KL_REGIME_FIVE,       /* -5 in every channel */
    KL_REGIME_EXTREME,    /* -60 on some channels of each head, 0 on the others */
    KL_REGIME_THOUSAND,   /* -1000 on some tokens, strong on the others */
    KL_REGIMES
} kl_regime;
const char *kl_regime_name(kl_regime r);
kl_status kl_regime_parse(const char *name, kl_regime *r);

/* One tensor that a variant writes. */
typedef struct kl_case_tensor {
    const char *name;  /* "o", "ht", "dq", ... */
    float *out;        /* [T,H,D] */
    double *want;      /* [T,H,D], the right answer; NULL: not known yet */
    int64_t T, H, D;   /* how it is cut for scoring: heads, and windows of time */
    bool gradient;     /* written by the backward pass */
    bool accumulates;  /* cleared before a run; the others are poisoned with NaN */
    double *terms;     /* [T,H,D], of a sum that may cancel: its terms' absolute values added up; NULL: not such a sum */
} kl_case_tensor;

enum { KL_CASE_TENSORS = 12, KL_SCORE_WINDOW = 64 };

/* How the tensors of a case lie in a device's memory. On the host they are float and dense whatever stands here. */
typedef struct kl_placement {
    kl_dtype dtype;       /* of activations and their gradients */
    kl_dtype state_dtype; /* of h0 and ht */
    int64_t gap;          /* elements between a token and the next */
    bool pool;            /* states in a pool, through state_index */
    bool in_place;        /* ht is h0 */
} kl_placement;

/* A problem of any family, and its gradients. */
typedef union kl_any_problem {
    kda_problem kda;
    dplr_problem dplr;
    mla_problem mla;
    moe_problem moe;
} kl_any_problem;
typedef union kl_any_grads {
    kda_grads kda;
    mla_grads mla;
    moe_grads moe;
} kl_any_grads;

typedef struct kl_case {
    kl_family family;
    char name[192];
    kl_tolerance tolerance;
    bool backward;     /* gradients are set up */
    bool correlated;   /* keys close together under slow decay: the triangular system is ill-conditioned */
    kl_placement place;
    struct kl_image *image; /* the case in a device's memory; NULL: not there */
    kl_any_problem problem;
    kl_any_grads grads;
    int count;
    kl_case_tensor tensor[KL_CASE_TENSORS];
    void *memory;      /* the one block behind every pointer */
    size_t bytes;      /* of inputs, outputs and gradients, without the wanted values */
} kl_case;

/* Random KDA. Sizes that are 0: B 1, HV = H, V = K, G = K (G = -1: none), N = B. */
typedef struct kl_kda_spec {
    int64_t B, T, H, HV, K, V, G, chunk;
    const int64_t *lengths; /* packed sequences (then B = 1 and T is their sum); NULL: B rows of T */
    int64_t sequences;
    kl_regime regime;
    kda_gate gate;
    kda_beta beta_kind;
    kda_state_layout state_layout;
    bool qk_l2norm, no_delta;
    bool state;             /* an initial state and, backward, a gradient of the final one */
    bool chunk_states, token_states; /* outputs too */
    bool backward;
    bool blank;             /* inputs are left for the caller to fill */
    uint64_t seed;
} kl_kda_spec;
kl_status kl_case_kda(kl_case *c, const kl_kda_spec *s);

/* The same recurrence as a general DPLR problem: a = k e^g, b = -beta k, beta k in the place of k, a head of q and k
 * for each value head. Forward only; the wanted values come along. Needs KDA_GATE_LOG, KDA_BETA_PLAIN, no norm inside. */
kl_status kl_case_dplr(kl_case *c, const kl_case *kda);

/* Golden KDA data: one sequence with its outputs and gradients, as tests/golden/README.md says. */
kl_status kl_case_kda_golden(kl_case *c, const char *path);

/* Random MLA: N sequences (0: 1) of T keys each, the last Tq of them queries (0: all); or of lengths[n] keys. */
typedef struct kl_mla_spec {
    int64_t N, T, Tq, H, R, Dn, Dr, Dv;
    const int64_t *lengths;
    kl_dtype latent_dtype, weight_dtype;
    bool backward;
    bool given;             /* the backward pass shall be given o and lse */
    uint64_t seed;
} kl_mla_spec;
kl_status kl_case_mla(kl_case *c, const kl_mla_spec *s);
/* What a forward pass has left in the case's tensors becomes what the backward pass is given, if it shall be given any. On a device
 * after kl_case_upload, which is done again. */
kl_status kl_case_give(kl_case *c);

/* Random MoE. No token stands within 1e-4 of another choice of experts, so that rounding cannot change the choice. */
typedef struct kl_moe_spec {
    int64_t T, D, E, I, top_k, Is, n_group, topk_group;
    moe_router router_kind;
    bool renormalize, biased_weights;
    float scale;
    kl_dtype weight_dtype;
    bool backward;
    uint64_t seed;
} kl_moe_spec;
kl_status kl_case_moe(kl_case *c, const kl_moe_spec *s);

/* Says how the case shall lie on a device: rounds its inputs to the types asked for, so that every variant and the
 * reference get the same numbers, and sets the tolerance. Where that changes an input, *changed is set and the wanted
 * values are forgotten. */
kl_status kl_case_place(kl_case *c, const kl_placement *place, bool *changed);
/* Makes room for the case in the context's device. */
kl_status kl_case_upload(const kl_ctx *ctx, kl_case *c);
/* The problem as a variant on that device takes it: on CUDA, after kl_case_upload, with device pointers. */
const void *kl_case_problem(const kl_case *c, kl_device device);

void kl_case_free(kl_case *c);

/* The registered variants of a family. */
const kl_variant *kl_family_variants(kl_family f, int *count);
const char *kl_family_name(kl_family f);

/* Memory for a variant's workspace, kept between calls: a block on the host and one on a device. */
typedef struct kl_scratch {
    void *memory;      /* the block that the last kl_scratch_for chose, and the bytes that it asked for */
    size_t bytes;
    void *host, *device;
    size_t host_room, device_room;
    const kl_ctx *ctx; /* of the block on the device */
} kl_scratch;
kl_status kl_scratch_for(kl_scratch *s, const kl_ctx *ctx, const kl_variant *v, const kl_case *c, kl_pass pass);
void kl_scratch_free(kl_scratch *s);

/* NaN into everything that the pass must write, zero into what it adds to. */
void kl_case_poison(kl_case *c, kl_pass pass);
/* One call of the variant, nothing else; on a device it may not have run when this returns. */
kl_status kl_case_call(kl_ctx *ctx, const kl_case *c, const kl_variant *v, kl_pass pass, kl_scratch *s);
/* Poison outputs and workspace, call, and see that nothing was written beyond the workspace; on a device also that
 * neither inputs nor what lies between the tokens nor other slots of the pool were. */
kl_status kl_case_run(kl_ctx *ctx, kl_case *c, const kl_variant *v, kl_pass pass, kl_scratch *s);
/* What the last run wrote becomes what is wanted; with it go the terms of sums that may cancel. */
kl_status kl_case_keep(kl_case *c, kl_pass pass);
/* ||out - want|| / ||want||, NaN when anything is not finite, of sums that may cancel as kl_rel_err_sums has it; blocks: the worst head and
 * window of 64 tokens. */
double kl_case_error(const kl_case_tensor *t);
double kl_case_error_blocks(const kl_case_tensor *t);
/* The worst kl_case_error of a pass, and which tensor it was (tensor may be NULL). */
double kl_case_worst(const kl_case *c, kl_pass pass, const char **tensor);

#endif
