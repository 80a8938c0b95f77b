#include "harness/cpu/ops_cpu.h"

const kl_ops kl_ops_cpu = {
    .name = "cpu",
    .alloc = cpu_alloc,
    .release = cpu_release,
    .copy = cpu_copy,
    .zero = cpu_zero,
    .embed = cpu_embed,
    .embed_backward = cpu_embed_backward,
    .linear = cpu_linear,
    .linear_backward = cpu_linear_backward,
    .rmsnorm = cpu_rmsnorm,
    .rmsnorm_backward = cpu_rmsnorm_backward,
    .add = cpu_add,
    .conv = kda_conv_forward,
    .conv_backward = kda_conv_backward,
    .gated_norm = kda_gated_norm_forward,
    .gated_norm_backward = kda_gated_norm_backward,
    .rope = mla_rope,
    .store_latent = cpu_store_latent,
    .head_loss = cpu_head_loss,
    .head_loss_workspace = cpu_head_loss_workspace,
    .adamw = cpu_adamw,
    .sumsq = cpu_sumsq,
};

const kl_ops *kl_ops_for(kl_device device) { return device == KL_CPU ? &kl_ops_cpu : NULL; }
