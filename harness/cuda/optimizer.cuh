/* What the optimizers share. */
#ifndef KL_HARNESS_CUDA_OPTIMIZER_CUH
#define KL_HARNESS_CUDA_OPTIMIZER_CUH

#include "harness/cuda/cells.cuh"

/* clip / norm where the norm is larger, otherwise 1. */
__device__ __forceinline__ float kl_clip(const double *sumsq, double clip)
{
    if (!sumsq)
        return 1.0f;
    float norm = sqrtf((float)*sumsq);
    return norm > (float)clip ? (float)clip / norm : 1.0f;
}

#endif
