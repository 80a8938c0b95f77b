#include <stdlib.h>
#include <string.h>

#include "harness/cli.h"
#include "harness/file.h"
#include "harness/generate.h"
#include "harness/report.h"
#include "harness/stream.h"
#include "harness/tokenizer.h"

enum {
    KEY_PROMPT = CLI_KEY_OWN, KEY_PROMPT_FILE, KEY_BATCH_FILE, KEY_CHAT, KEY_SYSTEM, KEY_TEMPERATURE, KEY_TOP_K, KEY_TOP_P, KEY_MIN_P,
    KEY_PENALTY, KEY_SEED, KEY_CHUNK, KEY_CONTEXT, KEY_SAVE, KEY_LOAD, KEY_TOKENIZER, MAX_PROMPTS = 1024,
};
static const size_t prompt_limit = (size_t)64 << 20;

typedef struct generate_options {
    cli_common common;
    const char *dir, *prompt, *prompt_file, *batch_file, *system, *save, *load, *tokenizer;
    bool chat;
    int64_t new_tokens, chunk, context, top_k, seed;
    double temperature, top_p, min_p, penalty;
} generate_options;

static const struct argp_option options[] = {
    CLI_OPTIONS_HELP, CLI_OPTIONS_DEVICE, CLI_OPTIONS_JSON,
    {"prompt", KEY_PROMPT, "TEXT", 0, "The prompt (otherwise it is read from standard input)", 1},
    {"prompt-file", KEY_PROMPT_FILE, "FILE", 0, "The prompt from a file", 1},
    {"batch-file", KEY_BATCH_FILE, "FILE", 0, "One prompt a line, generated together", 1},
    {"chat", KEY_CHAT, 0, 0, "The prompt is what the user says: render the chat template around it", 1},
    {"system", KEY_SYSTEM, "TEXT", 0, "With --chat: the system's turn before it", 1},
    {"new", 'n', "N", 0, "Tokens to add at most (128)", 2},
    {"temperature", KEY_TEMPERATURE, "X", 0, "0 is greedy (0)", 2},
    {"top-k", KEY_TOP_K, "N", 0, "Sample among the N likeliest (0: all)", 2},
    {"top-p", KEY_TOP_P, "X", 0, "Sample within probability X (1)", 2},
    {"min-p", KEY_MIN_P, "X", 0, "Sample at least X times as likely as the best (0)", 2},
    {"repetition-penalty", KEY_PENALTY, "X", 0, "Divide what favours ids already seen (1)", 2},
    {"seed", KEY_SEED, "N", 0, "Of the sampling (1)", 2},
    {"prefill-chunk", KEY_CHUNK, "N", 0, "Tokens a prefill call (512)", 3},
    {"context", KEY_CONTEXT, "N", 0, "Tokens that the cache has room for (prompt and new ones)", 3},
    {"cache-save", KEY_SAVE, "FILE", 0, "Keep the cache as it is at the end, prompt and new tokens in it", 3},
    {"cache-load", KEY_LOAD, "FILE", 0, "Continue from a kept cache; the prompt follows what is in it", 3},
    {"tokenizer", KEY_TOKENIZER, "DIR", 0, "Where the tokenizer is (the model's directory)", 3},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    generate_options *o = state->input;
    kl_status s = kl_ok();
    switch (key) {
    case KEY_PROMPT: o->prompt = arg; break;
    case KEY_PROMPT_FILE: o->prompt_file = arg; break;
    case KEY_BATCH_FILE: o->batch_file = arg; break;
    case KEY_CHAT: o->chat = true; break;
    case KEY_SYSTEM: o->system = arg; break;
    case KEY_SAVE: o->save = arg; break;
    case KEY_LOAD: o->load = arg; break;
    case KEY_TOKENIZER: o->tokenizer = arg; break;
    case 'n': s = cli_int("-n", arg, 0, 1 << 24, &o->new_tokens); break;
    case KEY_TEMPERATURE: s = cli_real("--temperature", arg, 0.0, 100.0, &o->temperature); break;
    case KEY_TOP_K: s = cli_int("--top-k", arg, 0, 1 << 24, &o->top_k); break;
    case KEY_TOP_P: s = cli_real("--top-p", arg, 0.0, 1.0, &o->top_p); break;
    case KEY_MIN_P: s = cli_real("--min-p", arg, 0.0, 1.0, &o->min_p); break;
    case KEY_PENALTY: s = cli_real("--repetition-penalty", arg, 1e-3, 1e3, &o->penalty); break;
    case KEY_SEED: s = cli_int("--seed", arg, 0, INT64_MAX, &o->seed); break;
    case KEY_CHUNK: s = cli_int("--prefill-chunk", arg, 1, 1 << 24, &o->chunk); break;
    case KEY_CONTEXT: s = cli_tokens("--context", arg, &o->context); break;
    case ARGP_KEY_ARG:
        if (o->dir)
            s = kl_error(KL_EINVAL, "unexpected argument '%s'", arg);
        o->dir = arg;
        break;
    default: return cli_common_key(key, arg, &o->common);
    }
    return kl_failed(s) ? cli_fail(&o->common, s) : 0;
}

