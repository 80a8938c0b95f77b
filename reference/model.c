#include "reference/model.h"

#include "reference/linear.h"
#include "reference/loss.h"
#include "reference/mixer.h"
#include "reference/mlp.h"
#include "reference/scratch.h"

/* ---- one layer ---- */

static int mixer_forward(const ref_config *c, const ref_layer *w, int64_t l, int64_t B, int64_t T, const real *x, real *out)
{
    return c->mixer[l] == REF_MIX_KDA ? ref_kda_layer_forward(c, w, B, T, x, out) : ref_mla_layer_forward(c, w, B, T, x, out);
}

static int mixer_backward(const ref_config *c, const ref_layer *w, int64_t l, int64_t B, int64_t T, const real *x, const real *dout,
                          real *dx, const ref_layer *dw)
{
    return c->mixer[l] == REF_MIX_KDA ? ref_kda_layer_backward(c, w, B, T, x, dout, dx, dw)
                                      : ref_mla_layer_backward(c, w, B, T, x, dout, dx, dw);
}

static ref_mlp dense(const ref_config *c, const ref_layer *w)
{
    return (ref_mlp){ .D = c->D, .I = c->I_dense, .w1 = w->gate_proj, .w3 = w->up_proj, .w2 = w->down_proj };
}

static ref_moe sparse(const ref_config *c, const ref_layer *w, int64_t N, const real *x)
{
    return (ref_moe){ .T = N, .D = c->D, .E = c->E, .I = c->I, .Is = c->Is, .top_k = c->top_k, .n_group = c->n_group,
                      .topk_group = c->topk_group, .router = c->router, .renormalize = c->renormalize,
                      .biased_weights = c->biased_weights, .scaling = c->scaling, .x = x, .w_router = w->router,
                      .bias = w->router_bias, .w1 = (const real *const *)w->w1, .w2 = (const real *const *)w->w2,
                      .w3 = (const real *const *)w->w3, .s1 = w->shared_gate, .s3 = w->shared_up, .s2 = w->shared_down };
}

static int feed_forward(const ref_config *c, const ref_layer *w, int64_t l, int64_t N, const real *x, real *out)
{
    if (c->sparse[l]) {
        ref_moe moe = sparse(c, w, N, x);
        return ref_moe_forward(&moe, out);
    }
    ref_mlp mlp = dense(c, w);
    int status = 0;
    for (int64_t n = 0; n < N; n++)
        status |= ref_mlp_forward(&mlp, x + n * c->D, out + n * c->D);
    return status;
}

static int feed_forward_backward(const ref_config *c, const ref_layer *w, int64_t l, int64_t N, const real *x, const real *dout,
                                 real *dx, const ref_layer *dw)
{
    if (c->sparse[l]) {
        ref_moe moe = sparse(c, w, N, x);
        ref_moe_grad d = { .dx = dx, .dw_router = dw->router, .dw1 = dw->w1, .dw2 = dw->w2, .dw3 = dw->w3,
                           .ds1 = dw->shared_gate, .ds2 = dw->shared_down, .ds3 = dw->shared_up };
        return ref_moe_backward(&moe, dout, &d);
    }
    ref_mlp mlp = dense(c, w);
    ref_mlp_grad d = { .dw1 = dw->gate_proj, .dw3 = dw->up_proj, .dw2 = dw->down_proj };
    int status = 0;
    for (int64_t n = 0; n < N; n++)
        status |= ref_mlp_backward(&mlp, x + n * c->D, dout + n * c->D, dx + n * c->D, &d);
    return status;
}

/* m = x + mixer(h1), y = m + feed_forward(h2), with h1 = norm(x), h2 = norm(m). All [N,D], N = B*T; h1, m, h2, y are overwritten. */
static int layer_forward(const ref_config *c, const ref_layer *w, int64_t l, int64_t B, int64_t T, const real *x,
                         real *h1, real *m, real *h2, real *y)
{
    int64_t N = B * T, size = N * c->D;
    ref_rmsnorm_forward(N, c->D, c->norm_eps, x, w->input_norm, h1);
    int status = mixer_forward(c, w, l, B, T, h1, m);
    ref_add(size, x, m);
    ref_rmsnorm_forward(N, c->D, c->norm_eps, m, w->post_norm, h2);
    status |= feed_forward(c, w, l, N, h2, y);
    ref_add(size, m, y);
    return status;
}

/* d [N,D] is dy on entry and dx on return. */
static int layer_backward(const ref_config *c, const ref_layer *w, int64_t l, int64_t B, int64_t T, const real *x, real *d, const ref_layer *dw)
{
    int64_t N = B * T, size = N * c->D;
    ref_scratch s = { 0 };
    real *h1 = ref_take(&s, size), *m = ref_take(&s, size), *h2 = ref_take(&s, size), *y = ref_take(&s, size);
    real *dh1 = ref_take(&s, size), *dh2 = ref_take(&s, size);
    if (s.status == 0)
        s.status = layer_forward(c, w, l, B, T, x, h1, m, h2, y);
    if (s.status == 0) {
        /* y = m + feed_forward(h2),  h2 = norm(m) */
        s.status = feed_forward_backward(c, w, l, N, h2, d, dh2, dw);
        ref_rmsnorm_backward(N, c->D, c->norm_eps, m, w->post_norm, dh2, d, dw->post_norm);
        /* m = x + mixer(h1),  h1 = norm(x) */
        s.status |= mixer_backward(c, w, l, B, T, h1, d, dh1, dw);
        ref_rmsnorm_backward(N, c->D, c->norm_eps, x, w->input_norm, dh1, d, dw->input_norm);
    }
    return ref_release(&s);
}

