#include "reference/norm.h"

#include "reference/activation.h"
#include "reference/scratch.h"

/* r = (mean x^2 + eps)^-1/2 */
static real inverse_rms(int64_t D, real eps, const real *x)
{
    return 1 / sqrt(ref_dot(D, x, x) / D + eps);
}

void ref_rmsnorm_forward(int64_t N, int64_t D, real eps, const real *x, const real *w, real *y)
{
    for (int64_t n = 0; n < N; n++) {
        const real *x_n = x + n * D;
        real r = inverse_rms(D, eps, x_n);
        for (int64_t i = 0; i < D; i++)
            y[n * D + i] = x_n[i] * r * (w ? w[i] : 1);
    }
}

void ref_rmsnorm_backward(int64_t N, int64_t D, real eps, const real *x, const real *w, const real *dy, real *dx, real *dw)
{
    for (int64_t n = 0; n < N; n++) {
        const real *x_n = x + n * D, *dy_n = dy + n * D;
        real r = inverse_rms(D, eps, x_n);

        /* y = x r w:  dw = dy x r,  dr = sum dy w x */
        real dr = 0;
        for (int64_t i = 0; i < D; i++) {
            if (dw)
                dw[i] += dy_n[i] * x_n[i] * r;
            dr += dy_n[i] * (w ? w[i] : 1) * x_n[i];
        }
        /* r = (sum x^2 / D + eps)^-1/2:  dr/dx = -r^3 x / D */
        if (dx)
            for (int64_t i = 0; i < D; i++)
                dx[n * D + i] += dy_n[i] * r * (w ? w[i] : 1) - dr * r * r * r * x_n[i] / D;
    }
}

static real act(ref_output_gate gate, real z)
{
    return gate == REF_OUTPUT_GATE_SIGMOID ? ref_sigmoid(z) : ref_silu(z);
}

static real act_derivative(ref_output_gate gate, real z)
{
    return gate == REF_OUTPUT_GATE_SIGMOID ? ref_sigmoid_derivative(z) : ref_silu_derivative(z);
}

void ref_gated_rmsnorm_forward(int64_t N, int64_t D, real eps, ref_output_gate gate, const real *x, const real *w, const real *z, real *y)
{
    ref_rmsnorm_forward(N, D, eps, x, w, y);
    if (gate == REF_OUTPUT_GATE_NONE)
        return;
    for (int64_t i = 0; i < N * D; i++)
        y[i] *= act(gate, z[i]);
}

int ref_gated_rmsnorm_backward(int64_t N, int64_t D, real eps, ref_output_gate gate, const real *x, const real *w, const real *z,
                               const real *dy, real *dx, real *dw, real *dz)
{
    if (gate == REF_OUTPUT_GATE_NONE) {
        ref_rmsnorm_backward(N, D, eps, x, w, dy, dx, dw);
        return 0;
    }
    ref_scratch s = { 0 };
    real *y1 = ref_take(&s, N * D), *dy1 = ref_take(&s, N * D);
    if (s.status == 0) {
        /* y = y1 act(z) */
        ref_rmsnorm_forward(N, D, eps, x, w, y1);
        for (int64_t i = 0; i < N * D; i++) {
            dy1[i] = dy[i] * act(gate, z[i]);
            if (dz)
                dz[i] += dy[i] * y1[i] * act_derivative(gate, z[i]);
        }
        /* y1 = rmsnorm(x) w */
        ref_rmsnorm_backward(N, D, eps, x, w, dy1, dx, dw);
    }
    return ref_release(&s);
}

void ref_l2norm_forward(int64_t N, int64_t D, real eps, const real *x, real *y)
{
    for (int64_t n = 0; n < N; n++) {
        const real *x_n = x + n * D;
        real r = 1 / sqrt(ref_dot(D, x_n, x_n) + eps);
        for (int64_t i = 0; i < D; i++)
            y[n * D + i] = x_n[i] * r;
    }
}

void ref_l2norm_backward(int64_t N, int64_t D, real eps, const real *x, const real *dy, real *dx)
{
    for (int64_t n = 0; n < N; n++) {
        const real *x_n = x + n * D, *dy_n = dy + n * D;
        real r = 1 / sqrt(ref_dot(D, x_n, x_n) + eps);

        /* y = x r,  r = (sum x^2 + eps)^-1/2:  dr = sum dy x,  dr/dx = -r^3 x */
        real dr = ref_dot(D, dy_n, x_n);
        if (dx)
            for (int64_t i = 0; i < D; i++)
                dx[n * D + i] += dy_n[i] * r - dr * r * r * r * x_n[i];
    }
}
