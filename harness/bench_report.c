#include <math.h>
#include <string.h>

#include "harness/bench.h"

const char *kl_bench_pass_name(kl_bench_pass p)
{
    static const char *const names[] = {"fwd", "bwd", "decode", "prefill", "fwdbwd"};
    return (unsigned)p < KL_BENCH_PASSES ? names[p] : "unknown";
}

int kl_bench_runs(const kl_bench *b, double warm)
{
    static const double budget = 1.0;
    if (b->runs)
        return b->runs;
    int fit = warm > budget / 200.0 ? (int)(budget / warm) : 200, least = warm > 2.0 ? 1 : 3;
    return fit > least ? fit : least;
}

kl_status kl_bench_time(const kl_bench *b, kl_bench_fn fn, void *user, kl_spread *seconds)
{
    double sample[1000], start = kl_now();
    KL_TRY(fn(user));
    int wanted = kl_bench_runs(b, kl_now() - start), n = 0;
    for (; n < wanted && n < 1000; n++) {
        start = kl_now();
        KL_TRY(fn(user));
        sample[n] = kl_now() - start;
    }
    *seconds = kl_spread_of(sample, n);
    return kl_ok();
}

static void add_number(cJSON *o, const char *name, double x)
{
    if (isfinite(x))
        cJSON_AddNumberToObject(o, name, x);
}

static void add_size(cJSON *o, const char *name, int64_t n)
{
    if (n > 0)
        cJSON_AddNumberToObject(o, name, (double)n);
}

static void add_shape(cJSON *o, const kl_shape *s)
{
    const struct { const char *name; int64_t value; } size[] = {
        {"B", s->B}, {"T", s->T}, {"N", s->N}, {"H", s->H}, {"HV", s->HV}, {"K", s->K}, {"V", s->V}, {"C", s->C}, {"Tq", s->Tq},
        {"R", s->R}, {"Dn", s->Dn}, {"Dr", s->Dr}, {"Dv", s->Dv}, {"D", s->D}, {"E", s->E}, {"I", s->I}, {"Is", s->Is}, {"top_k", s->top_k}};
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        add_size(o, size[i].name, size[i].value);
    if (s->G)
        cJSON_AddNumberToObject(o, "G", s->G < 0 ? 0.0 : (double)s->G);
    if (s->R)
        cJSON_AddStringToObject(o, "latent", kl_dtype_name(s->latent));
    if (s->R || s->D)
        cJSON_AddStringToObject(o, "weight", kl_dtype_name(s->weight));
    if (s->length_count) {
        cJSON *list = cJSON_AddArrayToObject(o, "lengths");
        for (int64_t i = 0; i < s->length_count; i++)
            cJSON_AddItemToArray(list, cJSON_CreateNumber((double)s->lengths[i]));
    }
}

/* The larger of the two fractions says what binds; decoding is measured against memory, whatever unit computes it. */
typedef struct binding {
    const char *name;
    double fraction;
} binding;

static binding binds(const kl_bench *b, const kl_bench_row *r)
{
    double gbps = 1e-9 * r->cost.bytes / r->seconds.median, tflops = 1e-12 * r->cost.flops / r->seconds.median;
    double memory = gbps / r->memory_gbps, compute = tflops / b->ceilings.gemm_tflops;
    return r->pass == KL_BENCH_DECODE || memory > compute ? (binding){r->memory_name, memory} : (binding){"gemm_f32", compute};
}