/* ---- the model ---- */

/* The matrix [vocab,D] of the head. */
static real *head(const ref_config *c, const ref_weights *w)
{
    return c->tied ? w->embed : w->lm_head;
}

/* What a pass computes outside the layers, N = B*T. */
typedef struct {
    real *x;            /* [L+1,N,D] the residual stream: x_0 .. x_L */
    real *h;            /* [N,D] norm(x_L) */
    real *logits;       /* [N,vocab] */
    int64_t *targets;   /* [N] */
    real loss;
} pass;

static int new_pass(const ref_config *c, const ref_batch *batch, ref_scratch *s, pass *p)
{
    int64_t N = batch->B * batch->T, T = batch->T;
    *p = (pass){ .x = ref_take(s, (c->L + 1) * N * c->D), .h = ref_take(s, N * c->D), .logits = ref_take(s, N * c->vocab),
                 .targets = malloc(((size_t)N + 1) * sizeof(int64_t)) };
    if (!p->targets)
        return s->status = -1;
    for (int64_t n = 0; n < N; n++)
        p->targets[n] = batch->targets ? batch->targets[n] : (n + 1) % T ? batch->ids[n + 1] : -1;
    return s->status;
}

static int run(const ref_config *c, const ref_weights *w, const ref_batch *batch, pass *p)
{
    int64_t N = batch->B * batch->T, size = N * c->D;
    ref_scratch s = { 0 };
    real *h1 = ref_take(&s, size), *m = ref_take(&s, size), *h2 = ref_take(&s, size);
    if (s.status == 0)
        ref_embedding_forward(N, c->D, batch->ids, w->embed, p->x);
    for (int64_t l = 0; l < c->L && s.status == 0; l++)
        s.status = layer_forward(c, &w->layers[l], l, batch->B, batch->T, p->x + l * size, h1, m, h2, p->x + (l + 1) * size);
    if (s.status == 0) {
        ref_rmsnorm_forward(N, c->D, c->norm_eps, p->x + c->L * size, w->norm, p->h);
        ref_linear_forward(N, c->D, c->vocab, p->h, head(c, w), p->logits);
        p->loss = ref_cross_entropy_forward(N, c->vocab, p->logits, p->targets);
    }
    return ref_release(&s);
}

int ref_model_forward(const ref_config *c, const ref_weights *w, const ref_batch *batch, ref_outputs *out)
{
    int64_t N = batch->B * batch->T, size = N * c->D;
    ref_scratch s = { 0 };
    pass p;
    if (new_pass(c, batch, &s, &p) == 0)
        s.status = run(c, w, batch, &p);
    if (s.status == 0) {
        if (out->logits)
            ref_copy(N * c->vocab, p.logits, out->logits);
        if (out->hidden) {
            ref_copy(c->L * size, p.x, out->hidden);
            ref_copy(size, p.h, out->hidden + c->L * size);
        }
        out->loss = p.loss;
    }
    free(p.targets);
    return ref_release(&s);
}

int ref_model_backward(const ref_config *c, const ref_weights *w, const ref_batch *batch, real *loss, const ref_weights *dw)
{
    int64_t N = batch->B * batch->T, size = N * c->D;
    ref_scratch s = { 0 };
    pass p;
    real *dlogits = ref_take(&s, N * c->vocab), *dh = ref_take(&s, size), *d = ref_take(&s, size);
    if (new_pass(c, batch, &s, &p) == 0)
        s.status = run(c, w, batch, &p);
    if (s.status == 0) {
        /* loss = cross_entropy(logits),  logits = head h,  h = norm(x_L) */
        ref_cross_entropy_backward(N, c->vocab, p.logits, p.targets, 1, dlogits);
        ref_linear_backward(N, c->D, c->vocab, p.h, head(c, w), dlogits, dh, head(c, dw));
        ref_rmsnorm_backward(N, c->D, c->norm_eps, p.x + c->L * size, w->norm, dh, d, dw->norm);
        /* x_{l+1} = layer_l(x_l) */
        for (int64_t l = c->L - 1; l >= 0 && s.status == 0; l--)
            s.status = layer_backward(c, &w->layers[l], l, batch->B, batch->T, p.x + l * size, d, &dw->layers[l]);
        /* x_0 = embed[ids] */
        ref_embedding_backward(N, c->D, batch->ids, d, dw->embed);
        if (loss)
            *loss = p.loss;
    }
    free(p.targets);
    return ref_release(&s);
}
