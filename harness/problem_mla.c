#include <math.h>
#include <stdio.h>
#include <string.h>

#include "harness/problem_build.h"

typedef struct mla_layout {
    kl_mla_spec s;
    int64_t queries, keys;
    int64_t *cu_q, *kv_start, *kv_len;
    float *q, *d_o;
    void *latent, *kv_b;
} mla_layout;

static void lay_out(kl_case *c, const void *spec, kl_arena *a)
{
    mla_layout *l = (mla_layout *)spec;
    const kl_mla_spec *s = &l->s;
    int64_t width = s->Dn + s->Dr, latent = s->R + s->Dr, weight = s->H * (s->Dn + s->Dv) * s->R;
    l->cu_q = KL_TAKE(a, int64_t, s->N + 1);
    l->kv_start = KL_TAKE(a, int64_t, s->N);
    l->kv_len = KL_TAKE(a, int64_t, s->N);
    l->q = KL_TAKE(a, float, l->queries * s->H * width);
    l->latent = kl_arena_take(a, (size_t)(l->keys * latent), kl_dtype_size(s->latent_dtype));
    l->kv_b = kl_arena_take(a, (size_t)weight, kl_dtype_size(s->weight_dtype));
    l->d_o = s->backward ? KL_TAKE(a, float, l->queries * s->H * s->Dv) : NULL;

    mla_problem *p = &c->problem.mla;
    *p = (mla_problem){.N = s->N, .H = s->H, .R = s->R, .Dn = s->Dn, .Dr = s->Dr, .Dv = s->Dv, .cu_q = l->cu_q,
                       .kv_start = l->kv_start, .kv_len = l->kv_len, .latent_dtype = s->latent_dtype, .weight_dtype = s->weight_dtype,
                       .q = l->q, .latent = l->latent, .latent_rows = l->keys, .kv_b = l->kv_b};
    p->o = kl_case_output(c, a, "o", l->queries, s->H, s->Dv, false, false);
    p->lse = kl_case_output(c, a, "lse", l->queries, s->H, 1, false, false);
    c->grads.mla = (mla_grads){0};
    if (!s->backward)
        return;
    mla_grads *d = &c->grads.mla;
    d->d_o = l->d_o;
    d->o = s->given ? KL_TAKE(a, float, l->queries * s->H * s->Dv) : NULL;
    d->lse = s->given ? KL_TAKE(a, float, l->queries * s->H) : NULL;
    d->dq = kl_case_output(c, a, "dq", l->queries, s->H, width, true, false);
    d->dlatent = kl_case_output(c, a, "dlatent", l->keys, 1, latent, true, false);
    d->dkv_b = kl_case_output(c, a, "dkv_b", 1, s->H, (s->Dn + s->Dv) * s->R, true, true);
}

kl_status kl_case_mla(kl_case *c, const kl_mla_spec *given)
{
    *c = (kl_case){.family = KL_FAMILY_MLA, .tolerance = kl_tol_mla_f32, .backward = given->backward};
    mla_layout l = {.s = *given};
    kl_mla_spec *s = &l.s;
    s->N = s->N ? s->N : 1;
    KL_REQUIRE(s->N >= 1 && s->H >= 1 && s->R >= 1 && s->Dn >= 0 && s->Dr >= 0 && s->Dn + s->Dr >= 1 && s->Dv >= 1,
               "N, H, R, Dn + Dr, Dv: expected at least 1 each, got %lld, %lld, %lld, %lld + %lld, %lld", (long long)s->N, (long long)s->H,
               (long long)s->R, (long long)s->Dn, (long long)s->Dr, (long long)s->Dv);
    KL_REQUIRE(s->T >= 0 && s->Tq >= 0, "T, Tq: expected at least 0, got %lld, %lld", (long long)s->T, (long long)s->Tq);
    int64_t sizes[] = {s->N, s->H, s->T ? s->T : 1, s->R + s->Dr, s->Dn + s->Dr + s->Dv, 8};
    KL_REQUIRE(kl_sizes_fit(sizes, 6), "problem: N H T (R + Dr) (Dn + Dr + Dv) is beyond 2^62");
    int64_t longest = 0;
    for (int64_t n = 0; n < s->N; n++) {
        int64_t length = s->lengths ? s->lengths[n] : s->T;
        KL_REQUIRE(length >= 0 && length < INT64_C(1) << 40, "lengths[%lld]: expected 0 to 2^40, got %lld", (long long)n, (long long)length);
        l.keys += length;
        l.queries += s->Tq && s->Tq < length ? s->Tq : length;
        longest = length > longest ? length : longest;
    }
    KL_TRY(kl_case_build(c, lay_out, &l));
    if (c->grads.mla.o)
        memset((void *)c->grads.mla.o, 0, (size_t)(l.queries * s->H * (s->Dv + 1)) * sizeof(float));
    l.cu_q[0] = 0;
    for (int64_t n = 0, start = 0; n < s->N; n++) {
        int64_t length = s->lengths ? s->lengths[n] : s->T;
        l.kv_start[n] = start;
        l.kv_len[n] = length;
        l.cu_q[n + 1] = l.cu_q[n] + (s->Tq && s->Tq < length ? s->Tq : length);
        start += length;
    }
    kl_fill_typed(s->seed, 1, l.q, KL_F32, l.queries * s->H * (s->Dn + s->Dr), 1.0f);
    kl_fill_typed(s->seed, 2, l.latent, s->latent_dtype, l.keys * (s->R + s->Dr), 1.0f);
    kl_fill_typed(s->seed, 3, l.kv_b, s->weight_dtype, s->H * (s->Dn + s->Dv) * s->R, 1.0f / sqrtf((float)s->R));
    if (l.d_o)
        kl_fill_typed(s->seed, 4, l.d_o, KL_F32, l.queries * s->H * s->Dv, 1.0f);
    snprintf(c->name, sizeof c->name, "N%lld Tq%lld Tk%lld H%lld R%lld Dn%lld Dr%lld Dv%lld latent %s weight %s%s", (long long)s->N,
             (long long)l.queries, (long long)longest, (long long)s->H, (long long)s->R, (long long)s->Dn, (long long)s->Dr,
             (long long)s->Dv, kl_dtype_name(s->latent_dtype), kl_dtype_name(s->weight_dtype), s->given ? " given" : "");
    return kl_ok();
}

kl_status kl_case_give(kl_case *c)
{
    const mla_problem *p = &c->problem.mla;
    const mla_grads *g = &c->grads.mla;
    if (c->family != KL_FAMILY_MLA || !c->backward || !g->o)
        return kl_ok();
    memcpy((void *)g->o, p->o, (size_t)(p->cu_q[p->N] * p->H * p->Dv) * sizeof(float));
    memcpy((void *)g->lse, p->lse, (size_t)(p->cu_q[p->N] * p->H) * sizeof(float));
    return c->image ? kl_case_upload(kl_image_context(c->image), c) : kl_ok();
}
