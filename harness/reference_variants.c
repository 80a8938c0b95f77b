#include "harness/reference_variants.h"

#include "common/arena.h"
#include "reference/mla.h"
#include "reference/moe.h"

const kl_variant *kl_reference_variant(kl_family f)
{
    switch (f) {
    case KL_FAMILY_KDA: return &kl_reference_kda;
    case KL_FAMILY_DPLR: return &kl_reference_dplr;
    case KL_FAMILY_MLA: return &kl_reference_mla;
    case KL_FAMILY_MOE: return &kl_reference_moe;
    }
    return NULL;
}

static void widen(double *y, const void *x, kl_dtype type, int64_t first, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = kl_element(x, type, first + i);
}

static void narrow(void *y, kl_dtype type, const double *x, int64_t first, int64_t n)
{
    for (int64_t i = 0; y && i < n; i++)
        kl_set_element(y, type, first + i, x[i]);
}

static kl_status accept(const void *problem, kl_pass pass)
{
    (void)problem, (void)pass;
    return kl_ok();
}

/* ---- MLA, a sequence at a time ---- */

typedef struct mla_wide {
    double *q, *c, *W, *o, *lse, *dq, *dc, *dW;
} mla_wide;

static mla_wide lay_out_mla(const mla_problem *p, kl_pass pass, kl_arena *a)
{
    int64_t Tq = 0, Tk = 0, weight = p->H * (p->Dn + p->Dv) * p->R;
    for (int64_t n = 0; n < p->N; n++) {
        Tq = p->cu_q[n + 1] - p->cu_q[n] > Tq ? p->cu_q[n + 1] - p->cu_q[n] : Tq;
        Tk = p->kv_len[n] > Tk ? p->kv_len[n] : Tk;
    }
    mla_wide w = {0};
    w.q = KL_TAKE(a, double, Tq * p->H * (p->Dn + p->Dr));
    w.c = KL_TAKE(a, double, Tk * (p->R + p->Dr));
    w.W = KL_TAKE(a, double, weight);
    w.o = KL_TAKE(a, double, Tq * p->H * p->Dv);
    w.lse = KL_TAKE(a, double, Tq * p->H);
    if (pass == KL_BACKWARD) {
        w.dq = KL_TAKE(a, double, Tq * p->H * (p->Dn + p->Dr));
        w.dc = KL_TAKE(a, double, Tk * (p->R + p->Dr));
        w.dW = KL_TAKE(a, double, weight);
    }
    return w;
}

static size_t workspace_mla(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    (void)ctx;
    kl_arena a = kl_arena_count();
    lay_out_mla(problem, pass, &a);
    return a.overflow ? SIZE_MAX : a.used;
}

static ref_mla mla_sequence(const mla_problem *p, const mla_wide *w, int64_t n)
{
    int64_t Tq = p->cu_q[n + 1] - p->cu_q[n], width = p->H * (p->Dn + p->Dr), latent = p->R + p->Dr;
    for (int64_t t = 0; t < Tq; t++)
        widen(w->q + t * width, p->q, p->dtype, (p->cu_q[n] + t) * (p->q_stride ? p->q_stride : width), width);
    widen(w->c, p->latent, p->latent_dtype, p->kv_start[n] * latent, p->kv_len[n] * latent);
    return (ref_mla){.Tq = Tq, .Tk = p->kv_len[n], .H = p->H, .Dn = p->Dn, .Dr = p->Dr, .Dv = p->Dv, .R = p->R, .scale = p->scale,
                     .q = w->q, .c = w->c, .W = w->W};
}

static kl_status forward_mla(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const mla_problem *p = problem;
    KL_TRY(mla_validate(ctx, p));
    kl_arena a = kl_arena_over(memory, bytes);
    mla_wide w = lay_out_mla(p, KL_FORWARD, &a);
    KL_REQUIRE(!a.overflow, "workspace: expected %zu bytes, got %zu", workspace_mla(ctx, p, KL_FORWARD), bytes);
    widen(w.W, p->kv_b, p->weight_dtype, 0, p->H * (p->Dn + p->Dv) * p->R);
    for (int64_t n = 0; n < p->N; n++) {
        ref_mla r = mla_sequence(p, &w, n);
        if (ref_mla_forward(&r, w.o, w.lse) != 0)
            return kl_error(KL_ENOMEM, "mla reference: out of memory");
        narrow(p->o, p->dtype, w.o, p->cu_q[n] * p->H * p->Dv, r.Tq * p->H * p->Dv);
        narrow(p->lse, KL_F32, w.lse, p->cu_q[n] * p->H, r.Tq * p->H);
    }
    return kl_ok();
}

