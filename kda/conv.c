/* The short convolution: what a problem may be, and which device computes it. */
#include "kda/internal.h"

static kl_status validate(const kl_ctx *ctx, const kda_conv_problem *p)
{
    KL_REQUIRE(p, "conv: problem: expected a pointer, got NULL");
    KL_REQUIRE(p->dtype == KL_F32 || p->dtype == KL_BF16, "conv: dtype: expected float32 or bfloat16, got %s", kl_dtype_name(p->dtype));
    if (ctx->device == KL_CPU && p->dtype != KL_F32)
        return kl_error(KL_EUNSUPPORTED, "conv: dtype: expected float32 on cpu, got %s", kl_dtype_name(p->dtype));
    KL_REQUIRE(p->weight_dtype == KL_F32 || p->weight_dtype == KL_BF16 || p->weight_dtype == KL_F16,
               "conv: weight_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->weight_dtype));
    KL_REQUIRE(p->tail_dtype == KL_F32 || p->tail_dtype == KL_BF16, "conv: tail_dtype: expected float32 or bfloat16, got %s",
               kl_dtype_name(p->tail_dtype));
    KL_REQUIRE(p->D >= 1, "conv: D: expected 1 or more channels, got %lld", (long long)p->D);
    KL_REQUIRE(p->x_stride == 0 || p->x_stride >= p->D, "conv: x_stride: expected 0 or at least D = %lld, got %lld", (long long)p->D,
               (long long)p->x_stride);
    KL_REQUIRE(p->y_stride == 0 || p->y_stride >= p->D, "conv: y_stride: expected 0 or at least D = %lld, got %lld", (long long)p->D,
               (long long)p->y_stride);
    KL_TRY(kda_validate_sequences("conv", p->B, p->T, p->N, p->cu_seqlens));
    KL_REQUIRE(p->W >= 1 && p->W <= KDA_CONV_TAPS, "conv: W: expected 1..%d taps, got %lld", KDA_CONV_TAPS, (long long)p->W);
    int64_t widest = p->D > p->x_stride ? p->D : p->x_stride, tokens, elements;
    widest = widest > p->y_stride ? widest : p->y_stride;
    KL_REQUIRE(!__builtin_mul_overflow(p->B, p->T, &tokens) && !__builtin_mul_overflow(tokens, widest, &elements) &&
                   !__builtin_mul_overflow(elements, 4, &elements),
               "conv: B T: expected tensors of less than 2^63 bytes, got B = %lld, T = %lld", (long long)p->B, (long long)p->T);
    for (int64_t n = 0; ctx->device == KL_CPU && p->state_index && n < p->N; n++)
        KL_REQUIRE(p->state_index[n] >= 0 && (p->state_pool == 0 || p->state_index[n] < p->state_pool),
                   "conv: state_index[%lld]: expected a slot of the pool, got %lld", (long long)n, (long long)p->state_index[n]);
    KL_REQUIRE(p->weight, "conv: weight: expected [D,W], got NULL");
    KL_REQUIRE(tokens == 0 || p->x, "conv: x: expected [B,T,D], got NULL");
    return kl_ok();
}

size_t kda_conv_workspace(const kl_ctx *ctx, const kda_conv_problem *p, kl_pass pass)
{
    (void)p, (void)pass;
    return KDA_ON_DEVICE(ctx, 0, kda_cuda_conv_workspace(p, pass));
}

kl_status kda_conv_forward(kl_ctx *ctx, const kda_conv_problem *p)
{
    KL_REQUIRE(ctx, "conv: ctx: expected a context, got NULL");
    KL_TRY(validate(ctx, p));
    KL_REQUIRE(p->B * p->T == 0 || (p->y && p->y != p->x), "conv: y: expected memory of its own, got %s", p->y ? "x" : "NULL");
    KL_TRY(kda_validate_workspace("conv", p->workspace, p->workspace_bytes, kda_conv_workspace(ctx, p, KL_FORWARD)));
    return KDA_ON_DEVICE(ctx, kda_cpu_conv_forward(ctx, p), kda_cuda_conv_forward(ctx, p));
}

kl_status kda_conv_backward(kl_ctx *ctx, const kda_conv_problem *p, const kda_conv_grads *g)
{
    KL_REQUIRE(ctx, "conv: ctx: expected a context, got NULL");
    KL_TRY(validate(ctx, p));
    KL_REQUIRE(g, "conv: grads: expected a pointer, got NULL");
    KL_REQUIRE(p->B * p->T == 0 || g->dy, "conv: dy: expected [B,T,D], got NULL");
    KL_REQUIRE(p->B * p->T == 0 || g->dx, "conv: dx: expected [B,T,D], got NULL");
    KL_REQUIRE(!p->tail_in || p->tail_in != p->tail_out,
               "conv: tail_out: expected another place than tail_in: a tail updated in place cannot be differentiated");
    KL_TRY(kda_validate_workspace("conv", p->workspace, p->workspace_bytes, kda_conv_workspace(ctx, p, KL_BACKWARD)));
    return KDA_ON_DEVICE(ctx, kda_cpu_conv_backward(ctx, p, g), kda_cuda_conv_backward(ctx, p, g));
}
