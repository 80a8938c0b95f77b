#include "harness/device_inputs.h"

#include <cmath>

#include "common/device.cuh"
#include "common/gpu.h"

namespace {

/* Philox4x32-10 (common/rng.h). */
struct words { uint32_t w[4]; };
__device__ words philox(uint64_t seed, uint64_t stream, uint64_t block)
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    words c = {{(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)}};
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c.w[0], b = (uint64_t)0xCD9E8D57u * c.w[2];
        c = {{(uint32_t)(b >> 32) ^ c.w[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c.w[3] ^ k1, (uint32_t)a}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

__device__ float uniform(uint64_t seed, uint64_t stream, uint64_t i) /* in (0, 1) */
{
    return ((float)(philox(seed, stream, i).w[0] >> 9) + 0.5f) * 1.1920929e-7f;
}
__device__ float normal(uint64_t seed, uint64_t stream, uint64_t i)
{
    words x = philox(seed, stream, i);
    float u = ((float)(x.w[0] >> 9) + 0.5f) * 1.1920929e-7f, turn = (float)(x.w[1] >> 8) * 5.9604645e-8f;
    return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * turn);
}
__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ void put(void *x, kl_dtype type, int64_t i, float value)
{
    if (type == KL_BF16)
        ((uint16_t *)x)[i] = kl_to_bf16(value);
    else
        ((float *)x)[i] = value;
}
__device__ float get(const void *x, kl_dtype type, int64_t i)
{
    return type == KL_BF16 ? kl_load_bf16((const uint16_t *)x + i) : ((const float *)x)[i];
}

enum { THREADS = 256 };
__device__ int64_t first() { return (int64_t)blockIdx.x * THREADS + threadIdx.x; }
__device__ int64_t step() { return (int64_t)gridDim.x * THREADS; }

__global__ void fill_normal(void *x, kl_dtype type, int64_t count, float mean, float stddev, uint64_t seed, uint64_t stream)
{
    for (int64_t i = first(); i < count; i += step())
        put(x, type, i, mean + stddev * normal(seed, stream, (uint64_t)i));
}

__global__ void fill_uniform(float *x, int64_t count, float low, float high, uint64_t seed, uint64_t stream)
{
    for (int64_t i = first(); i < count; i += step())
        x[i] = low + (high - low) * uniform(seed, stream, (uint64_t)i);
}

/* Rows of a head, a warp each: N(0,1), at cosine 0.8 to the head's own direction where asked for, of length 1 where asked for. */
struct rows {
    void *x;
    kl_dtype type;
    int64_t count, H, K;
    bool correlated, unit;
    uint64_t seed, stream;
};
__device__ float row_scale(const rows &r, uint64_t stream, int64_t row)
{
    float sum = 0.0f;
    for (int64_t i = kl_lane(); i < r.K; i += 32) {
        float x = normal(r.seed, stream, (uint64_t)(row * r.K + i));
        sum += x * x;
    }
    return rsqrtf(kl_warp_sum(sum));
}
__global__ void fill_rows(const __grid_constant__ rows r)
{
    for (int64_t row = first() / 32; row < r.count; row += step() / 32) {
        int64_t head = row % r.H;
        float own = r.correlated || r.unit ? row_scale(r, r.stream, row) : 1.0f;
        float common = r.correlated ? row_scale(r, r.stream + 1, head) : 0.0f, sum = 0.0f;
        for (int pass = 0; pass < 2; pass++) {
            float scale = r.unit ? rsqrtf(kl_warp_sum(sum)) : 1.0f;
            for (int64_t i = kl_lane(); i < r.K; i += 32) {
                float x = own * normal(r.seed, r.stream, (uint64_t)(row * r.K + i));
                if (r.correlated)
                    x = 0.894427191f * common * normal(r.seed, r.stream + 1, (uint64_t)(head * r.K + i)) + 0.447213595f * x;
                sum += pass ? 0.0f : x * x;
                if (pass)
                    put(r.x, r.type, row * r.K + i, scale * x);
            }
        }
    }
}

struct gates {
    void *g;
    kl_dtype type;
    int64_t tokens, HV, G;
    const float *A_log, *dt_bias;
    kda_gate kind;
    kl_regime regime;
    uint64_t seed;
};
__global__ void fill_gates(const __grid_constant__ gates f)
{
    int64_t width = f.HV * f.G;
    for (int64_t i = first(); i < f.tokens * width; i += step()) {
        int64_t at = i % width, head = at / f.G, j = at % f.G;
        bool first_third = f.G < 3 ? head % 2 == 0 : 3 * j < f.G;
        bool slow = f.regime == KL_REGIME_SLOW || (f.regime == KL_REGIME_MIXED && first_third);
        float decay = slow ? 0.01f * (1e-3f + 0.998f * uniform(f.seed, 4, (uint64_t)i)) : 5.0f * sigmoid(normal(f.seed, 4, (uint64_t)i));
        float x = -decay;
        if (f.kind != KDA_GATE_LOG) {
            float a = expf(f.A_log[head]);
            x = f.kind == KDA_GATE_SOFTPLUS ? logf(expm1f(decay / a)) : logf(decay / (5.0f - decay)) / a;
            x -= f.dt_bias ? f.dt_bias[at] : 0.0f;
        }
        put(f.g, f.type, i, x);
    }
}

__global__ void fill_beta(void *beta, kl_dtype type, int64_t count, bool slow, kda_beta kind, uint64_t seed)
{
    float top = kind == KDA_BETA_SIGMOID2 ? 2.0f : 1.0f;
    for (int64_t i = first(); i < count; i += step()) {
        float b = slow ? 0.93f + 0.04f * uniform(seed, 6, (uint64_t)i) : top * sigmoid(normal(seed, 6, (uint64_t)i));
        put(beta, type, i, kind == KDA_BETA_PLAIN ? b : logf(b / (top - b)));
    }
}

__global__ void make_general(const __grid_constant__ kda_problem p, const __grid_constant__ dplr_problem d)
{
    int64_t keys = p.HV * p.K, group = p.HV / p.H;
    for (int64_t i = first(); i < p.B * p.T * keys; i += step()) {
        int64_t t = i / keys, head = i % keys / p.K, c = i % p.K, from = (t * p.H + head / group) * p.K + c;
        float k = get(p.k, p.dtype, from), beta = get(p.beta, p.dtype, t * p.HV + head);
        float g = p.G ? get(p.g, p.dtype, (t * p.HV + head) * p.G + c / (p.K / p.G)) : 0.0f;
        put((void *)d.q, d.dtype, i, get(p.q, p.dtype, from));
        put((void *)d.k, d.dtype, i, beta * k);
        put((void *)d.a, d.dtype, i, k * expf(g));
        put((void *)d.b, d.dtype, i, -beta * k);
        put((void *)d.g, d.dtype, i, g);
    }
}

__global__ void take_slice(float *dst, const __grid_constant__ kl_slice s)
{
    int64_t across = s.count * s.width;
    for (int64_t i = first(); i < s.rows * across; i += step()) {
        int64_t r = i / across, at = i % across, row = s.index ? s.index[r] : r;
        dst[i] = get(s.tensor, s.dtype, row * s.pitch + s.head[at / s.width] * s.width + at % s.width);
    }
}

/* Threads for n elements; the kernels stride. */
kl_grid over(int64_t n)
{
    kl_grid g;
    g.threads = THREADS;
    g.x = (n + THREADS - 1) / THREADS;
    g.x = g.x < 4096 ? g.x : 4096;
    return g;
}

} // namespace

kl_status kl_device_inputs(const kl_ctx *ctx, const kda_problem *p, const kda_grads *g, kl_regime regime, uint64_t seed)
{
    int64_t tokens = p->B * p->T, values = tokens * p->HV * p->V, slots = p->state_pool ? p->state_pool : p->N, state = p->HV * p->K * p->V;
    struct { const void *x; kl_dtype type; int64_t count; } drawn[] = {
        {p->v, p->dtype, values}, {p->h0, p->state_dtype, slots * state}, {g ? g->d_o : NULL, p->dtype, values}, {g ? g->dht : NULL, KL_F32, p->N * state}};
    for (uint64_t i = 0; i < 4; i++)
        if (drawn[i].x)
            KL_TRY(kl_launch(ctx, "inputs", over(drawn[i].count), fill_normal, (void *)drawn[i].x, drawn[i].type, drawn[i].count, 0.0f, 1.0f, seed, 10 + i));
    rows q = {(void *)p->q, p->dtype, tokens * p->H, p->H, p->K, false, !p->qk_l2norm, seed, 20};
    rows k = {(void *)p->k, p->dtype, tokens * p->H, p->H, p->K, regime == KL_REGIME_SLOW, !p->qk_l2norm, seed, 22};
    KL_TRY(kl_launch(ctx, "inputs", over(32 * q.count), fill_rows, q));
    KL_TRY(kl_launch(ctx, "inputs", over(32 * k.count), fill_rows, k));
    if (p->A_log) {
        bool softplus = p->gate == KDA_GATE_SOFTPLUS;
        KL_TRY(kl_launch(ctx, "inputs", over(p->HV), fill_uniform, (float *)p->A_log, p->HV, softplus ? 0.0f : -0.5f, softplus ? 2.77f : 0.5f, seed, (uint64_t)30));
    }
    if (p->dt_bias)
        KL_TRY(kl_launch(ctx, "inputs", over(p->HV * p->G), fill_normal, (void *)p->dt_bias, KL_F32, p->HV * p->G, 0.0f, 1.0f, seed, (uint64_t)31));
    if (p->G) {
        gates f = {(void *)p->g, p->dtype, tokens, p->HV, p->G, p->A_log, p->dt_bias, p->gate, regime, seed};
        KL_TRY(kl_launch(ctx, "inputs", over(tokens * p->HV * p->G), fill_gates, f));
    }
    return kl_launch(ctx, "inputs", over(tokens * p->HV), fill_beta, (void *)p->beta, p->dtype, tokens * p->HV, regime == KL_REGIME_SLOW, p->beta_kind, seed);
}

kl_status kl_device_normal(const kl_ctx *ctx, void *x, kl_dtype type, int64_t count, float stddev, uint64_t seed)
{
    return kl_launch(ctx, "inputs", over(count), fill_normal, x, type, count, 0.0f, stddev, seed, (uint64_t)0);
}

kl_status kl_device_general(const kl_ctx *ctx, const kda_problem *p, const dplr_problem *d)
{
    size_t size = kl_dtype_size(p->dtype);
    KL_TRY(kl_launch(ctx, "inputs", over(p->B * p->T * p->HV * p->K), make_general, *p, *d));
    KL_TRY(kl_gpu_copy(ctx, (void *)d->v, p->v, (size_t)(p->B * p->T * p->HV * p->V) * size));
    return d->h0 ? kl_gpu_copy(ctx, (void *)d->h0, p->h0, (size_t)(p->N * p->HV * p->K * p->V) * sizeof(float)) : kl_ok();
}

kl_status kl_device_slice(const kl_ctx *ctx, float *dst, const kl_slice *s)
{
    return kl_launch(ctx, "slice", over(s->rows * s->count * s->width), take_slice, dst, *s);
}
