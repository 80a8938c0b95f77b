#include "reference/linear.h"

void ref_linear_forward(int64_t N, int64_t I, int64_t O, const real *x, const real *W, real *y)
{
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < O; o++)
            y[n * O + o] = ref_dot(I, W + o * I, x + n * I);
}

void ref_linear_backward(int64_t N, int64_t I, int64_t O, const real *x, const real *W, const real *dy, real *dx, real *dW)
{
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < O; o++) {
            /* y[n,o] = sum_i W[o,i] x[n,i] */
            real dy_no = dy[n * O + o];
            if (dx)
                for (int64_t i = 0; i < I; i++)
                    dx[n * I + i] += dy_no * W[o * I + i];
            if (dW)
                for (int64_t i = 0; i < I; i++)
                    dW[o * I + i] += dy_no * x[n * I + i];
        }
}
