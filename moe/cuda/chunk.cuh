/* What the chunk form's files share. */
#ifndef KL_MOE_CUDA_CHUNK_CUH
#define KL_MOE_CUDA_CHUNK_CUH

#include "moe/cuda/moe_cuda.cuh"
#include "moe/internal.h"

/* y_t = (y_t where there is a shared expert) + sum_k weight_tk row[row_of_tk], in order of choice. */
kl_status moe_device_combine(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t count, const int *row_of, const float *weight, const uint16_t *row);

#endif
