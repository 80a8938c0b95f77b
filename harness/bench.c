#include "harness/bench.h"

#include <stdlib.h>
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
                                             .state_layout = s->value_first ? KDA_STATE_VK : KDA_STATE_KV, .chunk = s->C, .lengths = packed, .sequences = s->length_count, .regime = b->regime,
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
    if (family == KL_FAMILY_KDA && pass == KL_BENCH_FWD && !s->value_first) {
        KL_TRY(kl_case_dplr(&m->general, &m->timed));
        if (m->reduced)
            KL_TRY(kl_case_dplr(&m->general_scored, &m->scored));
    }
    return kl_ok();
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

/* One variant at one shape, on its way to a row. */
enum { ENTRIES = 32, SAMPLES = 1000, ROUNDS = 10 };
typedef struct entry {
    const kl_variant *variant;
    kl_case *timed, *scored;
    kl_shape shape;
    kl_bench_row row;
    double sample[SAMPLES];
    int taken, wanted;
} entry;

typedef struct entries {
    kl_pass half;
    int count;
    entry e[ENTRIES];
} entries;

static kl_status time_one(kl_bench *b, const entry *e, kl_pass half, double *seconds)
{
    KL_TRY(kl_scratch_for(&b->scratch, b->ctx, e->variant, e->timed, half));
    double start = kl_now();
    KL_TRY(kl_case_call(b->ctx, e->timed, e->variant, half, &b->scratch));
    *seconds = kl_now() - start;
    return kl_ok();
}

/* Its error, its first call, and how many timed calls shall follow. */
static kl_status enter(kl_bench *b, entries *all, const kl_variant *v, kl_case *timed, kl_case *scored, int64_t err_T, const kl_shape *shape, kl_bench_pass pass)
{
    kl_pass half = all->half;
    KL_REQUIRE(all->count < ENTRIES, "bench: more than %d variants of a family", ENTRIES);
    entry *e = &all->e[all->count];
    bool kda = timed->family == KL_FAMILY_KDA || timed->family == KL_FAMILY_DPLR;
    *e = (entry){.variant = v, .timed = timed, .scored = scored, .shape = actual_shape(timed, *shape)};
    KL_TRY(kl_case_run(b->ctx, scored, v, half, &b->scratch));
    e->row = (kl_bench_row){.family = v->family, .variant = v->name, .gate = kda ? kl_regime_name(b->regime) : NULL, .pass = pass,
                            .memory_gbps = kda ? b->ceilings.copy_gbps : b->ceilings.read_gbps, .memory_name = kda ? "copy" : "read",
                            .err = kl_case_worst(scored, half, NULL), .err_T = err_T,
                            .err_limit = half == KL_BACKWARD ? scored->tolerance.gradient : scored->tolerance.forward};
    double warm;
    KL_TRY(time_one(b, e, half, &warm));
    e->wanted = kl_bench_runs(b, warm);
    e->row.cost = v->cost(&timed->problem, half);
    e->row.workspace_bytes = b->scratch.bytes;
    e->row.peak_bytes = timed->bytes + b->scratch.bytes;
    all->count++;
    return kl_ok();
}

static kl_status enter_family(kl_bench *b, entries *all, kl_family family, kl_case *timed, kl_case *scored, const measured *m, const kl_shape *shape, kl_bench_pass pass)
{
    int count;
    const kl_variant *list = kl_family_variants(family, &count);
    for (int i = -1; i < count; i++) {
        const kl_variant *v = i < 0 ? kl_reference_variant(family) : &list[i];
        if (!wanted_variant(b, v, m->reduced) || (all->half == KL_BACKWARD && !v->backward))
            continue;
        kl_status s = v->check(&timed->problem, all->half);
        if (s.code == KL_EUNSUPPORTED) {
            if (!b->quiet)
                printf("%-6s %-7s %-11s not offered: %s\n", v->family, kl_bench_pass_name(pass), v->name, s.message);
            continue;
        }
        KL_TRY(s);
        KL_TRY(kl_error_in(enter(b, all, v, timed, scored, m->err_T, shape, pass), "%s %s", v->family, v->name));
    }
    return kl_ok();
}

