#include "reference/mlp.h"

#include "reference/activation.h"
#include "reference/linear.h"
#include "reference/scratch.h"

int ref_mlp_forward(const ref_mlp *p, const real *x, real *y)
{
    ref_scratch s = { 0 };
    real *a = ref_take(&s, p->I), *b = ref_take(&s, p->I), *m = ref_take(&s, p->I);
    if (s.status == 0) {
        ref_linear_forward(1, p->D, p->I, x, p->w1, a);
        ref_linear_forward(1, p->D, p->I, x, p->w3, b);
        for (int64_t n = 0; n < p->I; n++)
            m[n] = ref_silu(a[n]) * b[n];
        ref_linear_forward(1, p->I, p->D, m, p->w2, y);
    }
    return ref_release(&s);
}

int ref_mlp_backward(const ref_mlp *p, const real *x, const real *dy, real *dx, const ref_mlp_grad *d)
{
    ref_scratch s = { 0 };
    real *a = ref_take(&s, p->I), *b = ref_take(&s, p->I), *m = ref_take(&s, p->I);
    real *da = ref_take(&s, p->I), *db = ref_take(&s, p->I), *dm = ref_take(&s, p->I);
    if (s.status == 0) {
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
    return ref_release(&s);
}