static kl_status backward_mla(kl_ctx *ctx, const void *problem, const void *grads, void *memory, size_t bytes)
{
    const mla_problem *p = problem;
    const mla_grads *g = grads;
    KL_TRY(mla_validate(ctx, p));
    KL_TRY(mla_validate_grads(p, g));
    kl_arena a = kl_arena_over(memory, bytes);
    mla_wide w = lay_out_mla(p, KL_BACKWARD, &a);
    KL_REQUIRE(!a.overflow, "workspace: expected %zu bytes, got %zu", workspace_mla(ctx, p, KL_BACKWARD), bytes);
    int64_t weight = p->H * (p->Dn + p->Dv) * p->R, width = p->H * (p->Dn + p->Dr), latent = p->R + p->Dr;
    widen(w.W, p->kv_b, p->weight_dtype, 0, weight);
    kl_clear(w.dW, weight);
    for (int64_t n = 0; n < p->N; n++) {
        ref_mla r = mla_sequence(p, &w, n);
        widen(w.o, g->d_o, p->dtype, p->cu_q[n] * p->H * p->Dv, r.Tq * p->H * p->Dv);
        kl_clear(w.dq, r.Tq * width);
        kl_clear(w.dc, r.Tk * latent);
        if (ref_mla_backward(&r, w.o, w.dq, w.dc, w.dW) != 0)
            return kl_error(KL_ENOMEM, "mla reference: out of memory");
        for (int64_t t = 0; g->dq && t < r.Tq; t++)
            for (int64_t i = 0; i < width; i++)
                kl_set_element(g->dq, p->dtype, (p->cu_q[n] + t) * (p->q_stride ? p->q_stride : width) + i, w.dq[t * width + i]);
        narrow(g->dlatent, KL_F32, w.dc, p->kv_start[n] * latent, r.Tk * latent);
    }
    kl_add_to(g->dkv_b, w.dW, weight);
    return kl_ok();
}

/* Every visible pair costs a product of Dn + Dr and one of Dv; backward five such products instead of two. */
static kl_cost cost_mla(const void *problem, kl_pass pass)
{
    const mla_problem *p = problem;
    double pairs = 0.0, keys = 0.0, queries = 0.0, H = (double)p->H;
    for (int64_t n = 0; n < p->N; n++) {
        double Tq = (double)(p->cu_q[n + 1] - p->cu_q[n]), Tk = (double)p->kv_len[n];
        pairs += Tq * Tk - 0.5 * Tq * (Tq - 1.0);
        keys += Tk;
        queries += Tq;
    }
    double width = (double)(p->Dn + p->Dr), Dv = (double)p->Dv, weight = H * (double)((p->Dn + p->Dv) * p->R);
    double bytes = 4.0 * queries * H * (width + Dv) + keys * (double)(p->R + p->Dr) * (double)kl_dtype_size(p->latent_dtype) +
                   weight * (double)kl_dtype_size(p->weight_dtype);
    double passes = pass == KL_BACKWARD ? 2.5 : 1.0;
    return (kl_cost){2.0 * passes * pairs * H * (width + Dv), (pass == KL_BACKWARD ? 2.0 : 1.0) * bytes};
}

const kl_variant kl_reference_mla = {"mla", "reference", KL_CPU, "explicit softmax in double precision", accept, workspace_mla,
                                     forward_mla, backward_mla, cost_mla};

/* ---- MoE ---- */

typedef struct moe_wide {
    double *x, *router, *bias, *w1, *w3, *w2, *s1, *s3, *s2, *y, *weight;
    const double **w1s, **w3s, **w2s;
    double *dx, *drouter, *dw1, *dw3, *dw2, *ds1, *ds3, *ds2;
    double **dw1s, **dw3s, **dw2s;
    int64_t *ids;
} moe_wide;

