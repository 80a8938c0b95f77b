/* What the chunk form's files share. */
#ifndef KL_MOE_CUDA_CHUNK_CUH
#define KL_MOE_CUDA_CHUNK_CUH

#include "moe/cuda/moe_cuda.cuh"
#include "moe/internal.h"

/* Rows of x that one tensor copy takes. */
enum { MOE_BOX = 8 };

/* What becomes of the sums, and which side of the weights the sums run along. */
enum moe_kind {
    MOE_PLAIN,      /* y[r,i] = w[i,:] x[r,:] */
    MOE_SWIGLU,     /* of two weights: y = silu(w1 x) (.) w3 x */
    MOE_TRANSPOSED, /* y[r,j] = w[:,j] x[r,:] */
};

struct moe_product {
    kl_tensor_map weight;     /* (column, row of eight, which of two, eight rows, expert) */
    int eights;               /* eight rows that a box has: of the weights' 128, or of the 64 that a stage sums over */
    const uint16_t *x;        /* [x_rows,K] */
    const int *token;         /* row r is x[token[r]]; NULL: x[r] */
    int x_rows;
    kl_tensor_map x_map;      /* of x; set by the launch */
    uint16_t *y;              /* [rows,width] */
    const moe_group *group;   /* NULL: one expert has all rows */
    const int *groups;        /* how many */
    int rows, tile;           /* of that one expert */
    int K, width, across;     /* blocks of weights over width */
    bool up_first;            /* the second of the two weights lies first */
};

/* How the rows of some experts are cut. Few rows an expert: a block has its own weights. Many: pairs of blocks share them. */
struct moe_tiling {
    bool few;
    int blocks, most;
};
moe_tiling moe_tiling_of(int64_t rows, int64_t experts);
/* The tile of `rows` rows that are all of one expert. */
int moe_tile_of(const moe_tiling &cut, int64_t rows);
kl_status moe_device_product(const kl_ctx *ctx, const char *name, const moe_product &p, moe_kind kind, bool few);

/* y_t = (y_t where there is a shared expert) + sum_k weight_tk row[row_of_tk], in order of choice. */
kl_status moe_device_combine(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const int *row_of, const float *weight, const uint16_t *row);

#endif
