#include "harness/bench.h"

#include <math.h>
#include <string.h>

#include "harness/reference_variants.h"

/* How much work the reference may be given: a few seconds. */
static const double reference_flops = 2e9;

/* Operations of the reference: the problem's own, and for MLA the keys and values that it expands one by one. */
static double reference_work(const kl_case *c, kl_pass pass)
{
    double flops = kl_reference_variant(c->family)->cost(&c->problem, pass).flops;
    if (c->family == KL_FAMILY_MLA) {
        const mla_problem *p = &c->problem.mla;
        flops += (pass == KL_BACKWARD ? 6.0 : 2.0) * (double)p->latent_rows * (double)(p->H * (p->Dn + p->Dv)) * (double)p->R;
    }
    return flops;
}

static kl_status build(const kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass, int64_t T, kl_case *c)
{
    bool backward = pass == KL_BENCH_BWD;
    int64_t lengths[KL_SHAPE_LENGTHS];
    for (int64_t i = 0; i < s->length_count; i++)
        lengths[i] = s->lengths[i] * T / s->T;
    const int64_t *packed = s->length_count ? lengths : NULL;
    if (family == KL_FAMILY_KDA)
        return kl_case_kda(c, &(kl_kda_spec){.B = packed ? 1 : s->B, .T = T, .H = s->H, .HV = s->HV, .K = s->K, .V = s->V, .G = s->G,
                                             .chunk = s->C, .lengths = packed, .sequences = s->length_count, .regime = b->regime,
                                             .state = true, .backward = backward, .seed = 1});
    if (family == KL_FAMILY_MLA)
        return kl_case_mla(c, &(kl_mla_spec){.N = packed ? s->length_count : s->N, .T = T, .Tq = pass == KL_BENCH_DECODE ? 1 : s->Tq, .H = s->H,
                                             .R = s->R, .Dn = s->Dn, .Dr = s->Dr, .Dv = s->Dv, .lengths = packed,
                                             .latent_dtype = s->latent, .weight_dtype = s->weight, .backward = backward, .seed = 1});
    return kl_case_moe(c, &(kl_moe_spec){.T = T, .D = s->D, .E = s->E, .I = s->I, .top_k = s->top_k, .Is = s->Is, .renormalize = true,
                                         .scale = 2.446f, .weight_dtype = s->weight, .backward = backward, .seed = 1});
}

/* A measured shape: the timed problem, and the one that errors are taken on (the same one where the reference can). */
typedef struct measured {
    kl_case timed, scored, general; /* general: DPLR of the timed one */
    kl_case general_scored;
    bool reduced;
    int64_t err_T;
} measured;

static void measured_free(measured *m)
{
    kl_case_free(&m->timed);
    kl_case_free(&m->scored);
    kl_case_free(&m->general);
    kl_case_free(&m->general_scored);
}

static kl_status wanted_values(kl_bench *b, kl_case *c, kl_pass pass)
{
    KL_TRY(kl_case_run(b->ctx, c, kl_reference_variant(c->family), pass, &b->scratch));
    return kl_case_keep(c, pass);
}

static kl_status prepare(kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass, measured *m)
{
    kl_pass half = pass == KL_BENCH_BWD ? KL_BACKWARD : KL_FORWARD;
    KL_TRY(build(b, family, s, pass, s->T, &m->timed));
    int64_t T = s->T;
    for (double flops = reference_work(&m->timed, half); flops > reference_flops && T > 16; flops /= 2.0)
        T /= 2;
    m->reduced = T != s->T;
    m->err_T = m->reduced ? T : 0;
    if (m->reduced)
        KL_TRY(build(b, family, s, pass, T, &m->scored));
    KL_TRY(wanted_values(b, m->reduced ? &m->scored : &m->timed, half));
    if (family == KL_FAMILY_KDA && pass == KL_BENCH_FWD) {
        KL_TRY(kl_case_dplr(&m->general, &m->timed));
        if (m->reduced)
            KL_TRY(kl_case_dplr(&m->general_scored, &m->scored));
    }
    return kl_ok();
}

