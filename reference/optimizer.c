#include "reference/optimizer.h"

#include "reference/scratch.h"

void ref_adamw(int64_t n, real *w, const real *g, real *m, real *v, real lr, real beta1, real beta2, real eps, real decay, int64_t step)
{
    for (int64_t i = 0; i < n; i++) {
        m[i] = beta1 * m[i] + (1 - beta1) * g[i];
        v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
        real m_hat = m[i] / (1 - pow(beta1, step)), v_hat = v[i] / (1 - pow(beta2, step));
        w[i] -= lr * (m_hat / (sqrt(v_hat) + eps) + decay * w[i]);
    }
}

/* A [R,R] = X X^T */
static void gram(int64_t R, int64_t C, const real *X, real *A)
{
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < R; j++)
            A[i * R + j] = ref_dot(C, X + i * C, X + j * C);
}

/* Y [R,C] = A [R,R] X [R,C] */
static void multiply(int64_t R, int64_t C, const real *A, const real *X, real *Y)
{
    for (int64_t i = 0; i < R; i++)
        for (int64_t c = 0; c < C; c++) {
            real sum = 0;
            for (int64_t j = 0; j < R; j++)
                sum += A[i * R + j] * X[j * C + c];
            Y[i * C + c] = sum;
        }
}

int ref_orthogonalise(int64_t R, int64_t C, int64_t steps, real *X)
{
    const real a = 3.4445, b = -4.7750, c = 2.0315;
    ref_scratch s = { 0 };
    real *A = ref_take(&s, R * R), *AA = ref_take(&s, R * R), *BX = ref_take(&s, R * C);
    real norm = sqrt(ref_dot(R * C, X, X));
    for (int64_t i = 0; i < R * C && norm > 0; i++)
        X[i] /= norm;
    for (int64_t step = 0; step < steps && s.status == 0; step++) {
        /* B = b A + c A A,  X <- a X + B X */
        gram(R, C, X, A);
        multiply(R, R, A, A, AA);
        for (int64_t i = 0; i < R * R; i++)
            A[i] = b * A[i] + c * AA[i];
        multiply(R, C, A, X, BX);
        for (int64_t i = 0; i < R * C; i++)
            X[i] = a * X[i] + BX[i];
    }
    return ref_release(&s);
}

int ref_muon(int64_t R, int64_t C, real *w, const real *g, real *m, real lr, real momentum, real decay, int64_t steps)
{
    ref_scratch s = { 0 };
    real *X = ref_take(&s, R * C), scale = 0.2 * sqrt(R > C ? R : C);
    if (s.status == 0) {
        for (int64_t i = 0; i < R * C; i++) {
            m[i] = momentum * m[i] + g[i];
            X[i] = g[i] + momentum * m[i];
        }
        s.status = ref_orthogonalise(R, C, steps, X);
        for (int64_t i = 0; i < R * C; i++)
            w[i] -= lr * (scale * X[i] + decay * w[i]);
    }
    return ref_release(&s);
}
