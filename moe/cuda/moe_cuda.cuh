/* What the GPU's MoE files share: the router's decisions and the rows that follow from them, in device memory. */
#ifndef KL_MOE_CUDA_MOE_CUDA_CUH
#define KL_MOE_CUDA_MOE_CUDA_CUH

#include "common/arena.h"
#include "common/device.cuh"
#include "common/gpu.h"
#include "moe/moe.h"

/* CHUNK: tokens that one word of bits speaks of. BLOCK_TOKENS: tokens that the workspace holds rows of. */
constexpr int MOE_CHUNK = 32;
constexpr int64_t MOE_BLOCK_TOKENS = 65536;

inline int64_t moe_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Tokens of the block that begins at t. */
inline int64_t moe_block_of(const moe_problem *p, int64_t t) { return p->T - t < MOE_BLOCK_TOKENS ? p->T - t : MOE_BLOCK_TOKENS; }

/* What a router is, for tokens x[0] .. x[T-1]. */
struct moe_router_view {
    int T, D, E, top_k, n_group, topk_group;
    bool softmax, renormalize, biased_weights;
    float scale;
    const uint16_t *x;        /* [T,D] */
    const uint16_t *router;   /* [parts,E,D]: the sum of its parts */
    int parts;
    const float *bias;        /* [E] or NULL */
};

/* What it decided. */
struct moe_device_routes {
    float *logit;             /* [T,E] */
    float *weight, *sum;      /* [T,top_k] combine weights; [T] what the chosen scores were divided by */
    int *id;                  /* [T,top_k] experts, best first */
    uint32_t *mask;           /* [chunks,E] bit t: token 32 chunk + t chose e */
    uint16_t *split;          /* [3,E,D] the router in parts, where its type is not bfloat16 */
};

/* The (token, choice) pairs as rows sorted by expert, tokens in order within an expert. */
struct moe_device_rows {
    int *before;              /* [chunks,E] rows of e that chunks before this one have */
    int *total;               /* [E] */
    int *first;               /* [E+1] expert e has rows first[e] .. first[e+1]-1 */
    int *token;               /* [rows] */
    int *row_of;              /* [T,top_k] */
    float *weight;            /* [rows] */
};

/* Rows of one expert that a cluster takes, `tile` of them a block. */
struct alignas(16) moe_group {
    int expert, row, rows, tile;
};

/* All rows as groups of `blocks` tiles of at most `most` rows. */
struct moe_cut {
    moe_group *group;
    int *groups;              /* how many there are */
    int blocks, most;
};

moe_router_view moe_view_of(const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r);
moe_device_routes moe_device_routes_carve(kl_arena *a, const moe_problem *p, int64_t tokens);
moe_device_rows moe_device_rows_carve(kl_arena *a, const moe_problem *p, int64_t tokens);
moe_cut moe_cut_carve(kl_arena *a, const moe_problem *p, int64_t tokens, int blocks, int most);

/* Logits, choice and weights of tokens t .. t+count-1; also into p->chosen and p->chosen_weight where wanted. */
kl_status moe_device_route(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r);
/* Logits alone; of up to 256 tokens, *cleared becomes 0 too (NULL: nothing does). */
kl_status moe_device_logits(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r, int *cleared);
/* Sorts what was routed, and cuts it. */
kl_status moe_device_group(const kl_ctx *ctx, const moe_problem *p, int64_t count, const moe_device_routes *r, const moe_device_rows *rows, const moe_cut *cut);

/* y, a block of tokens after another: shared(t, count) writes what a shared expert gives, routed(t, count) adds the others to it;
 * 0 where there is neither. */
template <class Shared, class Routed> kl_status moe_each_block(const kl_ctx *ctx, const moe_problem *p, Shared shared, Routed routed)
{
    for (int64_t t = 0; t < p->T; t += MOE_BLOCK_TOKENS) {
        int64_t count = moe_block_of(p, t);
        if (p->Is)
            KL_TRY(shared(t, count));
        if (p->E)
            KL_TRY(routed(t, count));
        else if (!p->Is)
            KL_TRY(kl_gpu_fill(ctx, (uint16_t *)p->y + t * p->D, 0, (size_t)(count * p->D) * sizeof(uint16_t)));
    }
    return kl_ok();
}

#endif
