/* The benchmark: how shapes are read, what a row holds, and that a wrong answer is not reported as a time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <cjson/cJSON.h>
#include <math.h>

#include "harness/bench.h"
#include "tests/expect.h"
#include "tests/shell.h"

static void shapes_follow_one_another(void **state)
{
    (void)state;
    kl_shape list[KL_SHAPES], first = {.T = 4096, .H = 4, .K = 128};
    int count;
    assert_ok(kl_shapes_parse("kda", "T=8K,H=2;T=100;lengths=1+0+2K;G=0", &first, list, &count));
    assert_int_equal(count, 4);
    assert_int_equal(list[0].T, 8192);
    assert_int_equal(list[1].H, 2);
    assert_int_equal(list[1].K, 128);
    assert_int_equal(list[2].length_count, 3);
    assert_int_equal(list[2].lengths[2], 2048);
    assert_int_equal(list[3].G, -1);
    assert_ok(kl_shapes_parse("mla", "latent=bf16,weight=f16", &first, list, &count));
    assert_int_equal(list[0].latent, KL_BF16);
    assert_int_equal(list[0].weight, KL_F16);
    assert_true(kl_failed(kl_shapes_parse("mla", "latent=f16", &first, list, &count)));
    assert_true(kl_failed(kl_shapes_parse("moe", "H=2", &first, list, &count)));
    assert_true(kl_failed(kl_shapes_parse("kda", "T", &first, list, &count)));
    assert_true(kl_failed(kl_shapes_parse("kda", "", &first, list, &count)));
    assert_true(kl_failed(kl_shapes_parse("model", "K=3", &first, list, &count)));
}

static void a_wrong_answer_is_marked(void **state)
{
    (void)state;
    const double errors[] = {1e-9, 1.0, NAN};
    for (int i = 0; i < 3; i++) {
        kl_shape shape = {.T = 1};
        kl_bench b = {.quiet = true, .ceilings = {1.0, 1.0, 1.0}};
        assert_ok(kl_bench_emit(&b, &(kl_bench_row){.family = "kda", .variant = "x", .shape = &shape, .seconds = {1.0, 1.0, 1.0, 3}, .cost = {1.0, 1.0},
                                             .memory_gbps = 1.0, .memory_name = "copy", .err = errors[i], .err_limit = 1e-6}));
        assert_int_equal(b.wrong, i > 0);
        kl_lines_free(&b.lines);
    }
}

static const cJSON *has(const cJSON *row, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(row, key);
    if (!item)
        fail_msg("a row has no '%s'", key);
    return item;
}

/* Runs kl bench with rows to a file; the rows as an array (cJSON_Delete it). */
static cJSON *rows_of(const char *arguments)
{
    char scratch[128];
    make_folder(scratch, sizeof scratch);
    shell_result *r = shell("%s/kl bench %s --runs 2 --threads 1 --json '%s/rows' >'%s/table' && cat '%s/rows'", shell_build(), arguments, scratch, scratch, scratch);
    remove_folder(scratch);
    if (r->status != 0)
        fail_msg("kl bench %s: status %d, said:\n%s", arguments, r->status, r->text);
    cJSON *rows = cJSON_CreateArray();
    for (char *line = strtok(r->text, "\n"); line; line = strtok(NULL, "\n")) {
        cJSON *o = cJSON_Parse(line);
        if (!cJSON_IsObject(o))
            fail_msg("not JSON: %s", line);
        cJSON_AddItemToArray(rows, o);
    }
    free(r);
    return rows;
}

static void check_row(const cJSON *row)
{
    static const char *const numbers[] = {"call_us", "min_us", "max_us", "runs", "bytes", "flops", "gbps", "tflops", "ceiling_frac", "workspace_bytes", "peak_bytes", "threads"};
    static const char *const texts[] = {"family", "pass", "variant", "ceiling", "device", "driver", "toolkit", "commit", "date", "command"};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        assert_true(cJSON_IsNumber(has(row, numbers[i])) && has(row, numbers[i])->valuedouble >= 0.0);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        assert_true(cJSON_IsString(has(row, texts[i])) && *has(row, texts[i])->valuestring);
    assert_true(cJSON_IsBool(has(row, "dirty")));
    assert_true(has(row, "min_us")->valuedouble <= has(row, "call_us")->valuedouble);
    assert_true(has(row, "call_us")->valuedouble <= has(row, "max_us")->valuedouble);
    const cJSON *err = cJSON_GetObjectItemCaseSensitive(row, "err");
    assert_true(!err || err->valuedouble <= has(row, "err_limit")->valuedouble);
}

static bool holds(const cJSON *rows, const char *family, const char *pass, const char *variant)
{
    const cJSON *row;
    cJSON_ArrayForEach(row, rows)
        if (strcmp(has(row, "family")->valuestring, family) == 0 && strcmp(has(row, "pass")->valuestring, pass) == 0 &&
            strcmp(has(row, "variant")->valuestring, variant) == 0)
            return true;
    return false;
}

static void every_variant_has_a_row(void **state)
{
    (void)state;
    cJSON *rows = rows_of("kda --shapes 'T=70,H=2,K=16;lengths=20+0+30' --gate slow"), *row;
    cJSON_ArrayForEach(row, rows)
    {
        check_row(row);
        assert_string_equal(has(row, "gate")->valuestring, "slow");
    }
    assert_true(holds(rows, "kda", "fwd", "reference") && holds(rows, "kda", "fwd", "recurrent") && holds(rows, "kda", "fwd", "chunk"));
    assert_true(holds(rows, "kda", "bwd", "chunk") && holds(rows, "dplr", "fwd", "chunk"));
    assert_true(cJSON_IsArray(has(cJSON_GetArrayItem(rows, cJSON_GetArraySize(rows) - 1), "lengths")));
    cJSON_Delete(rows);
}

static void mla_and_moe_have_rows(void **state)
{
    (void)state;
    cJSON *rows = rows_of("mla --shapes T=40,H=2,R=32,Dn=16,Dr=8,Dv=16,latent=bf16 --pass fwd --pass bwd --pass decode"), *row;
    cJSON_ArrayForEach(row, rows) check_row(row);
    assert_true(holds(rows, "mla", "decode", "recurrent") && holds(rows, "mla", "fwd", "chunk") && holds(rows, "mla", "bwd", "chunk"));
    cJSON_Delete(rows);
    rows = rows_of("moe --shapes T=20,D=32,E=8,I=16,Is=16,top_k=2");
    cJSON_ArrayForEach(row, rows) check_row(row);
    assert_true(holds(rows, "moe", "fwd", "recurrent") && holds(rows, "moe", "fwd", "chunk") && holds(rows, "moe", "bwd", "chunk"));
    cJSON_Delete(rows);
}

static void a_model_has_rows(void **state)
{
    (void)state;
    cJSON *rows = rows_of("model --preset tiny --shapes T=24,new=4,B=2 --pass prefill --pass decode --pass fwdbwd"), *row;
    cJSON_ArrayForEach(row, rows) check_row(row);
    assert_int_equal(cJSON_GetArraySize(rows), 3);
    cJSON_Delete(rows);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes_follow_one_another),
        cmocka_unit_test(a_wrong_answer_is_marked),
        cmocka_unit_test(every_variant_has_a_row),
        cmocka_unit_test(mla_and_moe_have_rows),
        cmocka_unit_test(a_model_has_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
