/* The program from outside: bad input gets one line and a non-zero status, output marked as JSON is JSON, verify's
 * status says whether everything holds. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <cjson/cJSON.h>

#include "tests/shell.h"

#define TINY "tests/golden/models/tiny"
#define KDA_FILE "tests/golden/kda/04_kimi_T64_H2_HV2_K32_V32.safetensors"

static char scratch[128];

static int set_up(void **state)
{
    (void)state;
    make_folder(scratch, sizeof scratch);
    setenv("OMP_NUM_THREADS", "1", 1);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    remove_folder(scratch);
    return 0;
}

/* kl with these arguments fails with status 1 and one line on standard error that begins with "kl: " and names the thing. */
static void refused(const char *arguments, const char *names)
{
    shell_result *r = shell("%s/kl %s >/dev/null", shell_build(), arguments);
    if (r->status != 1 || shell_lines(r->text) != 1 || strncmp(r->text, "kl: ", 4) != 0 || !strstr(r->text, names))
        fail_msg("kl %s: expected status 1 and one line with \"%s\"; status %d, said:\n%s", arguments, names, r->status, r->text);
    free(r);
}

static void accepted(const char *arguments)
{
    shell_result *r = shell("%s/kl %s", shell_build(), arguments);
    if (r->status != 0)
        fail_msg("kl %s: status %d, said:\n%s", arguments, r->status, r->text);
    free(r);
}

/* A copy of the tiny model with one thing changed by a shell command that runs in it. */
static const char *model_with(const char *change)
{
    static char arguments[256];
    shell_result *r = shell("rm -rf '%s/m' && cp -r " TINY " '%s/m' && chmod -R u+w '%s/m' && cd '%s/m' && %s", scratch, scratch, scratch, scratch, change);
    if (r->status != 0)
        fail_msg("%s: %s", change, r->text);
    free(r);
    snprintf(arguments, sizeof arguments, "generate '%s/m' --prompt Hello -n 1", scratch);
    return arguments;
}

static void commands_and_options(void **state)
{
    (void)state;
    refused("", "expected a command");
    refused("frobnicate", "'frobnicate'");
    refused("--frobnicate", "'--frobnicate'");
    refused("info --frobnicate", "'--frobnicate'");
    refused("info -z", "'-z'");
    refused("info --preset", "needs a value");
    refused("info --json=yes --preset 48b", "takes no value");
    refused("info", "expected a directory or --preset");
    refused("info --preset nonsense", "nonsense");
    refused("info --preset 48b --set nonsense=1", "nonsense");
    refused("info --preset 48b --context 4Q", "4Q");
    refused("info --preset 48b extra more", "'more'");
    refused("verify", "expected kda, mla, moe, layers, model or tokenizer");
    refused("verify frob", "'frob'");
    refused("verify kda", "golden file");
    refused("verify mla", "--random");
    refused("verify kda --random --cases 0", "--cases");
    refused("verify kda --random --variant nonsense", "nonsense");
    refused("verify model", "expected a directory");
    refused("verify kda --device tpu --random", "'tpu'");
    refused("bench", "expected kda, mla, moe, layers or model");
    refused("bench frob", "'frob'");
    refused("generate", "expected a model's directory");
    refused("generate " TINY " --prompt a --prompt-file b", "expected one of");
    refused("generate " TINY " --temperature hot --prompt a", "--temperature");
    refused("train --out x", "--data");
    refused("train --data x", "--out");
    refused("tokenize", "expected a tokenizer's directory");
    refused("tokenize tests/golden/tokenizer a b", "'b'");
    refused("tokenize tests/golden/tokenizer --decode '1 99999999'", "99999999");
    refused("tokenize --learn x --size 300", "--out");
}

static void shapes_and_regimes(void **state)
{
    (void)state;
    refused("bench kda --shapes T=16,Q=3", "'Q'");
    refused("bench mla --shapes HV=3", "'HV'");
    refused("bench kda --shapes T=-5", "-5");
    refused("bench kda --shapes T=", "'T='");
    refused("bench kda --shapes K=257", "257");
    refused("bench kda --shapes T=16,H=2,HV=3", "HV");
    refused("bench kda --shapes T=64G", "64G");
    refused("bench kda --shapes T=64M,H=4096,K=256", "memory");
    refused("bench mla --shapes latent=int4", "int4");
    refused("bench kda --gate wild", "'wild'");
    refused("bench kda --pass prefill", "prefill");
    refused("bench kda --pass sideways", "sideways");
    refused("bench kda --variant nonsense", "nonsense");
    refused("bench kda --preset 48b", "model only");
    refused("bench kda --json /nonexistent/rows", "/nonexistent/rows");
    refused("bench model", "expected a directory or --preset");
}

