#include "kda/cpu/gates.h"

#include "common/simd.h"
#include "common/tile.h"

/* log(1 + e) for e >= 0: with y = 1 + e rounded, log y + (e - (y - 1)) / y; and log y = n ln 2 + 2 atanh(f / (2 + f))
 * with y = 2^n (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]. */
static inline kl_v log1p_positive(kl_v e)
{
    kl_v y = 1.0f + e;
    kl_v lost = (e - (y - 1.0f)) / y;
    kl_vi exponent = ((kl_vi)y - 0x3f3504f3) >> 23;
    kl_v n = __builtin_convertvector(exponent, kl_v);
    kl_v f = (kl_v)((kl_vi)y - (exponent << 23)) - 1.0f;
    kl_v s = f / (2.0f + f), z = s * s;
    kl_v tail = z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * (0.222222222f + z * 0.181818182f))));
    kl_v large = n * 0.693147181f + (2.0f * s + s * tail + lost);
    /* Below 2^-24 the quotient above is all there is: log(1 + e) = e. */
    kl_vi tiny = e < 6e-8f;
    return (kl_v)(((kl_vi)e & tiny) | ((kl_vi)large & ~tiny));
}

static inline kl_v softplus(kl_v z)
{
    kl_vi linear = z > 20.0f;
    kl_v curve = log1p_positive(kl_vexp(kl_vmin(z, kl_vset(20.0f))));
    return (kl_v)(((kl_vi)z & linear) | ((kl_vi)curve & ~linear));
}

static inline kl_v softplus_derivative(kl_v z)
{
    kl_vi linear = z > 20.0f;
    return (kl_v)(((kl_vi)kl_vset(1.0f) & linear) | ((kl_vi)kl_vsigmoid(z) & ~linear));
}

/* ---- q and k ---- */

static float inverse_norm(int64_t K, const float *x)
{
    kl_v sum = {0};
    for (int64_t c = 0; c < K; c += KL_LANES) {
        kl_v xc = kl_vload_up_to(x + c, K - c);
        sum += xc * xc;
    }
    return 1.0f / sqrtf(kl_vsum(sum) + 1e-6f);
}

void kda_unit_row(bool l2norm, int64_t K, float factor, const float *x, float *y)
{
    float r = l2norm ? factor * inverse_norm(K, x) : factor;
    for (int64_t c = 0; c < K; c += KL_LANES)
        kl_vstore(y + c, kl_vload_up_to(x + c, K - c) * r);
}

void kda_unit_row_backward(bool l2norm, int64_t K, float factor, const float *x, const float *dy, float *dx, bool accumulate)
{
    /* y = factor r x, r = (x.x + 1e-6)^-1/2:  dx = factor r (dy - r^2 (x.dy) x) */
    float r = 1.0f, projection = 0.0f;
    if (l2norm) {
        kl_v sum = {0};
        for (int64_t c = 0; c < K; c += KL_LANES)
            sum += kl_vload_up_to(x + c, K - c) * kl_vload(dy + c);
        r = inverse_norm(K, x);
        projection = r * r * kl_vsum(sum);
    }
    for (int64_t c = 0; c < K; c += KL_LANES) {
        kl_v d = kl_vload(dy + c);
        if (l2norm)
            d -= projection * kl_vload_up_to(x + c, K - c);
        d *= factor * r;
        kl_vstore_up_to(dx + c, accumulate ? kl_vload_up_to(dx + c, K - c) + d : d, K - c);
    }
}

/* ---- the forget gate ---- */

/* g + dt_bias of sixteen gate values */
static inline kl_v gate_input(const kda_problem *p, int64_t hv, const float *g, int64_t j)
{
    kl_v z = kl_vload_up_to(g + j, p->G - j);
    return p->dt_bias ? z + kl_vload_up_to(p->dt_bias + hv * p->G + j, p->G - j) : z;
}