/* One prompt a sequence, and what becomes of it. */
typedef struct job {
    const generate_options *o;
    kl_model *model;
    kl_tokenizer *tokenizer;
    kl_cache *cache;
    int64_t N;
    char *prompt[MAX_PROMPTS];
    int32_t *ids[MAX_PROMPTS], *new_ids[MAX_PROMPTS];
    int64_t length[MAX_PROMPTS], new_count[MAX_PROMPTS];
    kl_stream stream[MAX_PROMPTS];
    kl_status trouble; /* what the callback could not say */
    int64_t stop_ids[4];
    int stops;
    kl_generation_stats stats;
} job;

static void job_free(job *j)
{
    for (int64_t n = 0; n < j->N; n++) {
        free(j->prompt[n]);
        free(j->ids[n]);
        free(j->new_ids[n]);
        kl_stream_free(&j->stream[n]);
    }
    kl_cache_destroy(j->cache);
    kl_tokenizer_close(j->tokenizer);
    kl_model_close(j->model);
    free(j);
}

static kl_status read_stdin(char **text, size_t *size)
{
    size_t room = 1 << 16, used = 0, got;
    char *bytes = malloc(room);
    while (bytes && (got = fread(bytes + used, 1, room - used - 1, stdin)) > 0) {
        used += got;
        if (used > prompt_limit) {
            free(bytes);
            return kl_error(KL_EINVAL, "prompt: expected at most %zu bytes on standard input", prompt_limit);
        }
        if (room - used < 2) {
            char *more = realloc(bytes, room *= 2);
            if (!more)
                free(bytes);
            bytes = more;
        }
    }
    if (!bytes)
        return kl_error(KL_ENOMEM, "prompt: out of memory");
    bytes[used] = '\0';
    *text = bytes;
    *size = used;
    return kl_ok();
}

static kl_status add_prompt(job *j, const char *text, size_t size)
{
    KL_REQUIRE(j->N < MAX_PROMPTS, "--batch-file: expected at most %d prompts", MAX_PROMPTS);
    KL_REQUIRE(memchr(text, '\0', size) == NULL, "prompt: byte %zu is NUL", (size_t)((const char *)memchr(text, '\0', size) - text));
    char *copy = strndup(text, size);
    if (!copy)
        return kl_error(KL_ENOMEM, "prompt: out of memory");
    j->prompt[j->N++] = copy;
    return kl_ok();
}

static kl_status add_lines(job *j, const char *text, size_t size)
{
    const char *end = text + size;
    while (text < end) {
        const char *stop = memchr(text, '\n', (size_t)(end - text));
        size_t length = (size_t)((stop ? stop : end) - text);
        if (length)
            KL_TRY(add_prompt(j, text, length));
        text += length + 1;
    }
    KL_REQUIRE(j->N, "--batch-file: expected at least one line that is not empty");
    return kl_ok();
}

static kl_status read_prompts(job *j)
{
    const generate_options *o = j->o;
    KL_REQUIRE((o->prompt != NULL) + (o->prompt_file != NULL) + (o->batch_file != NULL) <= 1,
               "expected one of --prompt, --prompt-file and --batch-file");
    if (o->prompt)
        return add_prompt(j, o->prompt, strlen(o->prompt));
    char *text;
    size_t size;
    if (o->prompt_file || o->batch_file)
        KL_TRY(kl_file_read(o->prompt_file ? o->prompt_file : o->batch_file, prompt_limit, &text, &size));
    else
        KL_TRY(read_stdin(&text, &size));
    kl_status s = o->batch_file ? add_lines(j, text, size) : add_prompt(j, text, size);
    free(text);
    return s;
}

