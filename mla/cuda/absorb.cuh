/* The two ends of the absorbed form: queries into the latent space, the weighted latent out of it. */
#ifndef KL_MLA_CUDA_ABSORB_CUH
#define KL_MLA_CUDA_ABSORB_CUH

#include "common/device.cuh"
#include "mla/internal.h"

enum { MLA_R = 512, MLA_DR = 64, MLA_WIDTH = MLA_R + MLA_DR, MLA_MOST_DN = 256 };

/* rows[token H + h][0..576) = scale log2(e) [Wk_h^T q_n | q_r], for all queries of the batch, counted from its first. */
kl_status mla_cuda_absorb(const kl_ctx *ctx, const mla_problem *p, uint16_t *rows);
/* o = Wv_h rows[token H + h][0..512). */
kl_status mla_cuda_project(const kl_ctx *ctx, const mla_problem *p, const uint16_t *rows);

#endif
