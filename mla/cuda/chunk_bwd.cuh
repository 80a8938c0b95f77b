/* The launches that the chunk backward is made of. */
#ifndef KL_MLA_CUDA_CHUNK_BWD_CUH
#define KL_MLA_CUDA_CHUNK_BWD_CUH

#include "mla/cuda/chunk.cuh"

/* What both gradients read: beside the forward's, do and the statistics. */
struct mla_bwd_reads : mla_reads {
    kl_tensor_map d_o;
    const float2 *stats; /* [Tq, sequences.heads] (lse log2 e, delta) */
};
kl_status mla_describe_bwd(mla_bwd_reads *r, const mla_problem *p, const mla_piece &x, const uint16_t *d_o, const float2 *stats, int queries, int keys);

/* dq of the heads of x. stats [Tq, x.heads]: (lse log2 e, delta). */
kl_status mla_query_gradients(kl_ctx *ctx, const mla_problem *p, const mla_piece &x, const uint16_t *d_o, const float2 *stats, uint16_t *dq);
/* dexpanded [rows, heads, Dn + Dv] and dpe [rows, heads, Dr], each head's share. */
kl_status mla_key_gradients(kl_ctx *ctx, const mla_problem *p, const mla_piece &x, const uint16_t *d_o, const float2 *stats, uint16_t *dexpanded, uint16_t *dpe);

#endif
