/* The decode step: what it may be, and its plain form, composed of the pieces, for every device and every shape. */
#include "common/arena.h"
#include "kda/decode_layer.h"
#include "kda/internal.h"

/* What lies between the pieces. */
typedef struct buffers {
    char *conv[3], *o;
    char *operator_workspace;
    size_t operator_bytes;
} buffers;

static int64_t width_of(const kda_problem *p, int which) { return which == 2 ? p->HV * p->V : p->H * p->K; }

/* The operator between the buffers. */
static kda_problem operator_of(const kda_decode_problem *p, const buffers *b)
{
    kda_problem k = p->kda;
    k.q = b->conv[0];
    k.k = b->conv[1];
    k.v = b->conv[2];
    k.o = b->o;
    k.q_stride = k.k_stride = k.v_stride = k.o_stride = 0;
    return k;
}

static buffers carve(kl_arena *a, const kl_ctx *ctx, const kda_decode_problem *p)
{
    buffers b;
    size_t tokens = (size_t)(p->kda.B * p->kda.T), size = kl_dtype_size(p->kda.dtype);
    for (int i = 0; i < 3; i++)
        b.conv[i] = kl_arena_take(a, kl_mul(tokens, (size_t)width_of(&p->kda, i), &a->overflow), size);
    b.o = kl_arena_take(a, kl_mul(tokens, (size_t)width_of(&p->kda, 2), &a->overflow), size);
    kda_problem k = operator_of(p, &b);
    b.operator_bytes = kda_pick(ctx->device, "recurrent", &k, KL_FORWARD)->workspace(ctx, &k, KL_FORWARD);
    b.operator_workspace = kl_arena_take(a, b.operator_bytes, 1);
    return b;
}

static bool one_kernel(const kl_ctx *ctx, const kda_decode_problem *p)
{
#ifdef KL_HAVE_CUDA
    return ctx->device == KL_CUDA && kda_cuda_decode_fits(p);
#else
    (void)ctx, (void)p;
    return false;
#endif
}

size_t kda_decode_workspace(const kl_ctx *ctx, const kda_decode_problem *p)
{
    kl_arena a = kl_arena_count();
    if (!one_kernel(ctx, p))
        carve(&a, ctx, p);
    return a.used;
}

static kl_status validate(const kl_ctx *ctx, const kda_decode_problem *p)
{
    KL_REQUIRE(ctx, "decode: ctx: expected a context, got NULL");
    KL_REQUIRE(p, "decode: problem: expected a pointer, got NULL");
    const kda_problem *k = &p->kda;
    kda_problem checked = *k;
    checked.o = p->y;
    KL_TRY(kda_validate(ctx, &checked));
    KL_REQUIRE(!k->cu_seqlens, "decode: cu_seqlens: expected NULL: every sequence has T new tokens");
    KL_REQUIRE(k->h0 && k->h0 == k->ht, "decode: ht: expected h0: the state is updated in place");
    KL_REQUIRE(!k->chunk_states, "decode: chunk_states: expected NULL");
    KL_REQUIRE(!k->token_states, "decode: token_states: expected NULL");
    KL_REQUIRE(p->W >= 1 && p->W <= KDA_CONV_TAPS, "decode: W: expected 1..%d taps, got %lld", KDA_CONV_TAPS, (long long)p->W);
    KL_REQUIRE(p->weight_dtype == KL_F32 || p->weight_dtype == KL_BF16 || p->weight_dtype == KL_F16,
               "decode: weight_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->weight_dtype));
    KL_REQUIRE(p->tail_dtype == KL_F32 || p->tail_dtype == KL_BF16, "decode: tail_dtype: expected float32 or bfloat16, got %s",
               kl_dtype_name(p->tail_dtype));
    for (int i = 0; i < 3; i++) {
        KL_REQUIRE(p->weight[i], "decode: weight[%d]: expected taps, got NULL", i);
        KL_REQUIRE(p->W == 1 || p->tail[i], "decode: tail[%d]: expected a pool, got NULL", i);
    }
    KL_REQUIRE(p->output_gate == KDA_OUT_SIGMOID || p->output_gate == KDA_OUT_SWISH || p->output_gate == KDA_OUT_NONE,
               "decode: output_gate: expected KDA_OUT_SIGMOID (0), SWISH (1) or NONE (2), got %d", (int)p->output_gate);
    KL_REQUIRE(p->norm_weight_dtype == KL_F32 || p->norm_weight_dtype == KL_BF16 || p->norm_weight_dtype == KL_F16,
               "decode: norm_weight_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->norm_weight_dtype));
    KL_REQUIRE(p->eps >= 0.0f && isfinite(p->eps), "decode: eps: expected a number >= 0, got %g", (double)p->eps);
    KL_REQUIRE(p->norm_weight, "decode: norm_weight: expected [V], got NULL");
    bool gated = p->output_gate != KDA_OUT_NONE;
    KL_REQUIRE(!gated || p->z || k->B * k->T == 0, "decode: z: expected [N,T,HV,V] with this output_gate, got NULL");
    KL_REQUIRE(gated || !p->z, "decode: z: expected NULL with KDA_OUT_NONE");
    return kl_ok();
}

static kl_status convolve(kl_ctx *ctx, const kda_decode_problem *p, int which, void *y)
{
    const kda_problem *k = &p->kda;
    const void *const x[] = {k->q, k->k, k->v};
    const int64_t stride[] = {k->q_stride, k->k_stride, k->v_stride};
    void *tail = p->W > 1 ? p->tail[which] : NULL;
    return kda_conv_forward(ctx, &(kda_conv_problem){
        .B = k->B, .T = k->T, .N = k->N, .D = width_of(k, which), .W = p->W, .silu = true, .dtype = k->dtype, .x = x[which],
        .x_stride = stride[which], .weight = p->weight[which], .weight_dtype = p->weight_dtype, .y = y, .tail_in = tail, .tail_out = tail,
        .tail_dtype = p->tail_dtype, .state_index = k->state_index, .state_pool = k->state_pool ? k->state_pool : k->N});
}

kl_status kda_decode(kl_ctx *ctx, const kda_decode_problem *p, void *workspace, size_t bytes)
{
    KL_TRY(validate(ctx, p));
#ifdef KL_HAVE_CUDA
    if (one_kernel(ctx, p))
        return kda_cuda_decode(ctx, p);
#endif
    size_t wanted = kda_decode_workspace(ctx, p);
    KL_REQUIRE(workspace && bytes >= wanted, "decode: workspace: expected %zu bytes, got %zu", wanted, workspace ? bytes : 0);
    kl_arena a = kl_arena_over(workspace, bytes);
    buffers b = carve(&a, ctx, p);
    for (int i = 0; i < 3; i++)
        KL_TRY(convolve(ctx, p, i, b.conv[i]));
    kda_problem k = operator_of(p, &b);
    KL_TRY(kda_pick(ctx->device, "recurrent", &k, KL_FORWARD)->forward(ctx, &k, b.operator_workspace, b.operator_bytes));
    return kda_gated_norm_forward(ctx, &(kda_gated_norm_problem){
        .rows = k.B * k.T * k.HV, .V = k.V, .gate_kind = p->output_gate, .eps = p->eps, .dtype = k.dtype, .x = b.o, .gate = p->z,
        .weight = p->norm_weight, .weight_dtype = p->norm_weight_dtype, .y = p->y});
}