static moe_wide lay_out_moe(const moe_problem *p, kl_pass pass, kl_arena *a)
{
    moe_wide w = {0};
    int64_t expert = p->E * p->I * p->D, shared = p->Is * p->D;
    w.x = KL_TAKE(a, double, p->T * p->D);
    w.y = KL_TAKE(a, double, p->T * p->D);
    w.router = KL_TAKE(a, double, p->E * p->D);
    w.bias = KL_TAKE(a, double, p->E);
    w.weight = KL_TAKE(a, double, p->T * p->top_k);
    w.ids = KL_TAKE(a, int64_t, p->T * p->top_k);
    double **flat[] = {&w.w1, &w.w3, &w.w2, &w.dw1, &w.dw3, &w.dw2}, **common[] = {&w.s1, &w.s3, &w.s2, &w.ds1, &w.ds3, &w.ds2};
    for (int i = 0; i < (pass == KL_BACKWARD ? 6 : 3); i++) {
        *flat[i] = KL_TAKE(a, double, expert);
        *common[i] = KL_TAKE(a, double, shared);
    }
    const double ***table[] = {&w.w1s, &w.w3s, &w.w2s};
    double ***dtable[] = {&w.dw1s, &w.dw3s, &w.dw2s};
    for (int i = 0; i < 3; i++) {
        *table[i] = KL_TAKE(a, const double *, p->E);
        *dtable[i] = KL_TAKE(a, double *, p->E);
        for (int64_t e = 0; a->base && !a->overflow && e < p->E; e++) {
            (*table[i])[e] = *flat[i] + e * p->I * p->D;
            (*dtable[i])[e] = pass == KL_BACKWARD ? *flat[i + 3] + e * p->I * p->D : NULL;
        }
    }
    if (pass == KL_BACKWARD) {
        w.dx = KL_TAKE(a, double, p->T * p->D);
        w.drouter = KL_TAKE(a, double, p->E * p->D);
    }
    return w;
}

static size_t workspace_moe(const kl_ctx *ctx, const void *problem, kl_pass pass)
{
    (void)ctx;
    kl_arena a = kl_arena_count();
    lay_out_moe(problem, pass, &a);
    return a.overflow ? SIZE_MAX : a.used;
}

static ref_moe moe_widened(const moe_problem *p, const moe_wide *w)
{
    int64_t expert = p->I * p->D, shared = p->Is * p->D;
    widen(w->x, p->x, p->dtype, 0, p->T * p->D);
    if (p->E)
        widen(w->router, p->router, p->router_dtype, 0, p->E * p->D);
    if (p->bias)
        widen(w->bias, p->bias, KL_F32, 0, p->E);
    for (int64_t e = 0; e < p->E; e++) {
        widen(w->w1 + e * expert, p->w1[e], p->weight_dtype, 0, expert);
        widen(w->w3 + e * expert, p->w3[e], p->weight_dtype, 0, expert);
        widen(w->w2 + e * expert, p->w2[e], p->weight_dtype, 0, expert);
    }
    if (p->Is) {
        widen(w->s1, p->shared_w1, p->weight_dtype, 0, shared);
        widen(w->s3, p->shared_w3, p->weight_dtype, 0, shared);
        widen(w->s2, p->shared_w2, p->weight_dtype, 0, shared);
    }
    return (ref_moe){.T = p->T, .D = p->D, .E = p->E, .I = p->I, .Is = p->Is, .top_k = p->top_k, .n_group = p->n_group,
                     .topk_group = p->topk_group, .router = p->router_kind == MOE_SOFTMAX ? REF_ROUTER_SOFTMAX : REF_ROUTER_SIGMOID,
                     .renormalize = p->renormalize, .biased_weights = p->biased_weights, .scaling = p->scale, .x = w->x,
                     .w_router = w->router, .bias = p->bias ? w->bias : NULL, .w1 = w->w1s, .w2 = w->w2s, .w3 = w->w3s,
                     .s1 = w->s1, .s3 = w->s3, .s2 = w->s2};
}

