#include <string.h>

#include "harness/around.h"
#include "harness/cli.h"
#include "harness/verify.h"

enum { KEY_RANDOM = CLI_KEY_OWN, KEY_SEED, KEY_CASES, KEY_VARIANT, KEY_SUMMARY, KEY_ALL };

typedef struct verify_options {
    cli_common common;
    const char *what, *path, *variant;
    bool random, summary, every;
    int64_t seed, cases;
} verify_options;

static const struct argp_option options[] = {
    CLI_OPTIONS_HELP, CLI_OPTIONS_DEVICE, CLI_OPTIONS_JSON,
    {"random", KEY_RANDOM, 0, 0, "Random problems against the double-precision reference instead of golden data", 1},
    {"seed", KEY_SEED, "S", 0, "Of the random problems (1)", 1},
    {"cases", KEY_CASES, "N", 0, "How many random problems (42)", 1},
    {"every-tensor", KEY_ALL, 0, 0, "One row a tensor for random problems too, not only the worst of a pass", 1},
    {"variant", KEY_VARIANT, "NAME", 0, "Check this variant only (of a model: default, kda:chunk, ...)", 2},
    {"summary", KEY_SUMMARY, 0, 0, "One problem a family: every variant with its error and its time", 2},
    {0}};

static const char doc[] =
    "Checks every registered variant, one row a tensor with its error and its limit; exit status 0 only if all hold.\v"
    "kl verify kda FILE|DIR             golden data of the operator\n"
    "kl verify kda|mla|moe --random     random problems over the operator's hard cases\n"
    "kl verify layers                   norms, embedding, projections, loss and optimizers\n"
    "kl verify model DIR                a checkpoint with expected.safetensors\n"
    "kl verify tokenizer DIR            a vocabulary with expected.json\n"
    "kl verify --summary                a short table";

static error_t parse(int key, char *arg, struct argp_state *state)
{
    verify_options *o = state->input;
    kl_status s = kl_ok();
    switch (key) {
    case KEY_RANDOM: o->random = true; break;
    case KEY_SUMMARY: o->summary = true; break;
    case KEY_ALL: o->every = true; break;
    case KEY_VARIANT: o->variant = arg; break;
    case KEY_SEED: s = cli_int("--seed", arg, 0, INT64_MAX, &o->seed); break;
    case KEY_CASES: s = cli_int("--cases", arg, 1, 1000000, &o->cases); break;
    case ARGP_KEY_ARG:
        if (!o->what)
            o->what = arg;
        else if (!o->path)
            o->path = arg;
        else
            s = kl_error(KL_EINVAL, "unexpected argument '%s'", arg);
        break;
    default: return cli_common_key(key, arg, &o->common);
    }
    return kl_failed(s) ? cli_fail(&o->common, s) : 0;
}

static kl_status check_variant(const char *name, kl_family family)
{
    int count;
    const kl_variant *v = kl_family_variants(family, &count);
    bool known = strcmp(name, "reference") == 0;
    for (int i = 0; i < count; i++)
        known |= strcmp(v[i].name, name) == 0;
    KL_REQUIRE(known, "--variant: %s has no variant '%s'", kl_family_name(family), name);
    return kl_ok();
}

static kl_status verify_family(kl_verifier *v, const verify_options *o, kl_family family)
{
    if (o->variant)
        KL_TRY(check_variant(o->variant, family));
    if (o->random) {
        KL_REQUIRE(!o->path, "expected either --random or a path, got both");
        if (!v->json)
            printf("%s: %lld random cases of seed %lld\n", kl_family_name(family), (long long)o->cases, (long long)o->seed);
        v->brief = !o->every;
        KL_TRY(kl_verify_random(v, family, (uint64_t)o->seed, o->cases));
        bool around = family == KL_FAMILY_KDA && v->ctx->device == KL_CUDA && !o->variant;
        return around ? kl_verify_around(v) : kl_ok();
    }
    KL_REQUIRE(family == KL_FAMILY_KDA, "%s: there is no golden data for this family alone; expected --random", kl_family_name(family));
    KL_REQUIRE(o->path, "kda: expected a golden file, a directory of them, or --random");
    return kl_verify_kda_golden(v, o->path);
}

static kl_status dispatch(kl_verifier *v, const verify_options *o)
{
    if (o->summary)
        return kl_verify_summary(v);
    for (int f = 0; f < 4; f++)
        if (f != KL_FAMILY_DPLR && strcmp(o->what, kl_family_name((kl_family)f)) == 0)
            return verify_family(v, o, (kl_family)f);
    if (strcmp(o->what, "layers") == 0) {
        KL_REQUIRE(!o->path && !o->random, "layers: expected neither --random nor a path: its cases are fixed");
        return kl_verify_layers(v);
    }
    KL_REQUIRE(!o->random, "--random: expected kda, mla or moe, got '%s'", o->what);
    bool model = strcmp(o->what, "model") == 0;
    KL_REQUIRE(model || strcmp(o->what, "tokenizer") == 0, "expected kda, mla, moe, layers, model or tokenizer, got '%s'", o->what);
    KL_REQUIRE(o->path, "%s: expected a directory", o->what);
    return model ? kl_verify_model(v, o->path) : kl_verify_tokenizer(v, o->path);
}

kl_status cli_verify(const cli_line *line, int argc, char **argv)
{
    static const struct argp argp = {options, parse, "kda|mla|moe|layers|model|tokenizer [FILE|DIR]", doc, 0, 0, 0};
    verify_options o = {.seed = 1, .cases = 42};
    kl_verifier v = {0};
    bool help;
    KL_TRY(cli_parse(&argp, argc, argv, &o, &help));
    if (help)
        return kl_ok();
    KL_REQUIRE(o.what || o.summary, "expected kda, mla, moe, layers, model or tokenizer; '%s --help' says more", argv[0]);
    KL_TRY(kl_ctx_create(&v.ctx, &o.common.context));
    v.json = o.common.json;
    v.only = o.variant;
    v.provenance = kl_provenance_now(v.ctx, line->argc, line->argv);
    kl_status s = dispatch(&v, &o);
    if (!kl_failed(s) || v.rows) {
        kl_status finish = kl_verify_finish(&v);
        s = kl_failed(s) ? s : finish;
    }
    kl_ctx_destroy(v.ctx);
    return s;
}