static kl_status encode(job *j)
{
    for (int64_t n = 0; n < j->N; n++) {
        char *rendered = NULL;
        const char *text = j->prompt[n];
        if (j->o->chat) {
            kl_message turn[2] = {{"system", j->o->system}, {"user", text}};
            KL_TRY(j->o->system ? kl_chat_render(turn, 2, true, &rendered) : kl_chat_render(turn + 1, 1, true, &rendered));
            text = rendered;
        }
        kl_status s = kl_tokenizer_encode(j->tokenizer, text, strlen(text), j->o->chat, &j->ids[n], &j->length[n]);
        free(rendered);
        KL_TRY(kl_error_in(s, "prompt"));
        KL_REQUIRE(j->length[n] >= 1, "prompt: expected some text, got none");
        j->new_ids[n] = malloc((size_t)(j->o->new_tokens + 1) * sizeof(int32_t));
        if (!j->new_ids[n])
            return kl_error(KL_ENOMEM, "out of memory for %lld new tokens", (long long)j->o->new_tokens);
    }
    return kl_ok();
}

static void add_stop(job *j, int64_t id)
{
    for (int i = 0; i < j->stops; i++)
        if (j->stop_ids[i] == id)
            return;
    if (id >= 0 && j->stops < 4)
        j->stop_ids[j->stops++] = id;
}

static bool on_token(void *user, int64_t n, int32_t id)
{
    job *j = user;
    for (int i = 0; i < j->stops; i++)
        if (j->stop_ids[i] == id)
            return false;
    size_t size = 0;
    const char *piece = kl_tokenizer_piece(j->tokenizer, id, &size);
    kl_status s = piece ? kl_stream_add(&j->stream[n], piece, size) : kl_ok();
    if (kl_failed(s))
        j->trouble = s;
    return !kl_failed(s);
}

/* Room for what is loaded, the longest prompt and the new tokens, but no more than the model's context. */
static kl_status make_cache(job *j)
{
    const kl_config *c = &j->model->config;
    int64_t longest = 0, capacity = j->o->context;
    for (int64_t n = 0; n < j->N; n++)
        longest = j->length[n] > longest ? j->length[n] : longest;
    KL_REQUIRE(!capacity || c->max_length <= 0 || capacity <= c->max_length, "--context: expected at most the model's %lld tokens, got %lld",
               (long long)c->max_length, (long long)capacity);
    int64_t total = longest + j->o->new_tokens, most = c->max_length > 0 ? c->max_length : total;
    if (!capacity && j->o->load)
        capacity = most < total + (1 << 16) ? most : total + (1 << 16);
    if (!capacity)
        capacity = total < most || longest > most ? total : most;
    KL_REQUIRE(longest <= capacity && (c->max_length <= 0 || longest <= c->max_length), "prompt: %lld tokens do not fit the context of %lld",
               (long long)longest, (long long)(c->max_length > 0 && c->max_length < capacity ? c->max_length : capacity));
    KL_TRY(kl_cache_create(&j->cache, c, j->N, capacity));
    if (j->o->load) {
        KL_REQUIRE(j->N == 1, "--cache-load: expected one prompt, got %lld", (long long)j->N);
        KL_TRY(kl_cache_load(j->cache, 0, j->o->load));
    }
    return kl_ok();
}

/* The last new token has not been fed back; a cache that is kept shall know it. */
static kl_status save_cache(job *j)
{
    KL_REQUIRE(j->N == 1, "--cache-save: expected one prompt, got %lld", (long long)j->N);
    int64_t cu[2] = {0, 1};
    if (j->new_count[0] && j->cache->length[0] < j->cache->capacity)
        KL_TRY(kl_model_forward(j->model, &(kl_batch){1, cu, j->new_ids[0] + j->new_count[0] - 1, NULL}, j->cache, &(kl_outputs){0}));
    return kl_cache_save(j->cache, 0, j->o->save);
}

static kl_status generate(job *j)
{
    const generate_options *o = j->o;
    KL_TRY(read_prompts(j));
    KL_TRY(kl_tokenizer_open(&j->tokenizer, o->tokenizer ? o->tokenizer : o->dir));
    KL_TRY(encode(j));
    KL_TRY(make_cache(j));
    add_stop(j, j->model->config.eos_id);
    add_stop(j, kl_tokenizer_special(j->tokenizer, "<|im_end|>"));
    add_stop(j, kl_tokenizer_special(j->tokenizer, "[EOS]"));
    if (!o->common.json && j->N == 1)
        j->stream[0].out = stdout;
    kl_generation g = {.max_new = o->new_tokens, .prefill_chunk = o->chunk, .stop_ids = j->stop_ids, .stop_count = j->stops, .on_token = on_token, .user = j,
                       .sampling = {(float)o->temperature, o->top_k, (float)o->top_p, (float)o->min_p, (float)o->penalty, (uint64_t)o->seed}};
    KL_TRY(kl_generate(j->model, j->cache, j->N, (const int32_t *const *)j->ids, j->length, &g, j->new_ids, j->new_count, &j->stats));
    KL_TRY(j->trouble);
    for (int64_t n = 0; n < j->N; n++)
        KL_TRY(kl_stream_end(&j->stream[n]));
    return o->save ? save_cache(j) : kl_ok();
}

