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
        {"B", s->B}, {"T", s->T}, {"N", s->N}, {"H", s->H}, {"HV", s->HV}, {"K", s->K}, {"V", s->V}, {"C", s->C}, {"raw", s->raw}, {"value_first", s->value_first},
        {"Tq", s->Tq}, {"again", s->again}, {"R", s->R}, {"Dn", s->Dn}, {"Dr", s->Dr}, {"Dv", s->Dv}, {"D", s->D}, {"E", s->E}, {"I", s->I}, {"Is", s->Is}, {"top_k", s->top_k}};
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        add_size(o, size[i].name, size[i].value);
    if (s->G)
        cJSON_AddNumberToObject(o, "G", s->G < 0 ? 0.0 : (double)s->G);
    if (s->R)
        cJSON_AddStringToObject(o, "latent", kl_dtype_name(s->latent));
    if (s->R || s->E)
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
    double memory = gbps / r->memory_gbps, compute = b->ceilings.gemm_tflops > 0.0 ? tflops / b->ceilings.gemm_tflops : 0.0;
    const char *product = r->device ? "gemm_bf16" : "gemm_f32";
    return r->pass == KL_BENCH_DECODE || memory > compute ? (binding){r->memory_name, memory} : (binding){product, compute};
}

static void add_median(cJSON *o, const char *name, const kl_spread *s)
{
    if (s->runs)
        cJSON_AddNumberToObject(o, name, 1e6 * s->median);
}

/* min_us, max_us and runs are of the time that rates are computed from: on a device graph_us, or pipelined_us without graphs. */
static void add_times(cJSON *o, const kl_bench_row *r)
{
    const kl_device_times *t = r->device;
    add_median(o, "call_us", t ? &t->call : &r->seconds);
    if (t) {
        add_median(o, "pipelined_us", &t->pipelined);
        add_median(o, "graph_us", &t->graph);
        add_median(o, "graph_warm_us", &t->warm);
        add_median(o, "host_us", &t->host);
        cJSON_AddNumberToObject(o, "sets", t->sets);
    }
    cJSON_AddNumberToObject(o, "min_us", 1e6 * r->seconds.min);
    cJSON_AddNumberToObject(o, "max_us", 1e6 * r->seconds.max);
    cJSON_AddNumberToObject(o, "runs", r->seconds.runs);
}

static void add_error(cJSON *o, const kl_bench_row *r)
{
    cJSON_AddItemToObject(o, "err", isfinite(r->err) ? cJSON_CreateNumber(r->err) : cJSON_CreateNull());
    cJSON_AddNumberToObject(o, "err_limit", r->err_limit);
    add_size(o, "err_T", r->err_T);
    add_size(o, "err_rows", r->err_rows);
    if (r->err_part > 0.0)
        cJSON_AddNumberToObject(o, "err_worst_part", r->err_part);
    if (!r->err_head_count)
        return;
    cJSON *list = cJSON_AddArrayToObject(o, "err_heads");
    for (int i = 0; i < r->err_head_count; i++)
        cJSON_AddItemToArray(list, cJSON_CreateNumber((double)r->err_heads[i]));
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
    add_times(o, r);
    add_number(o, "bytes", r->cost.bytes);
    add_number(o, "flops", r->cost.flops);
    add_number(o, "gbps", 1e-9 * r->cost.bytes / r->seconds.median);
    add_number(o, "tflops", 1e-12 * r->cost.flops / r->seconds.median);
    binding bound = binds(b, r);
    cJSON_AddStringToObject(o, "ceiling", bound.name);
    add_number(o, "ceiling_frac", bound.fraction);
    if (r->device) {
        cJSON_AddNumberToObject(o, "copy_gbps", b->ceilings.copy_gbps);
        cJSON_AddNumberToObject(o, "gemm_tflops", b->ceilings.gemm_tflops);
    }
    if (r->err_limit > 0.0)
        add_error(o, r);
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
        {"E", s->E}, {"I", s->I}, {"top", s->top_k}, {"R", s->R && s->R != 512 ? s->R : 0}, {"again", s->again}};
    size_t used = 0;
    text[0] = '\0';
    for (size_t i = 0; i < sizeof part / sizeof *part && used < size; i++)
        if (part[i].value)
            used += (size_t)snprintf(text + used, size - used, "%s%s%lld", used ? " " : "", part[i].name, (long long)part[i].value);
    if (s->length_count && used < size)
        used += (size_t)snprintf(text + used, size - used, " %lld packed", (long long)s->length_count);
    if (s->R && used < size)
        used += (size_t)snprintf(text + used, size - used, " %s", s->latent == KL_BF16 ? "bf16" : "f32");
    if (s->value_first && used < size)
        snprintf(text + used, size - used, " [V,K]");
}

