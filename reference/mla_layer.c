/* An MLA layer: projections, norm of the latent, rotation when asked for, attention, output projection. */
#include "reference/linear.h"
#include "reference/mixer.h"
#include "reference/mla.h"
#include "reference/scratch.h"

/* What the layer computes on its way, for N = B*T tokens; the gradients have the same shapes. */
typedef struct {
    real *q;    /* [N,heads,Dn+Dr], rotated */
    real *c0;   /* [N,R+Dr] projected */
    real *c;    /* [N,R+Dr] the R part normed, the Dr part rotated */
    real *o;    /* [N,heads,Dv] */
} activations;

static activations take_activations(const ref_config *c, int64_t N, ref_scratch *s)
{
    return (activations){ .q = ref_take(s, N * c->heads * (c->Dn + c->Dr)), .c0 = ref_take(s, N * (c->R + c->Dr)),
                          .c = ref_take(s, N * (c->R + c->Dr)), .o = ref_take(s, N * c->heads * c->Dv) };
}

/* Attention of batch row b. */
static ref_mla problem(const ref_config *c, const ref_layer *w, int64_t T, const activations *a, int64_t b)
{
    return (ref_mla){ .Tq = T, .Tk = T, .H = c->heads, .Dn = c->Dn, .Dr = c->Dr, .Dv = c->Dv, .R = c->R,
                      .q = a->q + b * T * c->heads * (c->Dn + c->Dr), .c = a->c + b * T * (c->R + c->Dr), .W = w->kv_b };
}

static int forward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, activations *a)
{
    int64_t N = B * T, q_width = c->Dn + c->Dr, c_width = c->R + c->Dr;
    int status = 0;
    ref_linear_forward(N, c->D, c->heads * q_width, x, w->mla_q, a->q);
    ref_linear_forward(N, c->D, c_width, x, w->kv_a, a->c0);
    for (int64_t n = 0; n < N; n++) {
        ref_rmsnorm_forward(1, c->R, c->kv_a_eps, a->c0 + n * c_width, w->kv_a_norm, a->c + n * c_width);
        ref_copy(c->Dr, a->c0 + n * c_width + c->R, a->c + n * c_width + c->R);
    }
    for (int64_t b = 0; b < B; b++) {
        if (c->rope) {
            ref_rope_forward(T, c->heads, q_width, c->Dr, c->rope_theta, 0, a->q + b * T * c->heads * q_width);
            ref_rope_forward(T, 1, c_width, c->Dr, c->rope_theta, 0, a->c + b * T * c_width);
        }
        ref_mla p = problem(c, w, T, a, b);
        status |= ref_mla_forward(&p, a->o + b * T * c->heads * c->Dv, NULL);
    }
    return status;
}

int ref_mla_layer_forward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, real *out)
{
    ref_scratch s = { 0 };
    activations a = take_activations(c, B * T, &s);
    if (s.status == 0)
        s.status = forward(c, w, B, T, x, &a);
    if (s.status == 0)
        ref_linear_forward(B * T, c->heads * c->Dv, c->D, a.o, w->o_proj, out);
    return ref_release(&s);
}

/* Every line differentiates the line of the same name in forward(), from the last to the first. d is zero on entry but for d->o. */
static int backward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, const activations *a,
                    activations *d, real *dx, const ref_layer *dw)
{
    int64_t N = B * T, q_width = c->Dn + c->Dr, c_width = c->R + c->Dr;
    int status = 0;
    for (int64_t b = 0; b < B; b++) {
        ref_mla p = problem(c, w, T, a, b);
        real *dq_b = d->q + b * T * c->heads * q_width, *dc_b = d->c + b * T * c_width;
        status |= ref_mla_backward(&p, d->o + b * T * c->heads * c->Dv, dq_b, dc_b, dw->kv_b);
        if (c->rope) {
            ref_rope_backward(T, 1, c_width, c->Dr, c->rope_theta, 0, dc_b);
            ref_rope_backward(T, c->heads, q_width, c->Dr, c->rope_theta, 0, dq_b);
        }
    }
    for (int64_t n = 0; n < N; n++) {
        ref_add(c->Dr, d->c + n * c_width + c->R, d->c0 + n * c_width + c->R);
        ref_rmsnorm_backward(1, c->R, c->kv_a_eps, a->c0 + n * c_width, w->kv_a_norm, d->c + n * c_width, d->c0 + n * c_width, dw->kv_a_norm);
    }
    ref_linear_backward(N, c->D, c_width, x, w->kv_a, d->c0, dx, dw->kv_a);
    ref_linear_backward(N, c->D, c->heads * q_width, x, w->mla_q, d->q, dx, dw->mla_q);
    return status;
}

int ref_mla_layer_backward(const ref_config *c, const ref_layer *w, int64_t B, int64_t T, const real *x, const real *dout, real *dx,
                           const ref_layer *dw)
{
    ref_scratch s = { 0 };
    activations a = take_activations(c, B * T, &s), d = take_activations(c, B * T, &s);
    if (s.status == 0)
        s.status = forward(c, w, B, T, x, &a);
    if (s.status == 0) {
        /* out = o_proj o */
        ref_linear_backward(B * T, c->heads * c->Dv, c->D, a.o, w->o_proj, dout, d.o, dw->o_proj);
        s.status = backward(c, w, B, T, x, &a, &d, dx, dw);
    }
    return ref_release(&s);
}