static kl_status forward_moe(kl_ctx *ctx, const void *problem, void *memory, size_t bytes)
{
    const moe_problem *p = problem;
    KL_TRY(moe_validate(ctx, p));
    kl_arena a = kl_arena_over(memory, bytes);
    moe_wide w = lay_out_moe(p, KL_FORWARD, &a);
    KL_REQUIRE(!a.overflow, "workspace: expected %zu bytes, got %zu", workspace_moe(ctx, p, KL_FORWARD), bytes);
    ref_moe r = moe_widened(p, &w);
    bool routed = p->E && (p->chosen || p->chosen_weight);
    if (ref_moe_forward(&r, w.y) != 0 || (routed && ref_moe_route(&r, w.ids, w.weight) != 0))
        return kl_error(KL_ENOMEM, "moe reference: out of memory");
    narrow(p->y, p->dtype, w.y, 0, p->T * p->D);
    for (int64_t i = 0; routed && i < p->T * p->top_k; i++) {
        if (p->chosen)
            p->chosen[i] = (int32_t)w.ids[i];
        if (p->chosen_weight)
            p->chosen_weight[i] = (float)w.weight[i];
    }
    return kl_ok();
}

static kl_status backward_moe(kl_ctx *ctx, const void *problem, const void *grads, void *memory, size_t bytes)
{
    const moe_problem *p = problem;
    const moe_grads *g = grads;
    KL_TRY(moe_validate(ctx, p));
    KL_TRY(moe_validate_grads(p, g));
    kl_arena a = kl_arena_over(memory, bytes);
    moe_wide w = lay_out_moe(p, KL_BACKWARD, &a);
    KL_REQUIRE(!a.overflow, "workspace: expected %zu bytes, got %zu", workspace_moe(ctx, p, KL_BACKWARD), bytes);
    ref_moe r = moe_widened(p, &w);
    int64_t expert = p->I * p->D, shared = p->Is * p->D;
    widen(w.y, g->dy, p->dtype, 0, p->T * p->D);
    kl_clear(w.dx, p->T * p->D);
    kl_clear(w.drouter, p->E * p->D);
    double *routed[] = {w.dw1, w.dw3, w.dw2}, *common[] = {w.ds1, w.ds3, w.ds2};
    for (int i = 0; i < 3; i++) {
        kl_clear(routed[i], p->E * expert);
        kl_clear(common[i], shared);
    }
    ref_moe_grad d = {.dx = w.dx, .dw_router = w.drouter, .dw1 = w.dw1s, .dw2 = w.dw2s, .dw3 = w.dw3s, .ds1 = w.ds1, .ds3 = w.ds3, .ds2 = w.ds2};
    if (ref_moe_backward(&r, w.y, &d) != 0)
        return kl_error(KL_ENOMEM, "moe reference: out of memory");
    narrow(g->dx, p->dtype, w.dx, 0, p->T * p->D);
    kl_add_to(g->drouter, w.drouter, p->E * p->D);
    float *const *out[] = {g->dw1, g->dw3, g->dw2};
    for (int i = 0; i < 3; i++)
        for (int64_t e = 0; out[i] && e < p->E; e++)
            kl_add_to(out[i][e], routed[i] + e * expert, expert);
    kl_add_to(g->dshared_w1, w.ds1, shared);
    kl_add_to(g->dshared_w3, w.ds3, shared);
    kl_add_to(g->dshared_w2, w.ds2, shared);
    return kl_ok();
}

/* Three products for each expert that a token meets; a weight is read once if any token meets it. */
static kl_cost cost_moe(const void *problem, kl_pass pass)
{
    const moe_problem *p = problem;
    double T = (double)p->T, D = (double)p->D, met = (double)(p->top_k * p->T);
    double experts = met < (double)p->E ? met : (double)p->E;
    double flops = 6.0 * T * D * (double)(p->top_k * p->I * (p->E > 0) + p->Is) + 2.0 * T * D * (double)p->E;
    double weights = 3.0 * D * (experts * (double)p->I + (double)p->Is) * (double)kl_dtype_size(p->weight_dtype) + 4.0 * D * (double)p->E;
    double passes = pass == KL_BACKWARD ? 2.0 : 1.0;
    return (kl_cost){(pass == KL_BACKWARD ? 3.0 : 1.0) * flops, passes * (8.0 * T * D + weights)};
}

const kl_variant kl_reference_moe = {"moe", "reference", KL_CPU, "token by token in double precision", accept, workspace_moe,
                                     forward_moe, backward_moe, cost_moe};
