#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/cli.h"
#include "harness/info.h"
#include "harness/report.h"

enum { KEY_PRESET = CLI_KEY_OWN, KEY_SET, KEY_CONTEXT, KEY_LIST, MAX_SET = 64, MAX_CONTEXT = 32 };

typedef struct info_options {
    cli_common common;
    const char *dir, *preset, *set[MAX_SET];
    int sets, contexts;
    bool list;
    int64_t context[MAX_CONTEXT];
} info_options;

static const struct argp_option options[] = {
    CLI_OPTIONS_HELP, CLI_OPTIONS_JSON,
    {"preset", KEY_PRESET, "NAME", 0, "A built-in configuration instead of a directory", 1},
    {"presets", KEY_LIST, 0, 0, "List the built-in configurations", 1},
    {"set", KEY_SET, "KEY=VALUE", 0, "Change the configuration (may be repeated), for example hybrid=7:1 or gate=head", 1},
    {"context", KEY_CONTEXT, "4K,128K,1M", 0, "Context lengths for the cache table", 1},
    {0}};

static kl_status parse_contexts(info_options *o, const char *text)
{
    char copy[512], *rest = copy, *item;
    KL_REQUIRE(strlen(text) < sizeof copy, "--context: the list is too long");
    strcpy(copy, text);
    o->contexts = 0;
    while ((item = strsep(&rest, ","))) {
        KL_REQUIRE(o->contexts < MAX_CONTEXT, "--context: expected at most %d lengths", MAX_CONTEXT);
        KL_TRY(cli_tokens("--context", item, &o->context[o->contexts++]));
    }
    return kl_ok();
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    info_options *o = state->input;
    kl_status s;
    switch (key) {
    case KEY_PRESET: o->preset = arg; return 0;
    case KEY_LIST: o->list = true; return 0;
    case KEY_SET:
        if (o->sets == MAX_SET)
            return cli_fail(&o->common, kl_error(KL_EINVAL, "--set: expected at most %d", MAX_SET));
        o->set[o->sets++] = arg;
        return 0;
    case KEY_CONTEXT:
        s = parse_contexts(o, arg);
        return kl_failed(s) ? cli_fail(&o->common, s) : 0;
    case ARGP_KEY_ARG:
        if (o->dir)
            return cli_fail(&o->common, kl_error(KL_EINVAL, "unexpected argument '%s'", arg));
        o->dir = arg;
        return 0;
    default: return cli_common_key(key, arg, &o->common);
    }
}

static void print_text(const kl_config *c, const kl_param_count *n, double bytes, const kl_cache_row *row, int rows)
{
    char total[32], active[32], size[32], cell[6][32], ratio[16];
    kl_format_count(n->total, total, sizeof total);
    kl_format_count(n->active, active, sizeof active);
    kl_format_bytes(bytes, size, sizeof size);
    int64_t kda = 0, sparse = 0;
    for (int64_t i = 0; i < c->num_layers; i++) {
        kda += c->mixer[i] == KL_MIX_KDA;
        sparse += c->sparse[i];
    }
    printf("layers      %lld: %lld KDA, %lld MLA; %lld sparse, %lld dense\n", (long long)c->num_layers, (long long)kda,
           (long long)(c->num_layers - kda), (long long)sparse, (long long)(c->num_layers - sparse));
    printf("sizes       vocabulary %lld, hidden %lld, context %lld, %s\n", (long long)c->vocab_size, (long long)c->hidden_size,
           (long long)c->max_length, kl_dtype_name(c->dtype));
    printf("KDA         %lld heads of %lld, %lld gate values a head, convolution of %lld taps\n", (long long)c->kda_heads,
           (long long)c->kda_head_dim, (long long)c->gate_values, (long long)c->conv_width);
    printf("MLA         %lld heads, latent %lld + %lld, query/key %lld + %lld, value %lld, %s\n", (long long)c->num_heads,
           (long long)c->kv_lora_rank, (long long)c->qk_rope_head_dim, (long long)c->qk_nope_head_dim, (long long)c->qk_rope_head_dim,
           (long long)c->v_head_dim, c->mla_use_nope ? "NoPE" : "RoPE");
    printf("MLP         dense %lld; %lld of %lld experts of %lld, %lld shared\n", (long long)c->intermediate_size, (long long)c->top_k,
           (long long)c->num_experts, (long long)c->moe_intermediate_size, (long long)c->num_shared_experts);
    printf("parameters  %s in all, %s active for a token, %s\n\n", total, active, size);
    kl_table t;
    kl_table_start(&t, 7, (const char *[]){"context", "KDA state", "convolution", "latents", "cache", "all-MLA", "ratio"});
    for (int i = 0; i < rows; i++) {
        kl_format_count(row[i].context, cell[0], sizeof *cell);
        const size_t bytes_of[] = {row[i].kda_state, row[i].conv_tail, row[i].latents, row[i].total, row[i].all_mla};
        for (int j = 0; j < 5; j++)
            kl_format_bytes((double)bytes_of[j], cell[j + 1], sizeof *cell);
        snprintf(ratio, sizeof ratio, "%.2f", row[i].all_mla ? (double)row[i].total / (double)row[i].all_mla : 0.0);
        kl_table_row(&t, (const char *[]){cell[0], cell[1], cell[2], cell[3], cell[4], cell[5], ratio}, 7);
    }
    kl_table_print(&t, stdout);
    kl_table_free(&t);
}