static void print_time(const kl_spread *s)
{
    if (s->runs)
        printf(" %9.1f", 1e6 * s->median);
    else
        printf(" %9s", "-");
}

static void emit_device_text(kl_bench *b, const kl_bench_row *r)
{
    if (b->rows == 0)
        printf("%-4s %-6s %-9s %-6s %-22s %9s %19s %9s %9s %9s %9s %8s %8s %15s %9s %9s %8s\n", "fam", "pass", "variant", "gate", "shape", "graph us",
               "min .. max", "warm", "pipelined", "one call", "host", "GB/s", "TFLOP/s", "of ceiling", "workspace", "error", "limit");
    char shape[96], err[48], limit[16], spread[40], room[24];
    const kl_device_times *t = r->device;
    describe(r->shape, shape, sizeof shape);
    kl_format_error(r->err, err, sizeof err);
    kl_format_error(r->err_limit, limit, sizeof limit);
    kl_format_bytes((double)r->workspace_bytes, room, sizeof room);
    snprintf(spread, sizeof spread, "%.1f .. %.1f", 1e6 * r->seconds.min, 1e6 * r->seconds.max);
    binding bound = binds(b, r);
    printf("%-4s %-6s %-9s %-6s %-22s", r->family, kl_bench_pass_name(r->pass), r->variant, r->gate ? r->gate : "", shape);
    print_time(&t->graph);
    printf(" %19s", spread);
    print_time(&t->warm);
    print_time(&t->pipelined);
    print_time(&t->call);
    print_time(&t->host);
    printf(" %8.0f %8.1f %5.1f%% %-9s %9s %9s %8s", 1e-9 * r->cost.bytes / r->seconds.median, 1e-12 * r->cost.flops / r->seconds.median,
           100.0 * bound.fraction, bound.name, room, err, limit);
    if (!kl_within(r->err, r->err_limit))
        printf("  WRONG");
    if (r->err_rows)
        printf("  (error of %lld rows)", (long long)r->err_rows);
    for (int i = 0; i < r->err_head_count; i++)
        printf("%s%lld%s", i ? " " : "  (error of heads ", (long long)r->err_heads[i], i + 1 == r->err_head_count ? ")" : "");
    putchar('\n');
    fflush(stdout);
}

static void add_to_means(kl_bench *b, const kl_bench_row *r)
{
    char name[sizeof b->means.of[0].name];
    snprintf(name, sizeof name, "%s %s %s %s", r->family, kl_bench_pass_name(r->pass), r->variant, r->gate ? r->gate : "");
    int i = 0;
    while (i < b->means.count && strcmp(b->means.of[i].name, name) != 0)
        i++;
    if (i == sizeof b->means.of / sizeof *b->means.of)
        return;
    if (i == b->means.count)
        memcpy(b->means.of[b->means.count++].name, name, sizeof name);
    b->means.of[i].log_sum += log(r->seconds.median);
    b->means.of[i].rows++;
}

void kl_bench_means(kl_bench *b)
{
    for (int i = 0; i < b->means.count && !b->quiet; i++)
        if (b->means.of[i].rows > 1)
            printf("  %s: geometric mean of %d shapes %.1f us\n", b->means.of[i].name, b->means.of[i].rows,
                   1e6 * exp(b->means.of[i].log_sum / b->means.of[i].rows));
    b->means.count = 0;
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
    if (!b->quiet && r->device)
        emit_device_text(b, r);
    else if (!b->quiet)
        emit_text(b, r);
    if (r->device)
        add_to_means(b, r);
    b->rows++;
    b->wrong |= r->err_limit > 0.0 && !kl_within(r->err, r->err_limit);
    return emit_json(b, r);
}