static void files_that_are_not_there_or_not_whole(void **state)
{
    (void)state;
    refused("verify kda /nonexistent.safetensors", "/nonexistent.safetensors");
    refused("verify kda tests/golden/tokenizer", "no .safetensors");
    refused("verify model /nonexistent", "/nonexistent");
    refused("verify tokenizer " TINY, "expected.json");
    refused("generate /nonexistent --prompt a", "/nonexistent");
    refused("tokenize /nonexistent a", "/nonexistent");
    refused("generate " TINY " --prompt-file /nonexistent", "/nonexistent");
    refused(model_with("head -c 100000 model.safetensors > m && mv m model.safetensors"), "model.safetensors");
    refused(model_with("head -c 4 model.safetensors > m && mv m model.safetensors"), "model.safetensors");
    refused(model_with("printf '\\377\\377\\377\\377\\377\\377\\377\\177' | dd of=model.safetensors conv=notrunc 2>/dev/null"), "model.safetensors");
    refused(model_with("echo tail >> model.safetensors"), "model.safetensors");
    refused(model_with("rm model.safetensors"), "model.safetensors");
    refused(model_with("sed -i 's/q_proj/q_prox/' model.safetensors"), "q_proj.weight' is missing");
    refused(model_with("rm config.json"), "config.json");
    refused(model_with("echo '{' > config.json"), "config.json");
    refused(model_with("sed -i 's/\"hidden_size\": 96/\"hidden_size\": -96/' config.json"), "hidden_size");
    refused(model_with("sed -i 's/\"hidden_size\": 96/\"hidden_size\": 1e18/' config.json"), "hidden_size");
    refused(model_with("sed -i 's/\"hidden_size\": 96/\"hidden_size\": 128/' config.json"), "expected");
    refused(model_with("tr -d '\\n ' < config.json | sed 's/\"full_attn_layers\":\\[4,6\\]/\"full_attn_layers\":[3,4,6]/' > c && mv c config.json"), "layer 3");
    refused(model_with("tr -d '\\n ' < config.json | sed 's/\"full_attn_layers\":\\[4,6\\]/\"full_attn_layers\":[4]/' > c && mv c config.json"), "layer 6");
    refused(model_with("echo '{\"metadata\":{},\"weight_map\":{\"lm_head.weight\":\"gone.safetensors\"}}' > model.safetensors.index.json && rm model.safetensors"),
            "gone.safetensors");
}

static void prompts(void **state)
{
    (void)state;
    refused("generate " TINY " --prompt ''", "prompt");
    refused("generate " TINY " --prompt \"$(printf 'abc\\377')\"", "UTF-8");
    refused("tokenize tests/golden/tokenizer \"$(printf 'abc\\377')\"", "UTF-8");
    refused("generate " TINY " --prompt abcdefgh --context 4", "context of 4");
    refused("generate " TINY " --prompt a --cache-load " TINY "/config.json", "config.json");
}

static void a_kept_cache_continues_and_is_refused_by_another_model(void **state)
{
    (void)state;
    char arguments[512];
    snprintf(arguments, sizeof arguments, "generate " TINY " --prompt Hello -n 3 --cache-save '%s/cache'", scratch);
    accepted(arguments);
    snprintf(arguments, sizeof arguments, "generate " TINY " --prompt Hello -n 3 --cache-load '%s/cache'", scratch);
    accepted(arguments);
    snprintf(arguments, sizeof arguments, "generate tests/golden/models/d128 --prompt Hello -n 3 --cache-load '%s/cache'", scratch);
    refused(arguments, "cache");
    shell_result *r = shell("head -c 20000 '%s/cache' > '%s/cut'", scratch, scratch);
    assert_int_equal(r->status, 0);
    free(r);
    snprintf(arguments, sizeof arguments, "generate " TINY " --prompt Hello -n 3 --cache-load '%s/cut'", scratch);
    refused(arguments, "cut");
}

/* No more than 4 KiB can be written: as on a full disk, write() fails halfway. */
static void a_full_disk_leaves_nothing_behind(void **state)
{
    (void)state;
    shell_result *r = shell("trap '' XFSZ; ulimit -f 8; %s/kl generate " TINY " --prompt Hello -n 3 --cache-save '%s/full' >/dev/null", shell_build(), scratch);
    assert_int_equal(r->status, 1);
    assert_int_equal(shell_lines(r->text), 1);
    assert_non_null(strstr(r->text, "full"));
    free(r);
    r = shell("ls '%s' | grep -c '^full'", scratch);
    assert_string_equal(r->text, "0\n");
    free(r);
}

