/* The CPU's operations as variants of the family "layers": float tensors, dense, in host memory. */
#ifndef KL_HARNESS_CPU_LAYERS_CPU_H
#define KL_HARNESS_CPU_LAYERS_CPU_H

#include "harness/layers.h"

size_t layers_cpu_workspace(const kl_ctx *ctx, const void *problem, kl_pass pass);
kl_status layers_cpu_forward(kl_ctx *ctx, const void *problem, void *workspace, size_t bytes);
kl_status layers_cpu_backward(kl_ctx *ctx, const void *problem, const void *grads, void *workspace, size_t bytes);

#endif
