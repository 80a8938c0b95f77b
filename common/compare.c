#include "common/compare.h"

#include <math.h>

const kl_tolerance kl_tol_kda_f32 = {"KDA, float32", 2e-5, 1e-4, "golden data; about 170 ulps: a 64-token chunk sums 128-wide products twice"};
const kl_tolerance kl_tol_kda_bf16 = {"KDA, bf16 operands", 6e-3, 1.5e-2, "golden data; 1.5 bf16 ulps"};
const kl_tolerance kl_tol_kda_bf16_corr = {"KDA, bf16 operands, correlated keys", 1.5e-2, 4e-2, "golden data; the triangular system is ill-conditioned"};
const kl_tolerance kl_tol_mla_f32 = {"MLA, float32", 2e-5, 1e-4, "same rounding as KDA: one softmax-weighted sum"};
const kl_tolerance kl_tol_mla_bf16 = {"MLA, bf16 operands", 6e-3, 1.5e-2, "1.5 bf16 ulps: keys or queries, probabilities and the result are rounded once each"};
const kl_tolerance kl_tol_moe_f32 = {"MoE, float32", 2e-5, 1e-4, "three products in a row"};
const kl_tolerance kl_tol_moe_bf16 = {"MoE, bf16 operands", 8e-3, 1.6e-2, "2 bf16 ulps: what an expert holds inside, its rows and their sum are rounded once each"};
const kl_tolerance kl_tol_model_f32 = {"model, float32", 2e-4, 1e-3, "golden data"};
const kl_tolerance kl_tol_model_bf16 = {"model, bf16", 2e-2, 5e-2, "golden data"};
const kl_tolerance kl_tol_layers_f32 = {"layers, float32", 5e-6, 2e-5, "a reciprocal root, a sigmoid or a sum of some thousand terms: a few dozen ulps"};
const kl_tolerance kl_tol_layers_bf16 = {"layers, bf16 operands or results", 4e-3, 6e-3, "one rounding to bf16, 2e-3 at the most, of a result or an operand"};
const kl_tolerance kl_tol_muon = {"Muon, bf16 products", 3e-2, 3e-2, "fifteen products in a row, each rounded; small singular values grow 3.4-fold a step with what was rounded"};
const kl_tolerance kl_tol_golden_bf16_grad = {"model, gradients stored as bf16", 2e-4, 5e-3, "golden data: half a bf16 ulp is 2e-3"};

/* A sum over tokens and channels can be a thousandth of what its terms' roundings add up to. Where less than this part of the terms is
 * left, the result says nothing of the computation: it is scored against this part of them. */
const double kl_tol_cancelled = 0.1;

typedef struct norms {
    double diff2, ref2, bad;
} norms;

static void add(norms *s, double x, double ref)
{
    double d = x - ref;
    s->diff2 += d * d;
    s->ref2 += ref * ref;
    s->bad += 0.0 * x; /* NaN as soon as one x is not finite */
}

static double score(norms s, double floor2)
{
    double scale2 = s.ref2 > floor2 ? s.ref2 : floor2;
    return sqrt(s.diff2 / (scale2 > 0.0 ? scale2 : 1.0)) + s.bad;
}

double kl_rel_err(const float *x, const double *ref, size_t n)
{
    norms s = {0};
    for (size_t i = 0; i < n; i++)
        add(&s, x[i], ref[i]);
    return score(s, 0.0);
}

double kl_rel_err_f32(const float *x, const float *ref, size_t n)
{
    norms s = {0};
    for (size_t i = 0; i < n; i++)
        add(&s, x[i], ref[i]);
    return score(s, 0.0);
}

double kl_rel_err_sums(const float *x, const double *ref, const double *terms, size_t n)
{
    norms s = {0}, size = {0};
    for (size_t i = 0; i < n; i++) {
        add(&s, x[i], ref[i]);
        add(&size, 0.0, fmax(fabs(ref[i]), kl_tol_cancelled * terms[i]));
    }
    return score(s, size.ref2);
}

double kl_rel_err_blocks(const float *x, const double *ref, size_t T, size_t H, size_t D, size_t window)
{
    if (T == 0 || H == 0 || D == 0)
        return 0.0;
    if (window == 0)
        window = T;
    norms whole = {0};
    for (size_t i = 0; i < T * H * D; i++)
        add(&whole, x[i], ref[i]);
    double blocks = (double)(((T + window - 1) / window) * H);
    double floor2 = 0.05 * 0.05 * whole.ref2 / blocks;
    double worst = 0.0;
    for (size_t h = 0; h < H; h++) {
        for (size_t t0 = 0; t0 < T; t0 += window) {
            norms s = {0};
            for (size_t t = t0; t < T && t < t0 + window; t++)
                for (size_t d = 0; d < D; d++)
                    add(&s, x[(t * H + h) * D + d], ref[(t * H + h) * D + d]);
            double e = score(s, floor2);
            if (!(e <= worst))
                worst = e;
            if (isnan(worst))
                return worst;
        }
    }
    return worst;
}
