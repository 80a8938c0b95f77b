#include "reference/conv.h"

#include "reference/activation.h"

/* The inputs of channel c in one row, tail first: in[e], e = 0 .. W-2+T, is x[e-(W-1)]. */
static real input(const ref_conv *p, int64_t c, int64_t e)
{
    int64_t past = p->W - 1;
    if (e < past)
        return p->tail ? p->tail[c * past + e] : 0;
    return p->x[(e - past) * p->C + c];
}

static void add_input_gradient(const ref_conv *p, int64_t c, int64_t e, real d, real *dx, real *dtail)
{
    int64_t past = p->W - 1;
    if (e < past) {
        if (dtail)
            dtail[c * past + e] += d;
    } else if (dx) {
        dx[(e - past) * p->C + c] += d;
    }
}

/* z[t,c] = sum_j w[c,j] in[t+j] */
static real convolve(const ref_conv *p, int64_t t, int64_t c)
{
    real z = 0;
    for (int64_t j = 0; j < p->W; j++)
        z += p->w[c * p->W + j] * input(p, c, t + j);
    return z;
}

void ref_conv_forward(const ref_conv *p, real *y, real *tail_out)
{
    for (int64_t t = 0; t < p->T; t++)
        for (int64_t c = 0; c < p->C; c++) {
            real z = convolve(p, t, c);
            y[t * p->C + c] = p->silu ? ref_silu(z) : z;
        }
    if (tail_out)
        for (int64_t c = 0; c < p->C; c++)
            for (int64_t j = 0; j < p->W - 1; j++)
                tail_out[c * (p->W - 1) + j] = input(p, c, p->T + j);
}

void ref_conv_backward(const ref_conv *p, const real *dy, const real *dtail_out, real *dx, real *dw, real *dtail)
{
    if (dy)
        for (int64_t t = 0; t < p->T; t++)
            for (int64_t c = 0; c < p->C; c++) {
                /* y = silu(z) or z */
                real dz = dy[t * p->C + c];
                if (p->silu)
                    dz *= ref_silu_derivative(convolve(p, t, c));
                /* z[t,c] = sum_j w[c,j] in[t+j] */
                for (int64_t j = 0; j < p->W; j++) {
                    if (dw)
                        dw[c * p->W + j] += dz * input(p, c, t + j);
                    add_input_gradient(p, c, t + j, dz * p->w[c * p->W + j], dx, dtail);
                }
            }
    /* tail_out[c,j] = in[T+j] */
    if (dtail_out)
        for (int64_t c = 0; c < p->C; c++)
            for (int64_t j = 0; j < p->W - 1; j++)
                add_input_gradient(p, c, p->T + j, dtail_out[c * (p->W - 1) + j], dx, dtail);
}
