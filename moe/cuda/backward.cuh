/* What the backward pass's files share. Inside an expert the gradients of w1 x and w3 x lie eight by eight beside each other. */
#ifndef KL_MOE_CUDA_BACKWARD_CUH
#define KL_MOE_CUDA_BACKWARD_CUH

#include "moe/cuda/chunk.cuh"

/* out_e[i,j] += sum over the rows of expert e of a[r,i] b[r,j] */
struct moe_weight_product {
    const uint16_t *a, *b;        /* [..,I], [..,J] */
    const int *a_token, *b_token; /* row r is row token[r]; NULL: r */
    const int *first;             /* [experts+1]; NULL: one expert has all rows */
    int rows, experts, I, J;
    float *const *out[2];         /* [experts] pointers, NULL: not wanted; two tables: rows of a go eight by eight to the one and the other */
};
kl_status moe_device_weight_product(const kl_ctx *ctx, const char *name, const moe_weight_product &p);

/* Inside an expert, row by row: from a = w1 x and b = w3 x (eight by eight) and dm0 = w2^T dy, weight c,
 *
 *     m = silu(a) (.) b;   dc = dm0 . m;   dm = c dm0;   da = dm (.) b silu'(a);   db = dm (.) silu(a)
 *
 * da and db take the place of a and b, c m that of dm0. */
struct moe_inner_gradients {
    uint16_t *ab, *m;             /* [rows,2 width], [rows,width] */
    const float *weight;          /* [rows]; NULL: 1 */
    float *dc;                    /* [rows]; NULL: not wanted */
    int64_t rows;
    int width;
    bool up_first;
};
kl_status moe_device_inner_gradients(const kl_ctx *ctx, const moe_inner_gradients &g);

/* The router's way back: dc of rows -> gradients of the logits, in the logits' place; then drouter += dl^T x (NULL: not wanted). */
kl_status moe_device_route_back(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r, const moe_device_rows *rows,
                                const float *dc, float *drouter);
/* dx_t = (dx_t where there is a shared expert) + sum_k row[row_of_tk] + router^T dl_t */
kl_status moe_device_combine_back(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const moe_device_routes *r, const int *row_of, const uint16_t *row,
                                  uint16_t *dx);

#endif