typedef struct call {
    kl_ctx *ctx;
    const kl_case *c;
    const kl_variant *variant;
    kl_pass pass;
    kl_scratch *scratch;
} call;

static kl_status one_call(void *user)
{
    call *k = user;
    return kl_case_call(k->ctx, k->c, k->variant, k->pass, k->scratch);
}

/* The reference's own time is taken only where it runs on the whole problem. */
static bool wanted_variant(const kl_bench *b, const kl_variant *v, bool reduced)
{
    if (v->device != b->ctx->device || (b->variant && strcmp(b->variant, v->name) != 0))
        return false;
    return strcmp(v->name, "reference") != 0 || !reduced;
}

/* The shape as it was run, with the defaults in their places. */
static kl_shape actual_shape(const kl_case *c, kl_shape s)
{
    if (c->family == KL_FAMILY_KDA) {
        const kda_problem *p = &c->problem.kda;
        s.B = p->B;
        s.T = p->T;
        s.N = p->N;
        s.HV = p->HV;
        s.V = p->V;
        s.G = p->G ? p->G : -1;
        s.C = p->chunk ? p->chunk : KDA_DEFAULT_CHUNK;
    } else if (c->family == KL_FAMILY_DPLR) {
        const dplr_problem *p = &c->problem.dplr;
        s.B = p->B;
        s.T = p->T;
        s.N = p->N;
        s.H = s.HV = p->H;
        s.V = p->V;
        s.C = p->chunk ? p->chunk : KDA_DEFAULT_CHUNK;
    } else if (c->family == KL_FAMILY_MLA) {
        s.N = c->problem.mla.N;
    }
    return s;
}

static kl_status measure(kl_bench *b, const kl_variant *v, kl_case *timed, kl_case *scored, int64_t err_T, const kl_shape *shape,
                         kl_bench_pass pass, double *median)
{
    kl_pass half = pass == KL_BENCH_BWD ? KL_BACKWARD : KL_FORWARD;
    kl_shape actual = actual_shape(timed, *shape);
    kl_bench_row row = {.family = v->family, .variant = v->name, .pass = pass, .shape = &actual, .err_T = err_T};
    bool kda = timed->family == KL_FAMILY_KDA || timed->family == KL_FAMILY_DPLR;
    row.gate = kda ? kl_regime_name(b->regime) : NULL;
    row.memory_gbps = kda ? b->ceilings.copy_gbps : b->ceilings.read_gbps;
    row.memory_name = kda ? "copy" : "read";
    KL_TRY(kl_case_run(b->ctx, scored, v, half, &b->scratch));
    row.err = kl_case_worst(scored, half, NULL);
    row.err_limit = half == KL_BACKWARD ? scored->tolerance.gradient : scored->tolerance.forward;
    KL_TRY(kl_scratch_for(&b->scratch, b->ctx, v, timed, half));
    call k = {b->ctx, timed, v, half, &b->scratch};
    KL_TRY(kl_bench_time(b, one_call, &k, &row.seconds));
    row.cost = v->cost(&timed->problem, half);
    row.workspace_bytes = b->scratch.bytes;
    row.peak_bytes = timed->bytes + b->scratch.bytes;
    *median = row.seconds.median;
    return kl_bench_emit(b, &row);
}

/* Medians that the ratios at the end are made of; 0: not measured. */
typedef struct medians {
    double recurrent, chunk, general;
} medians;