static kl_status print_json(const kl_config *c, const kl_param_count *n, double bytes, const kl_cache_row *row, int rows)
{
    cJSON *o = cJSON_CreateObject(), *list;
    cJSON_AddItemToObject(o, "config", kl_info_config(c));
    cJSON_AddNumberToObject(o, "parameters", (double)n->total);
    cJSON_AddNumberToObject(o, "active_parameters", (double)n->active);
    cJSON_AddNumberToObject(o, "bytes", bytes);
    list = cJSON_AddArrayToObject(o, "cache");
    for (int i = 0; i < rows; i++) {
        cJSON *r = cJSON_CreateObject();
        cJSON_AddNumberToObject(r, "context", (double)row[i].context);
        cJSON_AddNumberToObject(r, "kda_state_bytes", (double)row[i].kda_state);
        cJSON_AddNumberToObject(r, "conv_bytes", (double)row[i].conv_tail);
        cJSON_AddNumberToObject(r, "latent_bytes", (double)row[i].latents);
        cJSON_AddNumberToObject(r, "bytes", (double)row[i].total);
        cJSON_AddNumberToObject(r, "all_mla_bytes", (double)row[i].all_mla);
        cJSON_AddItemToArray(list, r);
    }
    return kl_object_print(o);
}

kl_status cli_info(const cli_line *line, int argc, char **argv)
{
    static const struct argp argp = {options, parse, "[DIR]", "What a model is made of, and what its cache takes.", 0, 0, 0};
    info_options o = {.contexts = 3, .context = {4096, 131072, 1048576}};
    kl_config c;
    bool help;
    (void)line;
    KL_TRY(cli_parse(&argp, argc, argv, &o, &help));
    if (help)
        return kl_ok();
    if (o.list) {
        for (int i = 0; kl_config_preset_name(i); i++)
            puts(kl_config_preset_name(i));
        return kl_ok();
    }
    KL_TRY(kl_info_choose(&c, o.dir, o.preset, o.set, o.sets));
    kl_param_count n = kl_config_params(&c);
    kl_cache_row row[MAX_CONTEXT];
    double bytes;
    for (int i = 0; i < o.contexts; i++)
        KL_TRY(kl_info_cache(&c, o.context[i], &row[i]));
    KL_TRY(kl_info_bytes(&c, &bytes));
    if (o.common.json)
        return print_json(&c, &n, bytes, row, o.contexts);
    print_text(&c, &n, bytes, row, o.contexts);
    return kl_ok();
}
