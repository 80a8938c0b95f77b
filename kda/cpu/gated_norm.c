#include "kda/gated_norm.h"

#include <math.h>

#include "common/parallel.h"
#include "common/simd.h"

/* Rows are cut into blocks of a fixed size; a block's share of dweight is summed in its own order and added in the order
 * of the blocks. */
enum { MAX_WIDTH = 4096, BLOCK_ROWS = 64 };

static kl_status validate(const kl_ctx *ctx, const kda_gated_norm_problem *p)
{
    KL_REQUIRE(p, "gated_norm: problem: expected a pointer, got NULL");
    if (ctx->device != KL_CPU)
        return kl_error(KL_EDEVICE, "gated_norm: device: expected cpu, got %s", kl_device_name(ctx->device));
    KL_REQUIRE(p->weight_dtype == KL_F32 || p->weight_dtype == KL_BF16 || p->weight_dtype == KL_F16,
               "gated_norm: weight_dtype: expected float32, bfloat16 or float16, got %s", kl_dtype_name(p->weight_dtype));
    int64_t elements;
    KL_REQUIRE(p->V >= 1 && p->V <= MAX_WIDTH, "gated_norm: V: expected 1..%d, got %lld", MAX_WIDTH, (long long)p->V);
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

static inline kl_v act(kda_output_gate kind, kl_v z)
{
    return kind == KDA_OUT_SIGMOID ? kl_vsigmoid(z) : kind == KDA_OUT_SWISH ? z * kl_vsigmoid(z) : kl_vset(1.0f);
}
static inline kl_v act_derivative(kda_output_gate kind, kl_v z)
{
    kl_v up = kl_vsigmoid(z), slope = up * kl_vsigmoid(-z);
    return kind == KDA_OUT_SIGMOID ? slope : up + z * slope;
}

/* r = (mean x^2 + eps)^-1/2 */
static float inverse_rms(const kda_gated_norm_problem *p, const float *x)
{
    kl_v sum = {0};
    for (int64_t j = 0; j < p->V; j += KL_LANES) {
        kl_v xj = kl_vload_up_to(x + j, p->V - j);
        sum += xj * xj;
    }
    return 1.0f / sqrtf(kl_vsum(sum) / (float)p->V + p->eps);
}

static void forward_row(const kda_gated_norm_problem *p, const float *weight, int64_t i)
{
    const float *x = p->x + i * p->V;
    float r = inverse_rms(p, x);
    for (int64_t j = 0; j < p->V; j += KL_LANES) {
        int64_t n = p->V - j;
        kl_v y = kl_vload_up_to(x + j, n) * r * kl_vload(weight + j);
        if (p->gate)
            y *= act(p->gate_kind, kl_vload_up_to(p->gate + i * p->V + j, n));
        kl_vstore_up_to(p->y + i * p->V + j, y, n);
    }
}

static void backward_row(const kda_gated_norm_problem *p, const kda_gated_norm_grads *g, const float *weight, int64_t i, float *dweight)
{
    const float *x = p->x + i * p->V, *dy = g->dy + i * p->V, *gate = p->gate ? p->gate + i * p->V : NULL;
    float r = inverse_rms(p, x);
    /* With xh = x r and dxh = dy act weight:  dx = r (dxh - xh mean(dxh xh)) */
    kl_v dot = {0};
    for (int64_t j = 0; j < p->V; j += KL_LANES) {
        kl_v xh = kl_vload_up_to(x + j, p->V - j) * r, dn = kl_vload_up_to(dy + j, p->V - j);
        if (gate)
            dn *= act(p->gate_kind, kl_vload_up_to(gate + j, p->V - j));
        dot += dn * kl_vload(weight + j) * xh;
    }
    float mean = kl_vsum(dot) / (float)p->V;
    for (int64_t j = 0; j < p->V; j += KL_LANES) {
        int64_t n = p->V - j;
        kl_v xh = kl_vload_up_to(x + j, n) * r, w = kl_vload(weight + j), dyj = kl_vload_up_to(dy + j, n), dn = dyj;
        if (gate) {
            /* y = n act(z), n = xh weight:  dz = dy n act'(z),  dn = dy act(z) */
            kl_v z = kl_vload_up_to(gate + j, n);
            dn = dyj * act(p->gate_kind, z);
            if (g->dgate)
                kl_vstore_up_to(g->dgate + i * p->V + j, dyj * xh * w * act_derivative(p->gate_kind, z), n);
        }
        kl_vstore(dweight + j, kl_vload(dweight + j) + dn * xh);
        if (g->dx)
            kl_vstore_up_to(g->dx + i * p->V + j, r * (dn * w - xh * mean), n);
    }
}

/* [V] floats; the padding to 16 is zero. */
static void load_weight(const kda_gated_norm_problem *p, float *weight)
{
    memset(weight, 0, MAX_WIDTH * sizeof(float));
    kl_to_f32(weight, p->weight, p->weight_dtype, (size_t)p->V);
}

kl_status kda_gated_norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p)
{
    KL_REQUIRE(ctx, "gated_norm: ctx: expected a context, got NULL");
    KL_TRY(validate(ctx, p));
    KL_REQUIRE(p->rows == 0 || p->y, "gated_norm: y: expected [rows,V], got NULL");
    float weight[MAX_WIDTH];
    load_weight(p, weight);
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (p->rows > BLOCK_ROWS)
    for (int64_t i = 0; i < p->rows; i++)
        forward_row(p, weight, i);
    return kl_ok();
}

kl_status kda_gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g)
{
    KL_REQUIRE(ctx, "gated_norm: ctx: expected a context, got NULL");
    KL_TRY(validate(ctx, p));
    KL_REQUIRE(g, "gated_norm: grads: expected a pointer, got NULL");
    KL_REQUIRE(p->rows == 0 || g->dy, "gated_norm: dy: expected [rows,V], got NULL");
    KL_REQUIRE(p->gate || !g->dgate, "gated_norm: dgate: expected NULL with KDA_OUT_NONE");
    float weight[MAX_WIDTH];
    load_weight(p, weight);
#pragma omp parallel for ordered schedule(static, 1) num_threads(ctx->threads)
    for (int64_t first = 0; first < p->rows; first += BLOCK_ROWS) {
        float dweight[MAX_WIDTH];
        memset(dweight, 0, (size_t)((p->V + 15) & ~(int64_t)15) * sizeof(float));
        for (int64_t i = first; i < first + BLOCK_ROWS && i < p->rows; i++)
            backward_row(p, g, weight, i, dweight);
#pragma omp ordered
        for (int64_t j = 0; j < p->V && g->dweight; j++)
            g->dweight[j] += dweight[j];
    }
    return kl_ok();
}
