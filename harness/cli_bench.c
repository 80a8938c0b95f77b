#include <string.h>

#include "harness/around.h"
#include "harness/bench.h"
#include "harness/cli.h"
#include "harness/file.h"
#include "harness/info.h"
#include "harness/layers.h"
#include "harness/model.h"

enum { KEY_SHAPES = CLI_KEY_OWN, KEY_FILE, KEY_GATE, KEY_VARIANT, KEY_PASS, KEY_RUNS, KEY_PRESET, KEY_SET, MAX_SET = 64 };

typedef struct bench_options {
    cli_common common;
    const char *what, *dir, *shapes, *file, *variant, *preset, *set[MAX_SET];
    int sets;
    kl_regime regime;
    bool pass[KL_BENCH_PASSES], chosen;
    int64_t runs;
} bench_options;

static const struct argp_option options[] = {
    CLI_OPTIONS_HELP, CLI_OPTIONS_DEVICE,
    {"json", KEY_FILE, "FILE", 0, "Write the rows to FILE as JSON lines too ('-': print them instead of the table)", 8},
    {"shapes", KEY_SHAPES, "KEY=N,...;...|LIST", 0, "The cases to run; each starts from the one before it", 1},
    {"pass", KEY_PASS, "NAME", 0, "fwd, bwd, decode; for a model prefill, decode, fwdbwd (may be repeated)", 1},
    {"variant", KEY_VARIANT, "NAME", 0, "Time this variant only", 1},
    {"gate", KEY_GATE, "REGIME", 0, "Decays of the KDA inputs: strong, slow or mixed (mixed)", 1},
    {"runs", KEY_RUNS, "N", 0, "Timed calls a row (as many as fit a second, at least 3)", 1},
    {"preset", KEY_PRESET, "NAME", 0, "model: random weights of a built-in configuration instead of a directory", 2},
    {"set", KEY_SET, "KEY=VALUE", 0, "model: change that configuration (may be repeated)", 2},
    {0}};

static const char doc[] =
    "Times every registered variant and prints one row a case, with the fraction of what this machine reaches and the error against the reference.\v"
    "Keys of --shapes: kda B T N H HV K V G C lengths, on a device raw (gate, norms and sigmoid inside) and dplr; mla N T Tq H R Dn Dr Dv latent weight lengths, on a device again (the backward pass computes the forward pass again); moe T D E I Is top_k weight; "
    "layers T D V I N K C B; model B T C new. Packed sequences: lengths=1300+547+2048. Example: --shapes 'T=4096,H=4;T=8192'. "
    "Lists for kda: ten, heads32, heads96, train, decode, fig2, gates, and around: convolution, gated norm, decode step of a layer; for mla: prefill, again, alone, few, late, decode; for moe: tokens, train.";

static kl_status choose_pass(bench_options *o, const char *name)
{
    for (int p = 0; p < KL_BENCH_PASSES; p++) {
        if (strcmp(name, kl_bench_pass_name((kl_bench_pass)p)) == 0) {
            o->pass[p] = o->chosen = true;
            return kl_ok();
        }
    }
    return kl_error(KL_EINVAL, "--pass: expected fwd, bwd, decode, prefill or fwdbwd, got '%s'", name);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    bench_options *o = state->input;
    kl_status s = kl_ok();
    switch (key) {
    case KEY_SHAPES: o->shapes = arg; break;
    case KEY_FILE: o->file = arg; break;
    case KEY_VARIANT: o->variant = arg; break;
    case KEY_PRESET: o->preset = arg; break;
    case KEY_PASS: s = choose_pass(o, arg); break;
    case KEY_GATE: s = kl_regime_parse(arg, &o->regime); break;
    case KEY_RUNS: s = cli_int("--runs", arg, 1, 1000, &o->runs); break;
    case KEY_SET:
        if (o->sets == MAX_SET)
            s = kl_error(KL_EINVAL, "--set: expected at most %d", MAX_SET);
        else
            o->set[o->sets++] = arg;
        break;
    case ARGP_KEY_ARG:
        if (!o->what)
            o->what = arg;
        else if (!o->dir)
            o->dir = arg;
        else
            s = kl_error(KL_EINVAL, "unexpected argument '%s'", arg);
        break;
    default: return cli_common_key(key, arg, &o->common);
    }
    return kl_failed(s) ? cli_fail(&o->common, s) : 0;
}

/* What a family runs when nothing is asked for: the first shape of every text, each with the passes it is meant for. */
typedef struct defaults {
    const char *family;
    kl_shape first;
    const char *shapes[2];
    bool pass[2][KL_BENCH_PASSES];
} defaults;