static kl_status bench_variants(kl_bench *b, const kl_variant *reference, const kl_variant *list, int count, kl_case *timed, kl_case *scored,
                                const measured *m, const kl_shape *shape, kl_bench_pass pass, medians *out)
{
    kl_pass half = pass == KL_BENCH_BWD ? KL_BACKWARD : KL_FORWARD;
    for (int i = -1; i < count; i++) {
        const kl_variant *v = i < 0 ? reference : &list[i];
        double median = 0.0;
        if (!wanted_variant(b, v, m->reduced) || (half == KL_BACKWARD && !v->backward))
            continue;
        kl_status s = v->check(&timed->problem, half);
        if (s.code == KL_EUNSUPPORTED) {
            if (!b->quiet)
                printf("%-6s %-7s %-11s not offered: %s\n", v->family, kl_bench_pass_name(pass), v->name, s.message);
            continue;
        }
        KL_TRY(s);
        KL_TRY(kl_error_in(measure(b, v, timed, scored, m->err_T, shape, pass, &median), "%s %s", v->family, v->name));
        if (strcmp(v->name, "recurrent") == 0 && timed->family != KL_FAMILY_DPLR)
            out->recurrent = median;
        if (strcmp(v->name, "chunk") == 0)
            *(timed->family == KL_FAMILY_DPLR ? &out->general : &out->chunk) = median;
    }
    return kl_ok();
}

static void print_ratios(const kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass, const measured *m, const medians *t)
{
    if (b->quiet)
        return;
    const char *name = kl_family_name(family), *how = kl_bench_pass_name(pass);
    if (t->recurrent > 0.0 && t->chunk > 0.0 && pass != KL_BENCH_DECODE)
        printf("  %s %s T %lld: chunk is %.2f times as fast as recurrent\n", name, how, (long long)s->T, t->recurrent / t->chunk);
    if (t->general > 0.0 && t->chunk > 0.0)
        printf("  %s %s T %lld: chunk is %.2f times as fast as general DPLR in chunks\n", name, how, (long long)s->T, t->general / t->chunk);
    if (family == KL_FAMILY_MLA && pass == KL_BENCH_DECODE) {
        const mla_problem *p = &m->timed.problem.mla;
        double bytes = (double)p->latent_rows * (double)(p->R + p->Dr) * (double)kl_dtype_size(p->latent_dtype);
        double floor = bytes / (1e9 * b->ceilings.read_gbps), best = t->recurrent > 0.0 ? t->recurrent : t->chunk;
        if (best > 0.0)
            printf("  mla decode T %lld H %lld %s: %.2f times the %.1f us that reading its latents takes\n", (long long)s->T, (long long)s->H,
                   kl_dtype_name(p->latent_dtype), best / floor, 1e6 * floor);
    }
}

static kl_status bench_shape(kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass)
{
    measured m = {0};
    medians t = {0};
    int count;
    kl_status status = prepare(b, family, s, pass, &m);
    const kl_variant *list = kl_family_variants(family, &count);
    if (!kl_failed(status))
        status = bench_variants(b, kl_reference_variant(family), list, count, &m.timed, m.reduced ? &m.scored : &m.timed, &m, s, pass, &t);
    if (!kl_failed(status) && m.general.memory) {
        list = dplr_variants(&count);
        status = bench_variants(b, &kl_reference_dplr, list, count, &m.general, m.reduced ? &m.general_scored : &m.general, &m, s, pass, &t);
    }
    if (!kl_failed(status))
        print_ratios(b, family, s, pass, &m, &t);
    measured_free(&m);
    return status;
}

kl_status kl_bench_family(kl_bench *b, kl_family family, const kl_shape *shapes, int count)
{
    for (int i = 0; i < count; i++) {
        kl_shape s = shapes[i];
        if (s.length_count) {
            s.T = 0;
            for (int64_t n = 0; n < s.length_count; n++)
                s.T += s.lengths[n];
        }
        KL_REQUIRE(s.T >= 1, "--shapes: T: expected at least 1");
        for (int p = 0; p < KL_BENCH_PASSES; p++)
            if (b->pass[p])
                KL_TRY(bench_shape(b, family, &s, (kl_bench_pass)p));
    }
    return kl_ok();
}