static double rate(double tokens, double seconds) { return seconds > 0.0 ? tokens / seconds : 0.0; }

/* The first new token of each sequence comes out of the prefill. */
static double decoded(const job *j)
{
    double first = 0.0;
    for (int64_t n = 0; n < j->N; n++)
        first += j->new_count[n] > 0;
    return (double)j->stats.new_tokens - first;
}

static void print_text(const job *j)
{
    char cache[32];
    for (int64_t n = 0; j->N > 1 && n < j->N; n++)
        printf("[%lld] %s%s\n", (long long)n, j->prompt[n], j->stream[n].text);
    if (j->N == 1)
        putchar('\n');
    fflush(stdout);
    kl_format_bytes((double)j->stats.cache_bytes, cache, sizeof cache);
    fprintf(stderr, "prefill %lld tokens in %.3f s (%.1f tokens/s); %lld new tokens, %.1f tokens/s; cache %s (%zu bytes)\n",
            (long long)j->stats.prompt_tokens, j->stats.prefill_seconds, rate((double)j->stats.prompt_tokens, j->stats.prefill_seconds),
            (long long)j->stats.new_tokens, rate(decoded(j), j->stats.decode_seconds), cache, j->stats.cache_bytes);
}

static kl_status print_json(const job *j, const kl_provenance *p)
{
    cJSON *o = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(o, "sequences");
    for (int64_t n = 0; n < j->N; n++) {
        cJSON *s = cJSON_CreateObject(), *ids = cJSON_AddArrayToObject(s, "ids");
        cJSON_AddStringToObject(s, "prompt", j->prompt[n]);
        cJSON_AddStringToObject(s, "text", j->stream[n].text ? j->stream[n].text : "");
        cJSON_AddNumberToObject(s, "prompt_tokens", (double)j->length[n]);
        for (int64_t i = 0; i < j->new_count[n]; i++)
            cJSON_AddItemToArray(ids, cJSON_CreateNumber(j->new_ids[n][i]));
        cJSON_AddItemToArray(list, s);
    }
    cJSON_AddNumberToObject(o, "prompt_tokens", (double)j->stats.prompt_tokens);
    cJSON_AddNumberToObject(o, "new_tokens", (double)j->stats.new_tokens);
    cJSON_AddNumberToObject(o, "prefill_seconds", j->stats.prefill_seconds);
    cJSON_AddNumberToObject(o, "decode_seconds", j->stats.decode_seconds);
    cJSON_AddNumberToObject(o, "decode_tokens_per_s", rate(decoded(j), j->stats.decode_seconds));
    cJSON_AddNumberToObject(o, "cache_bytes", (double)j->stats.cache_bytes);
    kl_provenance_add(o, p);
    return kl_object_print(o);
}

kl_status cli_generate(const cli_line *line, int argc, char **argv)
{
    static const struct argp argp = {options, parse, "DIR", "Continues a prompt; the text is printed as it comes, the rates on standard error.", 0, 0, 0};
    generate_options o = {.new_tokens = 128, .top_p = 1.0, .penalty = 1.0, .seed = 1};
    bool help;
    KL_TRY(cli_parse(&argp, argc, argv, &o, &help));
    if (help)
        return kl_ok();
    KL_REQUIRE(o.dir, "expected a model's directory; '%s --help' says more", argv[0]);
    KL_REQUIRE(!o.system || o.chat, "--system: expected together with --chat");
    kl_ctx *ctx;
    KL_TRY(kl_ctx_create(&ctx, &o.common.context));
    job *j = calloc(1, sizeof *j);
    kl_status s = j ? kl_ok() : kl_error(KL_ENOMEM, "out of memory");
    if (j) {
        j->o = &o;
        s = kl_model_open(&j->model, ctx, o.dir);
        if (!kl_failed(s))
            s = generate(j);
        if (!kl_failed(s) && o.common.json) {
            kl_provenance p = kl_provenance_now(ctx, line->argc, line->argv);
            s = print_json(j, &p);
        } else if (!kl_failed(s)) {
            print_text(j);
        }
        job_free(j);
    }
    kl_ctx_destroy(ctx);
    return s;
}