static kl_status emit_json(kl_bench *b, const kl_bench_row *r)
{
    cJSON *o = cJSON_CreateObject();
    cJSON_AddStringToObject(o, "family", r->family);
    cJSON_AddStringToObject(o, "pass", kl_bench_pass_name(r->pass));
    cJSON_AddStringToObject(o, "variant", r->variant);
    if (r->gate)
        cJSON_AddStringToObject(o, "gate", r->gate);
    add_shape(o, r->shape);
    cJSON_AddNumberToObject(o, "call_us", 1e6 * r->seconds.median);
    cJSON_AddNumberToObject(o, "min_us", 1e6 * r->seconds.min);
    cJSON_AddNumberToObject(o, "max_us", 1e6 * r->seconds.max);
    cJSON_AddNumberToObject(o, "runs", r->seconds.runs);
    add_number(o, "bytes", r->cost.bytes);
    add_number(o, "flops", r->cost.flops);
    add_number(o, "gbps", 1e-9 * r->cost.bytes / r->seconds.median);
    add_number(o, "tflops", 1e-12 * r->cost.flops / r->seconds.median);
    binding bound = binds(b, r);
    cJSON_AddStringToObject(o, "ceiling", bound.name);
    add_number(o, "ceiling_frac", bound.fraction);
    if (r->err_limit > 0.0) {
        cJSON_AddItemToObject(o, "err", isfinite(r->err) ? cJSON_CreateNumber(r->err) : cJSON_CreateNull());
        cJSON_AddNumberToObject(o, "err_limit", r->err_limit);
        add_size(o, "err_T", r->err_T);
    }
    cJSON_AddNumberToObject(o, "workspace_bytes", (double)r->workspace_bytes);
    cJSON_AddNumberToObject(o, "peak_bytes", (double)r->peak_bytes);
    kl_provenance_add(o, &b->provenance);
    kl_status s = kl_lines_add(&b->lines, o);
    cJSON_Delete(o);
    return s;
}

static void describe(const kl_shape *s, char *text, size_t size)
{
    const struct { const char *name; int64_t value; } part[] = {
        {"B", s->B > 1 ? s->B : 0}, {"N", s->N > 1 && s->N != s->B ? s->N : 0}, {"T", s->T}, {"Tq", s->Tq}, {"H", s->H},
        {"HV", s->HV != s->H ? s->HV : 0}, {"K", s->K}, {"V", s->V != s->K ? s->V : 0}, {"G", s->G != s->K ? s->G : 0}, {"D", s->D},
        {"E", s->E}, {"I", s->I}, {"top", s->top_k}};
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; i < sizeof part / sizeof *part && used < size; i++)
        if (part[i].value)
            used += (size_t)snprintf(text + used, size - used, "%s%s%lld", used ? " " : "", part[i].name, (long long)part[i].value);
    if (s->length_count && used < size)
        used += (size_t)snprintf(text + used, size - used, " %lld packed", (long long)s->length_count);
    if (s->R && used < size)
        snprintf(text + used, size - used, " %s", s->latent == KL_BF16 ? "bf16" : "f32");
}

static void emit_text(kl_bench *b, const kl_bench_row *r)
{
    if (b->rows == 0)
        printf("%-6s %-7s %-11s %-6s %-26s %11s %21s %8s %9s %14s %9s %8s\n", "family", "pass", "variant", "gate", "shape", "median us",
               "min .. max us", "GB/s", "GFLOP/s", "of ceiling", "error", "limit");
    char shape[96], err[48] = "-", limit[16] = "", spread[40];
    describe(r->shape, shape, sizeof shape);
    if (r->err_limit > 0.0) {
        kl_format_error(r->err, err, sizeof err);
        kl_format_error(r->err_limit, limit, sizeof limit);
    }
    snprintf(spread, sizeof spread, "%.1f .. %.1f", 1e6 * r->seconds.min, 1e6 * r->seconds.max);
    binding bound = binds(b, r);
    printf("%-6s %-7s %-11s %-6s %-26s %11.1f %21s %8.2f %9.2f %5.1f%% %-8s%9s %8s", r->family, kl_bench_pass_name(r->pass), r->variant,
           r->gate ? r->gate : "", shape, 1e6 * r->seconds.median, spread, 1e-9 * r->cost.bytes / r->seconds.median,
           1e-9 * r->cost.flops / r->seconds.median, 100.0 * bound.fraction, bound.name, err, limit);
    if (r->err_limit > 0.0 && !kl_within(r->err, r->err_limit))
        printf("  WRONG");
    if (r->err_T)
        printf("  (error at T %lld)", (long long)r->err_T);
    putchar('\n');
    fflush(stdout);
}

kl_status kl_bench_emit(kl_bench *b, const kl_bench_row *r)
{
    if (!b->quiet)
        emit_text(b, r);
    b->rows++;
    b->wrong |= r->err_limit > 0.0 && !kl_within(r->err, r->err_limit);
    return emit_json(b, r);
}
