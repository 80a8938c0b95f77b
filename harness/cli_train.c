#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "harness/cli.h"
#include "harness/info.h"
#include "harness/report.h"
#include "harness/train.h"

enum {
    KEY_PRESET = CLI_KEY_OWN, KEY_INIT, KEY_SET, KEY_DATA, KEY_TOKENIZER, KEY_OUT, KEY_RESUME, KEY_STEPS, KEY_BATCH, KEY_CONTEXT, KEY_LR,
    KEY_MIN_LR, KEY_BETA1, KEY_BETA2, KEY_DECAY, KEY_CLIP, KEY_WARMUP, KEY_BIAS, KEY_VALIDATION, KEY_EVAL, KEY_SAVE, KEY_LOG, KEY_LOG_FILE,
    KEY_SEED, KEY_DTYPE, KEY_QUIET, MAX_SET = 64,
};

typedef struct train_options {
    cli_common common;
    const char *preset, *init, *set[MAX_SET];
    int sets;
    kl_train_options train;
    int64_t seed;
} train_options;

static const struct argp_option options[] = {
    CLI_OPTIONS_HELP, CLI_OPTIONS_DEVICE, CLI_OPTIONS_JSON,
    {"preset", KEY_PRESET, "NAME", 0, "Begin a built-in configuration from random weights", 1},
    {"init", KEY_INIT, "DIR", 0, "Begin from a checkpoint", 1},
    {"set", KEY_SET, "KEY=VALUE", 0, "Change the --preset (may be repeated)", 1},
    {"data", KEY_DATA, "FILE", 0, "The text", 2},
    {"tokenizer", KEY_TOKENIZER, "DIR", 0, "Its tokenizer (bytes)", 2},
    {"out", KEY_OUT, "DIR", 0, "Where the checkpoint, the state and the log go", 2},
    {"resume", KEY_RESUME, 0, 0, "Continue the run in --out, bit for bit", 2},
    {"steps", KEY_STEPS, "N", 0, "Optimizer steps (1000)", 3},
    {"batch", KEY_BATCH, "N", 0, "Sequences a step (8)", 3},
    {"context", KEY_CONTEXT, "N", 0, "Tokens a sequence (256)", 3},
    {"lr", KEY_LR, "X", 0, "Learning rate after warm-up (3e-3)", 3},
    {"min-lr", KEY_MIN_LR, "X", 0, "Learning rate at the end of the cosine (a tenth of --lr)", 3},
    {"warmup", KEY_WARMUP, "N", 0, "Steps of warm-up (100)", 3},
    {"beta1", KEY_BETA1, "X", 0, "AdamW (0.9)", 3},
    {"beta2", KEY_BETA2, "X", 0, "AdamW (0.95)", 3},
    {"weight-decay", KEY_DECAY, "X", 0, "Of matrices (0.1)", 3},
    {"clip", KEY_CLIP, "X", 0, "Largest gradient norm, 0: any (1)", 3},
    {"bias-rate", KEY_BIAS, "X", 0, "Step of the router's choice bias towards even loads, 0: stays (1e-2)", 3},
    {"seed", KEY_SEED, "N", 0, "Of the weights and the order of the data (1)", 3},
    {"validation", KEY_VALIDATION, "X", 0, "Share of the text held out at its end (0.02)", 4},
    {"eval-every", KEY_EVAL, "N", 0, "Steps between validations (250)", 4},
    {"save-every", KEY_SAVE, "N", 0, "Steps between checkpoints (250)", 4},
    {"log-every", KEY_LOG, "N", 0, "Steps between lines of the log (10)", 4},
    {"log", KEY_LOG_FILE, "FILE", 0, "The log, JSON lines (DIR/train.jsonl)", 4},
    {"save-dtype", KEY_DTYPE, "bf16|f32", 0, "Type of the saved weights (bf16)", 4},
    {"quiet", KEY_QUIET, 0, 0, "No progress bar", 4},
    {0}};

static kl_status parse_dtype(const char *text, kl_dtype *dtype)
{
    *dtype = strcmp(text, "bf16") == 0 ? KL_BF16 : strcmp(text, "f16") == 0 ? KL_F16 : KL_F32;
    KL_REQUIRE(*dtype != KL_F32 || strcmp(text, "f32") == 0, "--save-dtype: expected bf16, f16 or f32, got '%s'", text);
    return kl_ok();
}

