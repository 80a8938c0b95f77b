#include "common/parallel.h"
#include "common/simd.h"
#include "kda/internal.h"

/* Rows are cut into blocks of a fixed size; a block's share of dweight is summed in its own order and added in the order
 * of the blocks. */
enum { MAX_WIDTH = KDA_NORM_WIDTH, BLOCK_ROWS = 64 };

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
    const float *x = (const float *)p->x + i * p->V;
    float r = inverse_rms(p, x);
    for (int64_t j = 0; j < p->V; j += KL_LANES) {
        int64_t n = p->V - j;
        kl_v y = kl_vload_up_to(x + j, n) * r * kl_vload(weight + j);
        if (p->gate)
            y *= act(p->gate_kind, kl_vload_up_to((const float *)p->gate + i * p->V + j, n));
        kl_vstore_up_to((float *)p->y + i * p->V + j, y, n);
    }
}

static void backward_row(const kda_gated_norm_problem *p, const kda_gated_norm_grads *g, const float *weight, int64_t i, float *dweight)
{
    const float *x = (const float *)p->x + i * p->V, *dy = (const float *)g->dy + i * p->V;
    const float *gate = p->gate ? (const float *)p->gate + i * p->V : NULL;
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
                kl_vstore_up_to((float *)g->dgate + i * p->V + j, dyj * xh * w * act_derivative(p->gate_kind, z), n);
        }
        kl_vstore(dweight + j, kl_vload(dweight + j) + dn * xh);
        if (g->dx)
            kl_vstore_up_to((float *)g->dx + i * p->V + j, r * (dn * w - xh * mean), n);
    }
}

/* [V] floats; the padding to 16 is zero. */
static void load_weight(const kda_gated_norm_problem *p, float *weight)
{
    memset(weight, 0, MAX_WIDTH * sizeof(float));
    kl_to_f32(weight, p->weight, p->weight_dtype, (size_t)p->V);
}

kl_status kda_cpu_gated_norm_forward(kl_ctx *ctx, const kda_gated_norm_problem *p)
{
    float weight[MAX_WIDTH];
    load_weight(p, weight);
#pragma omp parallel for schedule(static) num_threads(ctx->threads) if (p->rows > BLOCK_ROWS)
    for (int64_t i = 0; i < p->rows; i++)
        forward_row(p, weight, i);
    return kl_ok();
}

kl_status kda_cpu_gated_norm_backward(kl_ctx *ctx, const kda_gated_norm_problem *p, const kda_gated_norm_grads *g)
{
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
