#include "harness/problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/problem_build.h"
#include "harness/report.h"

static const char *const regime_names[KL_REGIMES] = {"strong", "slow", "mixed", "zero", "-5", "-60|0", "-1000"};

const char *kl_regime_name(kl_regime r) { return (unsigned)r < KL_REGIMES ? regime_names[r] : "unknown"; }

kl_status kl_regime_parse(const char *name, kl_regime *r)
{
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, regime_names[i]) == 0) {
            *r = (kl_regime)i;
            return kl_ok();
        }
    }
    return kl_error(KL_EINVAL, "gate: expected slow, mixed or strong, got '%s'", name);
}

const char *kl_family_name(kl_family f)
{
    static const char *const names[] = {"kda", "dplr", "mla", "moe"};
    return (unsigned)f < 4 ? names[f] : "unknown";
}

const kl_variant *kl_family_variants(kl_family f, int *count)
{
    switch (f) {
    case KL_FAMILY_KDA: return kda_variants(count);
    case KL_FAMILY_DPLR: return dplr_variants(count);
    case KL_FAMILY_MLA: return mla_variants(count);
    case KL_FAMILY_MOE: return moe_variants(count);
    }
    *count = 0;
    return NULL;
}

float *kl_case_output(kl_case *c, kl_arena *a, const char *name, int64_t T, int64_t H, int64_t D, bool gradient, bool accumulates)
{
    bool overflow = T < 0 || H < 0 || D < 0;
    size_t count = kl_mul(kl_mul((size_t)T, (size_t)H, &overflow), (size_t)D, &overflow);
    a->overflow |= overflow;
    float *out = KL_TAKE(a, float, count);
    c->tensor[c->count++] = (kl_case_tensor){.name = name, .out = out, .T = T, .H = H, .D = D, .gradient = gradient, .accumulates = accumulates};
    return out;
}

void kl_fill_typed(uint64_t seed, uint64_t stream, void *x, kl_dtype type, int64_t count, float stddev)
{
    enum { PIECE = 4096 };
    float piece[PIECE];
    kl_rng r = kl_rng_make(seed, stream);
    for (int64_t i = 0; i < count; i += PIECE) {
        size_t n = (size_t)(count - i < PIECE ? count - i : PIECE);
        kl_fill_normal(&r, piece, n, 0.0f, stddev);
        kl_from_f32((char *)x + (size_t)i * kl_dtype_size(type), type, piece, n);
    }
}

kl_status kl_case_build(kl_case *c, kl_lay_out lay_out, const void *spec)
{
    kl_arena a = kl_arena_count();
    lay_out(c, spec, &a);
    size_t available = kl_memory_available();
    if (a.overflow || (available && a.used > available)) {
        char have[32];
        kl_format_bytes((double)available, have, sizeof have);
        return kl_error(KL_ENOMEM, "problem: its tensors do not fit into the %s of memory that are free", have);
    }
    c->memory = aligned_alloc(64, a.used + 64);
    if (!c->memory)
        return kl_error(KL_ENOMEM, "problem: out of memory for %zu bytes", a.used);
    c->bytes = a.used;
    c->count = 0;
    a = kl_arena_over(c->memory, a.used);
    lay_out(c, spec, &a);
    return kl_ok();
}

void kl_case_forget(kl_case *c)
{
    for (int i = 0; i < c->count; i++) {
        free(c->tensor[i].want);
        free(c->tensor[i].terms);
        c->tensor[i].want = c->tensor[i].terms = NULL;
    }
}

void kl_case_free(kl_case *c)
{
    kl_case_forget(c);
    kl_image_free(c->image);
    free(c->memory);
    *c = (kl_case){0};
}

const void *kl_case_problem(const kl_case *c, kl_device device)
{
    return device == KL_CUDA ? &kl_image_case(c->image)->problem : &c->problem;
}

/* The guard behind the workspace. */
enum { GUARD = 64 };

static kl_status grow_host(kl_scratch *s, size_t room)
{
    if (room <= s->host_room)
        return kl_ok();
    free(s->host);
    s->host_room = 0;
    s->host = aligned_alloc(64, room);
    if (!s->host)
        return kl_error(KL_ENOMEM, "workspace: out of memory for %zu bytes", room);
    s->host_room = room;
    return kl_ok();
}

static kl_status grow_device(kl_scratch *s, const kl_ctx *ctx, size_t room)
{
    if (room <= s->device_room)
        return kl_ok();
    if (s->device)
        kl_gpu_free(s->ctx, s->device);
    s->device_room = 0;
    s->ctx = ctx;
    KL_TRY(kl_gpu_alloc(ctx, &s->device, room));
    s->device_room = room;
    return kl_ok();
}

kl_status kl_scratch_for(kl_scratch *s, const kl_ctx *ctx, const kl_variant *v, const kl_case *c, kl_pass pass)
{
    bool device = v->device == KL_CUDA;
    s->bytes = v->workspace ? v->workspace(ctx, kl_case_problem(c, v->device), pass) : 0;
    size_t room = ((s->bytes + 63) & ~(size_t)63) + GUARD;
    KL_REQUIRE(room > s->bytes, "%s %s: its workspace does not fit size_t", v->family, v->name);
    KL_TRY(kl_error_in(device ? grow_device(s, ctx, room) : grow_host(s, room), "%s %s", v->family, v->name));
    s->memory = device ? s->device : s->host;
    return kl_ok();
}

