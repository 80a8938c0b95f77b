/* What the CPU's MoE files share: the router's decisions, experts as groups of rows, tiles of work. */
#ifndef KL_MOE_CPU_MOE_CPU_H
#define KL_MOE_CPU_MOE_CPU_H

#include "common/arena.h"
#include "common/simd.h"
#include "moe/moe.h"

enum { MOE_TILE_ROWS = 128, MOE_TILE_COLUMNS = 256 };

/* ---- router.c ---- */

/* What the router decided about some tokens. */
typedef struct moe_routes {
    float *score;     /* [tokens,E] logits, then s; the backward pass leaves d logits there */
    float *weight;    /* [tokens,top_k] combine weights */
    float *sum;       /* [tokens] what the chosen scores were divided by */
    int32_t *id;      /* [tokens,top_k] experts, best first */
    float *scratch;   /* [threads, moe_route_scratch] */
} moe_routes;

moe_routes moe_routes_carve(kl_arena *a, const moe_problem *p, int64_t tokens, int threads);

/* Logits of tokens t .. t+rows-1 (rows <= KL_FEW_ROWS) for experts e .. e+experts-1, into score [rows,E]. A token's bits
 * depend on nothing but that token, so that routing never depends on how a prompt is cut or batched. */
void moe_logits(const moe_problem *p, int64_t t, int64_t rows, int64_t e, int64_t experts, float *score);
/* From logits to s, the chosen experts and their weights, for token i of r. */
void moe_choose(const moe_problem *p, const moe_routes *r, int64_t i, int thread);
/* dweight [top_k] of token i of r -> d logits in its row of r->score. */
void moe_choose_backward(const moe_problem *p, const moe_routes *r, int64_t i, const float *dweight, int thread);
/* All of it for tokens t .. t+count-1; also into p->chosen and p->chosen_weight when wanted. */
void moe_route(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_routes *r);
void moe_report(const moe_problem *p, int64_t t, int64_t i, const moe_routes *r);

/* ---- group.c ---- */

/* E = 0 leaves top_k unread. */
static inline int64_t moe_top_k(const moe_problem *p) { return p->E ? p->top_k : 0; }

static inline const void *moe_weight_at(const moe_problem *p, const void *w, int64_t element)
{
    return (const char *)w + (size_t)element * kl_dtype_size(p->weight_dtype);
}

/* An expert, or with e = E the shared one. */
typedef struct moe_expert {
    const void *w1, *w3, *w2; /* [width,D], [width,D], [D,width] */
    int64_t width;
} moe_expert;
moe_expert moe_expert_of(const moe_problem *p, int64_t e);

typedef struct moe_tile {
    int32_t expert;     /* E: shared */
    int32_t row, rows;  /* rows of the sorted list; of the block's tokens for the shared expert */
    int32_t column, columns;
} moe_tile;

/* A block of tokens sorted by expert: row r of the list is token token[r] of the block. */
typedef struct moe_block {
    int64_t t, count;   /* tokens t .. t+count-1 of the problem */
    moe_routes routes;
    int64_t *first;     /* [E+1] expert e has rows first[e] .. first[e+1]-1, in token order */
    int32_t *token;     /* [count top_k] */
    int32_t *row_of;    /* [count,top_k] */
    float *row_weight;  /* [count top_k] */
    moe_tile *inner;    /* tiles of [rows, width of the expert] */
    moe_tile *outer;    /* tiles of [rows, D] */
    int64_t inner_count, outer_count;
    int64_t tile_rows;  /* rows of the largest tile */
} moe_block;

int64_t moe_block_tokens(const moe_problem *p, kl_pass pass);
moe_block moe_block_carve(kl_arena *a, const moe_problem *p, int64_t tokens, int threads);
/* The tokens from t on, as many as a block holds: routed, sorted by expert and cut into tiles. */
void moe_block_take(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t tokens, moe_block *b);
/* Rows of a tile out of source [T,D]: a pointer into it for the shared expert, else a copy in buffer. */
const float *moe_gather(const moe_problem *p, const moe_block *b, const moe_tile *tile, const void *source, float *buffer);

int moe_threads(const kl_ctx *ctx);
/* Is there enough arithmetic in that many tokens to be worth a second thread? */
bool moe_worth_threads(const moe_problem *p, int64_t tokens);

/* ---- the variants ---- */
size_t moe_recurrent_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status moe_recurrent_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
size_t moe_chunk_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status moe_chunk_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
kl_status moe_chunk_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);
size_t moe_chunk_backward_workspace(const kl_ctx *ctx, const moe_problem *p);

/* Validation of the forward entry points. */
kl_status moe_enter_forward(const kl_ctx *ctx, const moe_problem *p);
/* Is the workspace there, large enough and aligned? */
kl_status moe_enter(const void *workspace, size_t bytes, size_t need);

#endif
