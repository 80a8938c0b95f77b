#include "reference/mlp.h"

#include "reference/activation.h"
#include "reference/linear.h"

int ref_mlp_forward(const ref_mlp *p, const real *x, real *y)
{
    real *a = ref_zeros(p->I), *b = ref_zeros(p->I), *m = ref_zeros(p->I);
    int status = a && b && m ? 0 : -1;
    if (status == 0) {
        ref_linear_forward(1, p->D, p->I, x, p->w1, a);
        ref_linear_forward(1, p->D, p->I, x, p->w3, b);
        for (int64_t n = 0; n < p->I; n++)
            m[n] = ref_silu(a[n]) * b[n];
        ref_linear_forward(1, p->I, p->D, m, p->w2, y);
    }
    free(a);
    free(b);
    free(m);
    return status;
}

int ref_mlp_backward(const ref_mlp *p, const real *x, const real *dy, real *dx, const ref_mlp_grad *d)
{
    real *a = ref_zeros(p->I), *b = ref_zeros(p->I), *m = ref_zeros(p->I);
    real *da = ref_zeros(p->I), *db = ref_zeros(p->I), *dm = ref_zeros(p->I);
    int status = a && b && m && da && db && dm ? 0 : -1;
    if (status == 0) {
        ref_linear_forward(1, p->D, p->I, x, p->w1, a);
        ref_linear_forward(1, p->D, p->I, x, p->w3, b);
        for (int64_t n = 0; n < p->I; n++)
            m[n] = ref_silu(a[n]) * b[n];

        /* y = w2 m */
        ref_linear_backward(1, p->I, p->D, m, p->w2, dy, dm, d->dw2);
        /* m = silu(a) b */
        for (int64_t n = 0; n < p->I; n++) {
            da[n] = dm[n] * b[n] * ref_silu_derivative(a[n]);
            db[n] = dm[n] * ref_silu(a[n]);
        }
        /* a = w1 x,  b = w3 x */
        ref_linear_backward(1, p->D, p->I, x, p->w1, da, dx, d->dw1);
        ref_linear_backward(1, p->D, p->I, x, p->w3, db, dx, d->dw3);
    }
    free(a);
    free(b);
    free(m);
    free(da);
    free(db);
    free(dm);
    return status;
}
