/* The gated norm: what a problem may be, and which device computes it. */
#include "kda/internal.h"

static kl_status validate(const kl_ctx *ctx, const kda_gated_norm_problem *p)
{
    KL_REQUIRE(p, "gated_norm: problem: expected a pointer, got NULL");
    KL_REQUIRE(p->dtype == KL_F32 || p->dtype == KL_BF16, "gated_norm: dtype: expected float32 or bfloat16, got %s", kl_dtype_name(p->dtype));
    if (ctx->device == KL_CPU && p->dtype != KL_F32)
        return kl_error(KL_EUNSUPPORTED, "gated_norm: dtype: expected float32 on cpu, got %s", kl_dtype_name(p->dtype));
    KL_REQUIRE(p->weight_dtype == KL_F32 || p->weight_dtype == KL_BF16 || p->weight_dtype == KL_F16,
               "gated_norm: weight_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->weight_dtype));
    int64_t elements;
    KL_REQUIRE(p->V >= 1 && p->V <= KDA_NORM_WIDTH, "gated_norm: V: expected 1..%d, got %lld", KDA_NORM_WIDTH, (long long)p->V);
    KL_REQUIRE(p->rows >= 0 && !__builtin_mul_overflow(p->rows, p->V * 4, &elements), "gated_norm: rows: expected 0 or more, got %lld",
               (long long)p->rows);
    KL_REQUIRE(p->gate_kind == KDA_OUT_SIGMOID || p->gate_kind == KDA_OUT_SWISH || p->gate_kind == KDA_OUT_NONE,
               "gated_norm: gate_kind: expected KDA_OUT_SIGMOID (0), SWISH (1) or NONE (2), got %d", (int)p->gate_kind);
    KL_REQUIRE(p->eps >= 0.0f && isfinite(p->eps), "gated_norm: eps: expected a number >= 0, got %g", (double)p->eps);
    KL_REQUIRE(p->rows == 0 || p->x, "gated_norm: x: expected [rows,V], got NULL");
    KL_REQUIRE(p->weight, "gated_norm: weight: expected [V], got NULL");
    bool gated = p->gate_kind != KDA_OUT_NONE;
    KL_REQUIRE(!gated || p->rows == 0 || p->gate, "gated_norm: gate: expected [rows,V] with this gate_kind, got NULL");
    KL_REQUIRE(gated || !p->gate, "gated_norm: gate: expected NULL with KDA_OUT_NONE");
    return kl_ok();
}

size_t kda_gated_norm_workspace(const kl_ctx *ctx, const kda_gated_norm_problem *p, kl_pass pass)
{
    (void)p, (void)pass;
    return KDA_ON_DEVICE(ctx, 0, kda_cuda_gated_norm_workspace(p, pass));
}

kl_status kda_gated_norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p)
{
    KL_REQUIRE(ctx, "gated_norm: ctx: expected a context, got NULL");
    KL_TRY(validate(ctx, p));
    KL_REQUIRE(p->rows == 0 || p->y, "gated_norm: y: expected [rows,V], got NULL");
    return KDA_ON_DEVICE(ctx, kda_cpu_gated_norm_forward(ctx, p), kda_cuda_gated_norm_forward(ctx, p));
}

kl_status kda_gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g)
{
    KL_REQUIRE(ctx, "gated_norm: ctx: expected a context, got NULL");
    KL_TRY(validate(ctx, p));
    KL_REQUIRE(g, "gated_norm: grads: expected a pointer, got NULL");
    KL_REQUIRE(p->rows == 0 || g->dy, "gated_norm: dy: expected [rows,V], got NULL");
    KL_REQUIRE(p->gate || !g->dgate, "gated_norm: dgate: expected NULL with KDA_OUT_NONE");
    KL_TRY(kda_validate_workspace("gated_norm", p->workspace, p->workspace_bytes, kda_gated_norm_workspace(ctx, p, KL_BACKWARD)));
    return KDA_ON_DEVICE(ctx, kda_cpu_gated_norm_backward(ctx, p, g), kda_cuda_gated_norm_backward(ctx, p, g));
}