/* a = g | -exp(A) softplus(z) | lb sigmoid(exp(A) z) */
static inline kl_v log_decay(const kda_problem *p, float eA, kl_v z)
{
    switch (p->gate) {
    case KDA_GATE_SOFTPLUS: return -eA * softplus(z);
    case KDA_GATE_BOUNDED: return p->lower_bound * kl_vsigmoid(eA * z);
    case KDA_GATE_LOG: break;
    }
    return z;
}

void kda_decay_row(const kda_problem *p, int64_t hv, const float *g, float *decay)
{
    int64_t G = p->G, K = p->K, Kp = kl_tile_pad(K);
    float eA = p->gate != KDA_GATE_LOG ? expf(p->A_log[hv]) : 0.0f;
    if (G == K && K == Kp) {
        for (int64_t c = 0; c < K; c += KL_LANES)
            kl_vstore(decay + c, kl_vexp(log_decay(p, eA, gate_input(p, hv, g, c))));
        return;
    }
    float value[KDA_MAX_DIM];
    for (int64_t j = 0; j < G; j += KL_LANES)
        kl_vstore(value + j, kl_vexp(log_decay(p, eA, gate_input(p, hv, g, j))));
    int64_t width = G ? K / G : 1;
    for (int64_t c = 0; c < K; c++)
        decay[c] = G ? value[c / width] : 1.0f;
    for (int64_t c = K; c < Kp; c++)
        decay[c] = 1.0f;
}

void kda_decay_row_backward(const kda_problem *p, int64_t hv, const float *g, float *da, float *dg, float *dA, float *dbias)
{
    int64_t G = p->G;
    if (G == 0)
        return;
    /* One gate decays K/G channels: its gradient is the sum of theirs. */
    int64_t width = p->K / G;
    if (width > 1)
        for (int64_t j = 0; j < G; j++) {
            float sum = 0.0f;
            for (int64_t c = 0; c < width; c++)
                sum += da[j * width + c];
            da[j] = sum;
        }
    float eA = p->gate != KDA_GATE_LOG ? expf(p->A_log[hv]) : 0.0f;
    kl_v dA_lanes = {0};
    for (int64_t j = 0; j < G; j += KL_LANES) {
        kl_v d = kl_vload_up_to(da + j, G - j), z = gate_input(p, hv, g, j), dz = d;
        if (p->gate == KDA_GATE_SOFTPLUS) {
            /* a = -exp(A) softplus(z):  dz = -exp(A) softplus'(z) da,  dA = a da */
            dz = -eA * softplus_derivative(z) * d;
            dA_lanes += -eA * softplus(z) * d;
        } else if (p->gate == KDA_GATE_BOUNDED) {
            /* a = lb sigmoid(y), y = exp(A) z:  dy = lb sigmoid(y) sigmoid(-y) da,  dz = exp(A) dy,  dA = y dy */
            kl_v y = eA * z, dy = p->lower_bound * kl_vsigmoid(y) * kl_vsigmoid(-y) * d;
            dz = eA * dy;
            dA_lanes += y * dy;
        }
        if (dg)
            kl_vstore_up_to(dg + j, dz, G - j);
        if (dbias)
            kl_vstore_up_to(dbias + j, kl_vload_up_to(dbias + j, G - j) + dz, G - j);
    }
    if (dA)
        *dA += kl_vsum(dA_lanes);
}

/* ---- beta ---- */

static float sigmoid(float x)
{
    float e = expf(-fabsf(x));
    return x >= 0.0f ? 1.0f / (1.0f + e) : e / (1.0f + e);
}

float kda_beta_value(kda_beta kind, float x)
{
    switch (kind) {
    case KDA_BETA_SIGMOID: return sigmoid(x);
    case KDA_BETA_SIGMOID2: return 2.0f * sigmoid(x);
    case KDA_BETA_PLAIN: break;
    }
    return x;
}

float kda_beta_derivative(kda_beta kind, float x)
{
    switch (kind) {
    case KDA_BETA_SIGMOID: return sigmoid(x) * sigmoid(-x);
    case KDA_BETA_SIGMOID2: return 2.0f * sigmoid(x) * sigmoid(-x);
    case KDA_BETA_PLAIN: break;
    }
    return 1.0f;
}