static const defaults table[] = {
    {"kda", {.T = 4096, .H = 4, .K = 128}, {"T=4096", "T=1,H=32,B=8"}, {{[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true}, {[KL_BENCH_DECODE] = true}}},
    {"mla", {.T = 1024, .H = 4, .R = 512, .Dn = 128, .Dr = 64, .Dv = 128}, {"T=1024", "T=65536,latent=f32;T=131072,latent=bf16"},
     {{[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true}, {[KL_BENCH_DECODE] = true}}},
    {"moe", {.T = 512, .D = 768, .E = 32, .I = 384, .top_k = 4, .Is = 384}, {"T=512", "T=1"},
     {{[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true}, {[KL_BENCH_DECODE] = true}}},
    {"layers", {0}, {"", NULL}, {{[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true}, {false}}},
    {"model", {.T = 2048, .new_tokens = 64}, {"T=2048", NULL}, {{[KL_BENCH_PREFILL] = true, [KL_BENCH_DECODE] = true}, {false}}},
};

static kl_status check_passes(const char *family, kl_device device, const bool *pass)
{
    bool model = strcmp(family, "model") == 0;
    for (int p = 0; p < KL_BENCH_PASSES; p++) {
        bool offered = model ? p >= KL_BENCH_DECODE : p <= KL_BENCH_DECODE || (p == KL_BENCH_FWDBWD && device == KL_CUDA);
        KL_REQUIRE(!pass[p] || offered, "--pass: %s has no pass '%s'", family, kl_bench_pass_name((kl_bench_pass)p));
    }
    return kl_ok();
}

static kl_status run_group(kl_bench *b, const defaults *d, kl_model *m, const char *shapes, const bool *pass)
{
    kl_shape list[KL_SHAPES];
    int count;
    bool layers = strcmp(d->family, "layers") == 0;
    kl_shape first = layers ? kl_bench_layers_shape(b->ctx->device) : d->first;
    list[0] = first;
    count = 1;
    if (*shapes)
        KL_TRY(kl_shapes_parse(d->family, shapes, &first, list, &count));
    memcpy(b->pass, pass, sizeof b->pass);
    if (m)
        return kl_bench_model(b, m, list, count);
    if (layers)
        return kl_bench_layers(b, list, count);
    for (int f = 0; f < 4; f++)
        if (strcmp(kl_family_name((kl_family)f), d->family) == 0)
            return kl_bench_family(b, (kl_family)f, list, count);
    return kl_ok();
}

/* The list that --shapes names, or NULL. */
static const kl_shape_list *named_list(const char *family, const char *shapes)
{
    int count;
    const kl_shape_list *list = kl_shape_lists(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(family, list[i].family) == 0 && strcmp(shapes, list[i].name) == 0)
            return &list[i];
    return NULL;
}

/* What is around KDA's recurrence has a bench of its own. */
static bool is_around(const bench_options *o, const defaults *d)
{
    return o->shapes && strcmp(d->family, "kda") == 0 && strcmp(o->shapes, "around") == 0;
}

static kl_status run_all(kl_bench *b, const bench_options *o, const defaults *d, kl_model *m)
{
    const kl_shape_list *list = o->shapes ? named_list(d->family, o->shapes) : NULL;
    if (is_around(o, d)) {
        KL_REQUIRE(b->ctx->device == KL_CUDA, "--shapes: around: expected --device cuda: what is around the recurrence is timed there alone");
        return kl_bench_around(b);
    }
    if (o->shapes)
        return run_group(b, d, m, list ? list->shapes : o->shapes, o->chosen ? o->pass : list ? list->pass : d->pass[0]);
    for (int i = 0; i < 2 && d->shapes[i]; i++) {
        bool pass[KL_BENCH_PASSES], any = false;
        for (int p = 0; p < KL_BENCH_PASSES; p++)
            any |= pass[p] = o->chosen ? o->pass[p] && (d->pass[i][p] || p == KL_BENCH_FWDBWD) : d->pass[i][p];
        if (any)
            KL_TRY(run_group(b, d, m, d->shapes[i], pass));
    }
    return kl_ok();
}

static kl_status check_variant(const char *name, const char *family)
{
    bool known = strcmp(name, "reference") == 0;
    for (int f = 0; f < 4; f++) {
        int count;
        const kl_variant *v = kl_family_variants((kl_family)f, &count);
        for (int i = 0; i < count && strcmp(kl_family_name((kl_family)f), family) == 0; i++)
            known |= strcmp(v[i].name, name) == 0;
    }
    for (layers_op op = 0; op < LAYERS_OPS; op++)
        known |= strcmp(family, "layers") == 0 && strcmp(layers_name(op), name) == 0;
    KL_REQUIRE(known, "--variant: %s has no variant '%s'", family, name);
    return kl_ok();
}

static kl_status open_model(const bench_options *o, kl_ctx *ctx, kl_model **m)
{
    kl_config c;
    KL_TRY(kl_info_choose(&c, o->dir, o->preset, o->set, o->sets));
    KL_REQUIRE(o->preset || !o->sets, "--set: changes a --preset; a checkpoint is what it is");
    return o->dir ? kl_model_open(m, ctx, o->dir) : kl_model_random(m, ctx, &c, 1);
}

/* Said before the work is done, not after it. */
static kl_status can_write(const char *path)
{
    kl_writer w;
    if (!path || strcmp(path, "-") == 0)
        return kl_ok();
    KL_TRY(kl_writer_open(&w, path));
    kl_writer_abandon(&w);
    return kl_ok();
}

static kl_status check_request(const bench_options *o, const defaults *d)
{
    kl_shape list[KL_SHAPES];
    int count;
    if (o->chosen)
        KL_TRY(check_passes(d->family, o->common.context.device, o->pass));
    return o->shapes && !named_list(d->family, o->shapes) && !is_around(o, d) ? kl_shapes_parse(d->family, o->shapes, &d->first, list, &count) : kl_ok();
}

static kl_status bench(kl_bench *b, const bench_options *o, const defaults *d)
{
    KL_TRY(check_request(o, d));
    kl_model *m = NULL;
    if (strcmp(d->family, "model") == 0)
        KL_TRY(open_model(o, b->ctx, &m));
    kl_status s = kl_ceilings_measure(b->ctx, &b->ceilings);
    if (!kl_failed(s) && !b->quiet && b->ctx->device == KL_CUDA)
        printf("%s: copy %.0f GB/s, bfloat16 product %.0f TFLOP/s\n", b->provenance.device, b->ceilings.copy_gbps, b->ceilings.gemm_tflops);
    else if (!kl_failed(s) && !b->quiet)
        printf("%s, %d threads: copy %.1f GB/s, read %.1f GB/s, float32 product %.0f GFLOP/s\n", b->provenance.device, b->ctx->threads,
               b->ceilings.copy_gbps, b->ceilings.read_gbps, 1e3 * b->ceilings.gemm_tflops);
    if (!kl_failed(s))
        s = run_all(b, o, d, m);
    if (!kl_failed(s))
        kl_bench_means(b);
    kl_model_close(m);
    if (!kl_failed(s) && !b->rows)
        s = kl_error(KL_EINVAL, "bench: no variant offers what was asked");
    if (!kl_failed(s) && o->file)
        s = kl_lines_save(&b->lines, o->file);
    if (!kl_failed(s) && b->wrong)
        s = kl_error(KL_EINVAL, "bench: an error is beyond its limit");
    return s;
}

kl_status cli_bench(const cli_line *line, int argc, char **argv)
{
    static const struct argp argp = {options, parse, "kda|mla|moe|layers|model [DIR]", doc, 0, 0, 0};
    bench_options o = {.regime = KL_REGIME_MIXED};
    bool help;
    KL_TRY(cli_parse(&argp, argc, argv, &o, &help));
    if (help)
        return kl_ok();
    const defaults *d = NULL;
    for (size_t i = 0; o.what && i < sizeof table / sizeof *table; i++)
        if (strcmp(table[i].family, o.what) == 0)
            d = &table[i];
    KL_REQUIRE(o.what, "expected kda, mla, moe, layers or model; '%s --help' says more", argv[0]);
    KL_REQUIRE(d, "expected kda, mla, moe, layers or model, got '%s'", o.what);
    bool model = strcmp(d->family, "model") == 0;
    KL_REQUIRE(model || (!o.dir && !o.preset && !o.sets), "%s: a directory, --preset and --set are for model only", d->family);
    KL_REQUIRE(!model || !o.variant, "--variant: for the families only");
    if (o.variant)
        KL_TRY(check_variant(o.variant, d->family));
    kl_bench b = {.regime = o.regime, .variant = o.variant, .runs = (int)o.runs, .quiet = o.file && strcmp(o.file, "-") == 0};
    KL_TRY(kl_ctx_create(&b.ctx, &o.common.context));
    b.provenance = kl_provenance_now(b.ctx, line->argc, line->argv);
    kl_status s = can_write(o.file);
    if (!kl_failed(s))
        s = bench(&b, &o, d);
    kl_lines_free(&b.lines);
    kl_scratch_free(&b.scratch);
    kl_ctx_destroy(b.ctx);
    return s;
}