void kl_scratch_free(kl_scratch *s)
{
    free(s->host);
    if (s->device)
        kl_gpu_free(s->ctx, s->device);
    *s = (kl_scratch){0};
}

void kl_case_poison(kl_case *c, kl_pass pass)
{
    for (int i = 0; i < c->count; i++) {
        kl_case_tensor *t = &c->tensor[i];
        if (t->gradient == (pass == KL_BACKWARD))
            memset(t->out, t->accumulates ? 0 : 0xff, (size_t)(t->T * t->H * t->D) * sizeof(float));
    }
}

kl_status kl_case_call(kl_ctx *ctx, const kl_case *c, const kl_variant *v, kl_pass pass, kl_scratch *s)
{
    const kl_case *on = v->device == KL_CUDA ? kl_image_case(c->image) : c;
    if (pass == KL_FORWARD)
        return v->forward(ctx, &on->problem, s->memory, s->bytes);
    return v->backward(ctx, &on->problem, &on->grads, s->memory, s->bytes);
}

static kl_status check_guard(const unsigned char guard[GUARD], const kl_variant *v, const kl_scratch *s)
{
    for (int i = 0; i < GUARD; i++)
        KL_REQUIRE(guard[i] == 0xa5, "%s %s: wrote beyond its workspace of %zu bytes", v->family, v->name, s->bytes);
    return kl_ok();
}

static kl_status run_on_device(kl_ctx *ctx, kl_case *c, const kl_variant *v, kl_pass pass, kl_scratch *s)
{
    unsigned char guard[GUARD];
    void *end = (char *)s->memory + s->bytes;
    KL_TRY(kl_image_send(c->image));
    KL_TRY(kl_gpu_fill(ctx, s->memory, 0xff, s->bytes));
    KL_TRY(kl_gpu_fill(ctx, end, 0xa5, GUARD));
    KL_TRY(kl_case_call(ctx, c, v, pass, s));
    KL_TRY(kl_gpu_sync(ctx));
    KL_TRY(kl_image_fetch(c->image, pass));
    KL_TRY(kl_gpu_copy(ctx, guard, end, GUARD));
    return check_guard(guard, v, s);
}

kl_status kl_case_run(kl_ctx *ctx, kl_case *c, const kl_variant *v, kl_pass pass, kl_scratch *s)
{
    if (v->device == KL_CUDA && !c->image)
        KL_TRY(kl_case_upload(ctx, c));
    KL_TRY(kl_scratch_for(s, ctx, v, c, pass));
    kl_case_poison(c, pass);
    if (v->device == KL_CUDA)
        return run_on_device(ctx, c, v, pass, s);
    unsigned char *guard = (unsigned char *)s->memory + s->bytes;
    memset(s->memory, 0xff, s->bytes);
    memset(guard, 0xa5, GUARD);
    KL_TRY(kl_case_call(ctx, c, v, pass, s));
    return check_guard(guard, v, s);
}

kl_status kl_case_keep(kl_case *c, kl_pass pass)
{
    for (int i = 0; i < c->count; i++) {
        kl_case_tensor *t = &c->tensor[i];
        if (t->gradient != (pass == KL_BACKWARD))
            continue;
        size_t n = (size_t)(t->T * t->H * t->D);
        if (!t->want)
            t->want = malloc((n + 1) * sizeof *t->want);
        if (!t->want)
            return kl_error(KL_ENOMEM, "%s: out of memory for the wanted %s", c->name, t->name);
        for (size_t j = 0; j < n; j++)
            t->want[j] = t->out[j];
    }
    return c->family == KL_FAMILY_KDA && pass == KL_BACKWARD ? kl_case_kda_terms(c) : kl_ok();
}

double kl_case_error(const kl_case_tensor *t)
{
    if (t->want && t->terms)
        return kl_rel_err_sums(t->out, t->want, t->terms, (size_t)(t->T * t->H * t->D));
    return t->want ? kl_rel_err(t->out, t->want, (size_t)(t->T * t->H * t->D)) : NAN;
}

double kl_case_error_blocks(const kl_case_tensor *t)
{
    if (!t->want)
        return NAN;
    return kl_rel_err_blocks(t->out, t->want, (size_t)t->T, (size_t)t->H, (size_t)t->D, KL_SCORE_WINDOW);
}

double kl_case_worst(const kl_case *c, kl_pass pass, const char **tensor)
{
    double worst = 0.0;
    if (tensor)
        *tensor = "";
    for (int i = 0; i < c->count; i++) {
        const kl_case_tensor *t = &c->tensor[i];
        if (t->gradient != (pass == KL_BACKWARD))
            continue;
        double err = kl_case_error(t);
        if (!(err <= worst)) {
            worst = err;
            if (tensor)
                *tensor = t->name;
        }
        if (isnan(worst))
            return worst;
    }
    return worst;
}
