/* Loss and gradients. The stream before every layer is kept; what a layer computes inside is kept too while that
 * fits the model's keep_bytes, and recomputed from the stream otherwise: the same operations, the same bits. */
#include <stdlib.h>

#include "harness/model_internal.h"

static const size_t KEEP_BYTES = (size_t)1 << 30;

typedef struct buffers {
    float **stream;         /* [layers+1] -> [T,D] before layer l; the last one after them all */
    float *normed;          /* [T,D] after the final norm */
    float *dx, *dh;         /* [T,D] */
    kl_layer_acts *acts;    /* [layers], or one that serves them all */
    bool kept;
    kl_kda_acts dkda;
    kl_mla_acts dmla;
} buffers;

static kl_layer_acts *acts_of(const buffers *b, int64_t l) { return &b->acts[b->kept ? l : 0]; }

static size_t carve(kl_arena a, const kl_call *c, bool gradients, buffers *b)
{
    const kl_config *k = &c->m->config;
    size_t n = kl_mul((size_t)c->T, (size_t)k->hidden_size, &a.overflow);
    bool chosen = c->m->expert_load != NULL;
    for (int64_t l = 0; l <= k->num_layers; l++)
        b->stream[l] = l && !gradients ? b->stream[0] : KL_TAKE(&a, float, n);
    b->normed = KL_TAKE(&a, float, n);
    for (int64_t l = 0; l < (b->kept ? k->num_layers : 1); l++)
        kl_layer_carve(&a, k, c->T, gradients, chosen, &b->acts[l]);
    if (gradients) {
        b->dx = KL_TAKE(&a, float, n);
        b->dh = KL_TAKE(&a, float, n);
        kl_arena second = a;
        kl_kda_carve(&a, k, c->T, true, &b->dkda);
        kl_mla_carve(&second, k, c->T, &b->dmla);
        a.used = a.used > second.used ? a.used : second.used;
        a.overflow = a.overflow || second.overflow;
    }
    return a.overflow ? SIZE_MAX : a.used;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static kl_status lay_out(kl_call *c, bool gradients, buffers *b)
{
    const kl_model *m = c->m;
    b->kept = gradients;
    if (gradients)
        b->kept = carve(kl_arena_count(), c, true, b) <= (m->keep_bytes ? m->keep_bytes : KEEP_BYTES);
    size_t acts = carve(kl_arena_count(), c, gradients, b);
    if (acts == SIZE_MAX)
        return kl_error(KL_ENOMEM, "workspace: %lld tokens need more memory than can be addressed", (long long)c->T);
    KL_TRY(kl_model_reserve(c->m, acts));
    carve(kl_arena_over(m->workspace, acts), c, gradients, b);
    c->scratch_bytes = larger(kl_layer_scratch(c, b->acts, KL_FORWARD), m->ops->head_loss_workspace(m->ctx, &m->weights.lm_head, c->T));
    if (gradients)
        c->scratch_bytes = larger(c->scratch_bytes, kl_layer_scratch(c, b->acts, KL_BACKWARD));
    if (c->scratch_bytes > SIZE_MAX - acts)
        return kl_error(KL_ENOMEM, "workspace: %lld tokens need more memory than can be addressed", (long long)c->T);
    KL_TRY(kl_model_reserve(c->m, acts + c->scratch_bytes));
    carve(kl_arena_over(m->workspace, acts), c, gradients, b);
    c->scratch = (char *)m->workspace + acts;
    return kl_ok();
}

static void count_load(const kl_call *c, int64_t l, const int32_t *chosen)
{
    const kl_config *k = &c->m->config;
    if (!c->m->expert_load || !k->sparse[l])
        return;
    for (int64_t i = 0; i < c->T * k->top_k; i++)
        c->m->expert_load[l * k->num_experts + chosen[i]]++;
}

static kl_status layer_backward(const kl_call *c, int64_t l, const buffers *b, kl_layer *g)
{
    const kl_ops *ops = c->m->ops;
    const kl_config *k = &c->m->config;
    const kl_layer *w = &c->m->weights.layers[l];
    const kl_layer_acts *a = acts_of(b, l);
    kl_ctx *ctx = c->m->ctx;
    int64_t T = c->T, D = k->hidden_size;
    if (!b->kept)
        KL_TRY(kl_layer_forward(c, l, b->stream[l], a, b->normed)); /* normed: spent by now */

    /* forward: out = mid + mlp(norm(mid)) */
    KL_TRY(kl_mlp_layer_backward(c, l, a, b->dx, b->dh, g));
    KL_TRY(ops->rmsnorm_backward(ctx, &w->post_norm, k->rms_norm_eps, T, D, a->mid, D, b->dh, D, b->dx, D, true, &g->post_norm));

    /* forward: mid = in + mixer(norm(in)) */
    if (k->mixer[l] == KL_MIX_MLA)
        KL_TRY(kl_mla_layer_backward(c, l, a->h_mix, &a->mla, b->dx, &b->dmla, b->dh, g));
    else
        KL_TRY(kl_kda_layer_backward(c, l, a->h_mix, &a->kda, b->dx, &b->dkda, b->dh, g));
    return ops->rmsnorm_backward(ctx, &w->input_norm, k->rms_norm_eps, T, D, b->stream[l], D, b->dh, D, b->dx, D, true, &g->input_norm);
}

static kl_status check_targets(const kl_call *c, const int32_t *targets, int64_t *counted)
{
    KL_REQUIRE(targets || c->T == 0, "targets: expected %lld ids, got NULL", (long long)c->T);
    *counted = 0;
    for (int64_t t = 0; t < c->T; t++) {
        KL_REQUIRE(targets[t] >= -1 && targets[t] < c->m->config.vocab_size, "targets[%lld]: expected -1 to %lld, got %d",
                   (long long)t, (long long)(c->m->config.vocab_size - 1), (int)targets[t]);
        *counted += targets[t] >= 0;
    }
    return kl_ok();
}

static kl_status run(kl_call *c, buffers *b, const int32_t *targets, int64_t counted, double *loss, kl_weights *grads, float grad_scale)
{
    kl_model *m = c->m;
    const kl_ops *ops = m->ops;
    const kl_weights *w = &m->weights;
    int64_t L = m->config.num_layers, D = m->config.hidden_size;
    float eps = m->config.rms_norm_eps;
    double sum = 0;
    KL_TRY(lay_out(c, grads != NULL, b));
    KL_TRY(ops->embed(m->ctx, &w->embed, c->ids, c->T, b->stream[0]));
    for (int64_t l = 0; l < L; l++) {
        KL_TRY(kl_layer_forward(c, l, b->stream[l], acts_of(b, l), b->stream[l + 1]));
        count_load(c, l, acts_of(b, l)->chosen);
    }
    KL_TRY(ops->rmsnorm(m->ctx, &w->norm, eps, c->T, D, b->stream[L], D, b->normed, D));
    KL_TRY(ops->head_loss(m->ctx, &w->lm_head, c->T, b->normed, targets, &sum, &counted, grad_scale / (float)counted, b->dh,
                          grads ? &grads->lm_head : NULL, c->scratch, c->scratch_bytes));
    *loss = sum / (double)counted;
    if (!grads)
        return kl_ok();
    KL_TRY(ops->rmsnorm_backward(m->ctx, &w->norm, eps, c->T, D, b->stream[L], D, b->dh, D, b->dx, D, false, &grads->norm));
    for (int64_t l = L - 1; l >= 0; l--) {
        kl_status s = layer_backward(c, l, b, &grads->layers[l]);
        if (kl_failed(s))
            return kl_error_in(s, "layer %lld, backward", (long long)l);
    }
    return ops->embed_backward(m->ctx, &grads->embed, c->ids, c->T, b->dx);
}

kl_status kl_model_loss(kl_model *m, const kl_batch *batch, const int32_t *targets, double *loss, int64_t *tokens,
                        kl_weights *grads, float grad_scale)
{
    KL_REQUIRE(loss, "loss: expected a place for it, got NULL");
    kl_call c;
    KL_TRY(kl_call_begin(&c, m, batch, NULL));
    int64_t counted = 0;
    KL_TRY(check_targets(&c, targets, &counted));
    *loss = 0;
    if (tokens)
        *tokens = counted;
    if (counted == 0)
        return kl_ok();
    size_t L = (size_t)m->config.num_layers;
    buffers b = {.stream = calloc(L + 1, sizeof *b.stream), .acts = calloc(L, sizeof *b.acts)};
    kl_status s = b.stream && b.acts ? run(&c, &b, targets, counted, loss, grads, grad_scale)
                                     : kl_error(KL_ENOMEM, "loss: out of memory");
    free(b.stream);
    free(b.acts);
    return s;
}