/* The variants take turns, so that what else the machine does falls on all of them alike. */
static kl_status take_turns(kl_bench *b, entries *all)
{
    for (int round = 1; round <= ROUNDS; round++)
        for (int i = 0; i < all->count; i++)
            for (entry *e = &all->e[i]; e->taken < (e->wanted * round + ROUNDS - 1) / ROUNDS; e->taken++)
                KL_TRY(time_one(b, e, all->half, &e->sample[e->taken]));
    for (int i = 0; i < all->count; i++) {
        entry *e = &all->e[i];
        e->row.shape = &e->shape;
        e->row.seconds = kl_spread_of(e->sample, e->taken);
        KL_TRY(kl_bench_emit(b, &e->row));
    }
    return kl_ok();
}

/* The median of a variant; 0: not measured. */
static double median_of(const entries *all, kl_family family, const char *name)
{
    for (int i = 0; i < all->count; i++)
        if (all->e[i].timed->family == family && strcmp(all->e[i].variant->name, name) == 0)
            return all->e[i].row.seconds.median;
    return 0.0;
}

static void print_ratios(const kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass, const measured *m, const entries *all)
{
    if (b->quiet)
        return;
    const char *name = kl_family_name(family), *how = kl_bench_pass_name(pass);
    double recurrent = median_of(all, family, "recurrent"), chunk = median_of(all, family, "chunk"), general = median_of(all, KL_FAMILY_DPLR, "chunk");
    if (recurrent > 0.0 && chunk > 0.0 && pass != KL_BENCH_DECODE)
        printf("  %s %s T %lld: chunk is %.2f times as fast as recurrent\n", name, how, (long long)s->T, recurrent / chunk);
    if (general > 0.0 && chunk > 0.0)
        printf("  %s %s T %lld: chunk is %.2f times as fast as general DPLR in chunks\n", name, how, (long long)s->T, general / chunk);
    if (family == KL_FAMILY_MLA && pass == KL_BENCH_DECODE && recurrent > 0.0) {
        const mla_problem *p = &m->timed.problem.mla;
        double bytes = (double)p->latent_rows * (double)(p->R + p->Dr) * (double)kl_dtype_size(p->latent_dtype);
        double floor = bytes / (1e9 * b->ceilings.read_gbps);
        printf("  mla decode T %lld H %lld %s: %.2f times the %.1f us that reading its latents takes\n", (long long)s->T, (long long)s->H,
               kl_dtype_name(p->latent_dtype), recurrent / floor, 1e6 * floor);
    }
}

static kl_status bench_shape(kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass)
{
    measured m = {0};
    entries *all = calloc(1, sizeof *all);
    if (!all)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    all->half = pass == KL_BENCH_BWD ? KL_BACKWARD : KL_FORWARD;
    kl_status status = prepare(b, family, s, pass, &m);
    if (!kl_failed(status))
        status = enter_family(b, all, family, &m.timed, m.reduced ? &m.scored : &m.timed, &m, s, pass);
    if (!kl_failed(status) && m.general.memory)
        status = enter_family(b, all, KL_FAMILY_DPLR, &m.general, m.reduced ? &m.general_scored : &m.general, &m, s, pass);
    if (!kl_failed(status))
        status = take_turns(b, all);
    if (!kl_failed(status))
        print_ratios(b, family, s, pass, &m, all);
    measured_free(&m);
    free(all);
    return status;
}

static kl_status bench_on_device(kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass)
{
    double kda, general;
    KL_TRY(kl_bench_device(b, family, s, pass, &kda));
    if (family != KL_FAMILY_KDA || !s->dplr || pass != KL_BENCH_FWD)
        return kl_ok();
    KL_TRY(kl_bench_device(b, KL_FAMILY_DPLR, s, pass, &general));
    if (kda > 0.0 && general > 0.0 && !b->quiet)
        printf("  kda T %lld: chunk is %.2f times as fast as general DPLR in chunks\n", (long long)s->T, general / kda);
    return kl_ok();
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
                KL_TRY(b->ctx->device == KL_CUDA ? bench_on_device(b, family, &s, (kl_bench_pass)p) : bench_shape(b, family, &s, (kl_bench_pass)p));
    }
    return kl_ok();
}