/* Every line of the output is a JSON object; the first one is returned (cJSON_Delete it). */
static cJSON *json_of(const char *arguments)
{
    shell_result *r = shell("%s/kl %s 2>/dev/null", shell_build(), arguments);
    assert_int_equal(r->status, 0);
    cJSON *first = NULL;
    for (char *line = strtok(r->text, "\n"); line; line = strtok(NULL, "\n")) {
        cJSON *o = cJSON_Parse(line);
        if (!cJSON_IsObject(o))
            fail_msg("kl %s: not JSON: %s", arguments, line);
        if (first)
            cJSON_Delete(o);
        else
            first = o;
    }
    assert_non_null(first);
    free(r);
    return first;
}

static double number(const cJSON *o, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(o, key);
    if (!cJSON_IsNumber(item))
        fail_msg("'%s' is no number", key);
    return item->valuedouble;
}

static void json_is_json(void **state)
{
    (void)state;
    cJSON *o = json_of("info --preset 48b --json --context 1M");
    assert_true(number(o, "parameters") == 49122681728.0);
    const cJSON *row = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(o, "cache"), 0);
    assert_true(number(row, "latent_bytes") == 1048576.0 * 1152 * 7);
    assert_true(number(row, "kda_state_bytes") == 40.0 * 1048576);
    cJSON_Delete(o);
    o = json_of("verify kda " KDA_FILE " --json");
    assert_true(number(o, "err") <= number(o, "err_limit"));
    assert_true(cJSON_IsString(cJSON_GetObjectItemCaseSensitive(o, "commit")));
    cJSON_Delete(o);
    o = json_of("generate " TINY " --prompt Hello -n 4 --json");
    assert_true(number(o, "new_tokens") >= 1 && number(o, "cache_bytes") > 0);
    cJSON_Delete(o);
    o = json_of("tokenize tests/golden/tokenizer a --json");
    assert_true(number(o, "count") == 1);
    cJSON_Delete(o);
}

static void help_and_version(void **state)
{
    (void)state;
    accepted("--help");
    accepted("--version");
    static const char *const commands[] = {"info", "verify", "bench", "generate", "train", "tokenize"};
    shell_result *list = shell("%s/kl --help", shell_build());
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        shell_result *r = shell("%s/kl %s --help", shell_build(), commands[i]);
        assert_int_equal(r->status, 0);
        assert_non_null(strstr(r->text, "--json"));
        assert_non_null(strstr(list->text, commands[i]));
        free(r);
    }
    free(list);
}

static void ids_and_text_go_back_and_forth(void **state)
{
    (void)state;
    shell_result *r = shell("%s/kl tokenize tests/golden/tokenizer 'Anne was tenderness itself.' | %s/kl tokenize tests/golden/tokenizer --decode", shell_build(), shell_build());
    assert_int_equal(r->status, 0);
    assert_string_equal(r->text, "Anne was tenderness itself.");
    free(r);
    r = shell("%s/kl tokenize tests/golden/tokenizer --chat --count 'Tell me about the french revolution.'", shell_build());
    assert_string_equal(r->text, "23\n");
    free(r);
}

static void the_same_seed_says_the_same(void **state)
{
    (void)state;
    const char *format = "%s/kl generate " TINY " --prompt Hello -n 12 --temperature 1 --seed %d --threads %d 2>/dev/null | od -c";
    shell_result *a = shell(format, shell_build(), 5, 1), *b = shell(format, shell_build(), 5, 2), *c = shell(format, shell_build(), 6, 1);
    assert_string_equal(a->text, b->text);
    assert_string_not_equal(a->text, c->text);
    free(a);
    free(b);
    free(c);
}

static void training_runs_and_its_checkpoint_speaks(void **state)
{
    (void)state;
    char arguments[512];
    snprintf(arguments, sizeof arguments,
             "train --preset tiny --data experiments/checkpoint/text/sample.txt --out '%s/t' --steps 2 --batch 1 --context 16 --warmup 1 --quiet", scratch);
    accepted(arguments);
    snprintf(arguments, sizeof arguments, "generate '%s/t' --prompt Hello -n 4", scratch);
    accepted(arguments);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(commands_and_options),
        cmocka_unit_test(shapes_and_regimes),
        cmocka_unit_test(files_that_are_not_there_or_not_whole),
        cmocka_unit_test(prompts),
        cmocka_unit_test(a_kept_cache_continues_and_is_refused_by_another_model),
        cmocka_unit_test(a_full_disk_leaves_nothing_behind),
        cmocka_unit_test(json_is_json),
        cmocka_unit_test(help_and_version),
        cmocka_unit_test(ids_and_text_go_back_and_forth),
        cmocka_unit_test(the_same_seed_says_the_same),
        cmocka_unit_test(training_runs_and_its_checkpoint_speaks),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