static kl_status parse_number(int key, const char *arg, train_options *o)
{
    kl_train_options *t = &o->train;
    switch (key) {
    case KEY_STEPS: return cli_int("--steps", arg, 1, INT64_C(1) << 40, &t->steps);
    case KEY_BATCH: return cli_int("--batch", arg, 1, 1 << 20, &t->batch);
    case KEY_CONTEXT: return cli_tokens("--context", arg, &t->context);
    case KEY_LR: return cli_real("--lr", arg, 0.0, 1.0, &t->lr);
    case KEY_MIN_LR: return cli_real("--min-lr", arg, 0.0, 1.0, &t->min_lr);
    case KEY_BETA1: return cli_real("--beta1", arg, 0.0, 1.0, &t->beta1);
    case KEY_BETA2: return cli_real("--beta2", arg, 0.0, 1.0, &t->beta2);
    case KEY_DECAY: return cli_real("--weight-decay", arg, 0.0, 10.0, &t->weight_decay);
    case KEY_CLIP: return cli_real("--clip", arg, 0.0, 1e6, &t->clip);
    case KEY_WARMUP: return cli_int("--warmup", arg, 0, INT64_C(1) << 40, &t->warmup);
    case KEY_BIAS: return cli_real("--bias-rate", arg, 0.0, 1.0, &t->bias_update_rate);
    case KEY_VALIDATION: return cli_real("--validation", arg, 0.0, 0.5, &t->validation);
    case KEY_EVAL: return cli_int("--eval-every", arg, 0, INT64_C(1) << 40, &t->eval_every);
    case KEY_SAVE: return cli_int("--save-every", arg, 0, INT64_C(1) << 40, &t->save_every);
    case KEY_LOG: return cli_int("--log-every", arg, 0, INT64_C(1) << 40, &t->log_every);
    case KEY_SEED: return cli_int("--seed", arg, 0, INT64_MAX, &o->seed);
    default: return parse_dtype(arg, &t->save_dtype);
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    train_options *o = state->input;
    kl_status s = kl_ok();
    switch (key) {
    case KEY_PRESET: o->preset = arg; break;
    case KEY_INIT: o->init = arg; break;
    case KEY_DATA: o->train.data = arg; break;
    case KEY_TOKENIZER: o->train.tokenizer_dir = arg; break;
    case KEY_OUT: o->train.out_dir = arg; break;
    case KEY_RESUME: o->train.resume = true; break;
    case KEY_LOG_FILE: o->train.log_path = arg; break;
    case KEY_QUIET: o->train.progress = false; break;
    case KEY_SET:
        if (o->sets == MAX_SET)
            s = kl_error(KL_EINVAL, "--set: expected at most %d", MAX_SET);
        else
            o->set[o->sets++] = arg;
        break;
    case ARGP_KEY_ARG: s = kl_error(KL_EINVAL, "unexpected argument '%s'", arg); break;
    default:
        if (key >= KEY_STEPS && key <= KEY_DTYPE)
            s = parse_number(key, arg, o);
        else
            return cli_common_key(key, arg, &o->common);
    }
    return kl_failed(s) ? cli_fail(&o->common, s) : 0;
}

static volatile int stop_asked;

/* The first interrupt asks for a clean end; the second one ends at once. */
static void on_interrupt(int number)
{
    stop_asked = 1;
    signal(number, SIG_DFL);
}

static kl_status open_model(const train_options *o, kl_ctx *ctx, kl_model **m)
{
    const char *dir = o->init ? o->init : !o->preset && o->train.resume ? o->train.out_dir : NULL;
    KL_REQUIRE(dir || o->preset, "expected --preset NAME, --init DIR or --resume");
    KL_REQUIRE(!(o->init && o->preset), "expected one of --preset and --init, got both");
    KL_REQUIRE(o->preset || !o->sets, "--set: changes a --preset; a checkpoint is what it is");
    if (dir)
        return kl_model_open(m, ctx, dir);
    kl_config c;
    KL_TRY(kl_info_choose(&c, NULL, o->preset, o->set, o->sets));
    return kl_model_random(m, ctx, &c, (uint64_t)o->seed);
}

static void print_json(const train_options *o, const kl_model *m, const kl_provenance *p)
{
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "out", o->train.out_dir);
    cJSON_AddNumberToObject(row, "steps", (double)o->train.steps);
    cJSON_AddNumberToObject(row, "parameters", (double)kl_config_params(&m->config).total);
    kl_provenance_add(row, p);
    char *text = cJSON_PrintUnformatted(row);
    puts(text ? text : "{}");
    cJSON_free(text);
    cJSON_Delete(row);
}

kl_status cli_train(const cli_line *line, int argc, char **argv)
{
    static const struct argp argp = {options, parse, "", "Trains a model on a text file; an interrupt saves before it ends.", 0, 0, 0};
    train_options o = {.train = kl_train_defaults(), .seed = 1};
    bool help;
    o.train.progress = isatty(STDERR_FILENO);
    o.train.min_lr = -1.0;
    KL_TRY(cli_parse(&argp, argc, argv, &o, &help));
    if (help)
        return kl_ok();
    KL_REQUIRE(o.train.data, "--data: expected a text file");
    KL_REQUIRE(o.train.out_dir, "--out: expected a directory");
    if (o.train.min_lr < 0.0)
        o.train.min_lr = 0.1 * o.train.lr;
    o.train.seed = (uint64_t)o.seed;
    o.train.stop = &stop_asked;
    kl_ctx *ctx;
    kl_model *m = NULL;
    KL_TRY(kl_ctx_create(&ctx, &o.common.context));
    kl_provenance p = kl_provenance_now(ctx, line->argc, line->argv);
    kl_status s = open_model(&o, ctx, &m);
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    if (!kl_failed(s))
        s = kl_train(m, &o.train);
    if (!kl_failed(s) && o.common.json)
        print_json(&o, m, &p);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
    return s;
}
