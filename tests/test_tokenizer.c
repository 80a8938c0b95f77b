/* The tokenizer: the golden cases, its file formats and what they refuse, long inputs, learning a vocabulary. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "harness/file.h"
#include "harness/tokenizer.h"
#include "tests/expect.h"
#include "tests/golden.h"
#include "tests/scratch.h"

static const char folder[] = "tests/golden/tokenizer";

static kl_tokenizer *open_golden(void)
{
    kl_tokenizer *t;
    assert_ok(kl_tokenizer_open(&t, folder));
    return t;
}

static void check_ids(const kl_tokenizer *t, const char *text, const cJSON *expected, bool specials)
{
    int32_t *ids;
    int64_t count, i = 0;
    assert_ok(kl_tokenizer_encode(t, text, strlen(text), specials, &ids, &count));
    if (count != cJSON_GetArraySize(expected))
        fail_msg("'%s': expected %d ids, got %lld", text, cJSON_GetArraySize(expected), (long long)count);
    for (const cJSON *item = expected->child; item; item = item->next, i++)
        if (ids[i] != item->valueint)
            fail_msg("'%s': id %lld: expected %d, got %d", text, (long long)i, item->valueint, ids[i]);
    char *back;
    size_t length;
    assert_ok(kl_tokenizer_decode(t, ids, count, &back, &length));
    assert_int_equal(length, strlen(text));
    assert_memory_equal(back, text, length);
    free(back);
    free(ids);
}

static void golden_cases(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    cJSON *json = golden_json("tests/golden/tokenizer/expected.json");
    const cJSON *item, *special = cJSON_GetObjectItem(json, "special_tokens");
    int n = 0;
    assert_int_equal(kl_tokenizer_size(t), cJSON_GetObjectItem(json, "n_ranks")->valueint + cJSON_GetArraySize(special));
    cJSON_ArrayForEach(item, special) assert_int_equal(kl_tokenizer_special(t, item->string), item->valueint);
    cJSON_ArrayForEach(item, cJSON_GetObjectItem(json, "cases"))
    {
        const char *text = cJSON_GetObjectItem(item, "text")->valuestring;
        if (strlen(text) == 0 && cJSON_GetArraySize(cJSON_GetObjectItem(item, "ids")) > 0)
            continue; /* begins with NUL, which cJSON ends strings at; nul_bytes covers it */
        check_ids(t, text, cJSON_GetObjectItem(item, "ids"), false);
        check_ids(t, text, cJSON_GetObjectItem(item, "ids_special"), true);
        n++;
    }
    assert_true(n >= 91);
    cJSON_Delete(json);
    kl_tokenizer_close(t);
}

static void golden_chat(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    cJSON *json = golden_json("tests/golden/tokenizer/expected.json");
    const cJSON *chat = cJSON_GetObjectItem(json, "chat");
    kl_message m = {"user", "Tell me about the french revolution."};
    char *text;
    assert_ok(kl_chat_render(&m, 1, true, &text));
    assert_string_equal(text, cJSON_GetObjectItem(chat, "text")->valuestring);
    check_ids(t, text, cJSON_GetObjectItem(chat, "ids"), true);
    free(text);
    cJSON_Delete(json);
    kl_tokenizer_close(t);
}

static void chat_turns(void **state)
{
    (void)state;
    kl_message m[] = {{"system", "Be brief."}, {"user", "Hi"}, {"assistant", "Hello"}, {"tool", "x"}};
    char *text;
    assert_ok(kl_chat_render(m, 3, false, &text));
    assert_string_equal(text, "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|>"
                              "<|im_assistant|>assistant<|im_middle|>Hello<|im_end|>");
    free(text);
    expect_error(kl_chat_render(m, 4, false, &text), KL_EINVAL, "messages[3].role");
}

static void nul_bytes(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    static const int32_t expected[] = {0, 1, 127, 428, 116, 333, 108};
    int32_t *ids;
    int64_t count;
    assert_ok(kl_tokenizer_encode(t, "\0\1\177 control", 11, false, &ids, &count));
    assert_int_equal(count, 7);
    assert_memory_equal(ids, expected, sizeof expected);
    free(ids);
    kl_tokenizer_close(t);
}

static void specials_in_both_modes(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    int32_t *ids;
    int64_t count;
    assert_ok(kl_tokenizer_encode(t, "[BOS]<|im_end|>[BO", 18, true, &ids, &count));
    assert_true(count > 2);
    assert_int_equal(ids[0], kl_tokenizer_special(t, "[BOS]"));
    assert_int_equal(ids[1], kl_tokenizer_special(t, "<|im_end|>"));
    for (int64_t i = 2; i < count; i++)
        assert_false(kl_tokenizer_is_special(t, ids[i]));
    free(ids);
    assert_ok(kl_tokenizer_encode(t, "[BOS]", 5, false, &ids, &count));
    for (int64_t i = 0; i < count; i++)
        assert_false(kl_tokenizer_is_special(t, ids[i]));
    free(ids);
    assert_int_equal(kl_tokenizer_special(t, "<|nobody|>"), -1);
    kl_tokenizer_close(t);
}

static void pieces_and_their_range(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    size_t length;
    assert_non_null(kl_tokenizer_piece(t, 'a', &length));
    assert_int_equal(length, 1);
    assert_null(kl_tokenizer_piece(t, -1, &length));
    assert_null(kl_tokenizer_piece(t, kl_tokenizer_size(t), &length));
    int32_t bad[] = {5, 1 << 20};
    char *text;
    expect_error(kl_tokenizer_decode(t, bad, 2, &text, &length), KL_EINVAL, "ids[1]");
    assert_null(text);
    kl_tokenizer_close(t);
}

static void invalid_utf8_names_the_offset(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        const char *where;
    } cases[] = {{"abc\xff", "byte 3"},        {"\x80", "byte 0"},         {"ab\xc3", "byte 2"},        {"\xc0\xaf", "byte 0"},
                 {"x\xed\xa0\x80", "byte 1"},  {"\xf4\x90\x80\x80", "byte 0"}, {"\xe0\x80\xaf", "byte 0"}, {"ok \xf0\x9f\x98", "byte 3"},
                 {"\xe4\xbd\xa0\xe4\xbd", "byte 3"}};
    kl_tokenizer *t = open_golden();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t *ids;
        int64_t count;
        expect_error(kl_tokenizer_encode(t, cases[i].text, strlen(cases[i].text), false, &ids, &count), KL_EFORMAT, cases[i].where);
        assert_null(ids);
    }
    kl_tokenizer_close(t);
}

/* Merging by its definition: the leftmost pair of lowest rank, one at a time. */
static int64_t merge_slowly(const kl_tokenizer *t, const char *piece, size_t length, size_t *ends)
{
    int64_t n = 0;
    for (size_t i = 0; i < length; i++)
        ends[n++] = i + 1;
    for (;;) {
        int64_t best = -1, rank = INT64_MAX;
        for (int64_t i = 0; i + 1 < n; i++) {
            size_t start = i ? ends[i - 1] : 0, bytes;
            for (int64_t id = 0; id < rank && !kl_tokenizer_is_special(t, id); id++) {
                const char *token = kl_tokenizer_piece(t, id, &bytes);
                if (bytes == ends[i + 1] - start && memcmp(token, piece + start, bytes) == 0) {
                    best = i;
                    rank = id;
                }
            }
        }
        if (best < 0)
            return n;
        memmove(ends + best, ends + best + 1, (size_t)(n - best - 1) * sizeof *ends);
        n--;
    }
}

static void merges_follow_the_definition(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    unsigned seed = 12345;
    print_message("seed %u\n", seed);
    for (int round = 0; round < 30; round++) {
        char text[40];
        size_t ends[40], at = 0;
        size_t length = 2 + (size_t)(rand_r(&seed) % 38);
        for (size_t i = 0; i < length; i++)
            text[i] = "etaoinsrhl"[rand_r(&seed) % 10];
        int32_t *ids;
        int64_t count, n = merge_slowly(t, text, length, ends);
        assert_ok(kl_tokenizer_encode(t, text, length, false, &ids, &count));
        assert_int_equal(count, n);
        for (int64_t i = 0; i < n; i++) {
            size_t bytes;
            kl_tokenizer_piece(t, ids[i], &bytes);
            at += bytes;
            assert_int_equal(at, ends[i]);
        }
        free(ids);
    }
    kl_tokenizer_close(t);
}

/* One piece of 200,000 letters would take minutes if merging were quadratic. */
static void long_runs_take_no_longer(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    static const char *const units[] = {"a", "A", " ", "\n", "\xe4\xbd\xa0", "aB", "!", "e\xcc\x81"};
    for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
        size_t unit = strlen(units[u]), n = 200000 / unit * unit;
        char *text = malloc(n);
        assert_non_null(text);
        for (size_t i = 0; i < n; i++)
            text[i] = units[u][i % unit];
        int32_t *ids;
        int64_t count;
        char *back;
        size_t length;
        assert_ok(kl_tokenizer_encode(t, text, n, false, &ids, &count));
        assert_ok(kl_tokenizer_decode(t, ids, count, &back, &length));
        assert_int_equal(length, n);
        assert_memory_equal(back, text, n);
        free(back);
        free(ids);
        free(text);
    }
    kl_tokenizer_close(t);
}

static int64_t count_of(const kl_tokenizer *t, const char *text, size_t length, int32_t **ids)
{
    int64_t count;
    assert_ok(kl_tokenizer_encode(t, text, length, false, ids, &count));
    return count;
}

/* Beyond 25,000 characters of one kind the text is cut, so ids of the whole are those of the parts. */
static void slices_are_cut_where_they_must(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    enum { RUN = 25000, N = 2 * RUN + 7 };
    char *text = malloc(N);
    assert_non_null(text);
    memset(text, 'h', N);
    int32_t *whole, *part;
    int64_t n = count_of(t, text, N, &whole), at = 0;
    for (size_t start = 0; start < N; start += RUN) {
        int64_t m = count_of(t, text + start, N - start < RUN ? N - start : RUN, &part);
        assert_memory_equal(whole + at, part, (size_t)m * sizeof *part);
        at += m;
        free(part);
    }
    assert_int_equal(at, n);
    free(whole);
    free(text);
    kl_tokenizer_close(t);
}

/* 400,000 characters end a slice even inside a word, counted in characters, not in bytes. */
static void blocks_count_characters(void **state)
{
    (void)state;
    kl_tokenizer *t = open_golden();
    enum { BLOCK = 400000 };
    char *text = malloc(3 * BLOCK + 64);
    assert_non_null(text);
    size_t length = 0;
    for (int i = 0; i < BLOCK - 2; i++) /* every other character takes two bytes */
        length += (size_t)sprintf(text + length, "%s", i % 2 ? " " : "\xc3\xa9");
    size_t cut = length + 2;
    length += (size_t)sprintf(text + length, "revolution");
    int32_t *whole, *first, *second;
    int64_t n = count_of(t, text, length, &whole), a = count_of(t, text, cut, &first), b = count_of(t, text + cut, length - cut, &second);
    assert_int_equal(n, a + b);
    assert_memory_equal(whole, first, (size_t)a * sizeof *whole);
    assert_memory_equal(whole + a, second, (size_t)b * sizeof *whole);
    free(whole);
    free(first);
    free(second);
    free(text);
    kl_tokenizer_close(t);
}

static void byte_fallback(void **state)
{
    (void)state;
    kl_tokenizer *t;
    assert_ok(kl_tokenizer_open(&t, "tests"));
    const char text[] = "na\xc3\xafve \xf0\x9f\x98\x80\n<|im_end|>";
    int32_t *ids;
    int64_t count;
    assert_ok(kl_tokenizer_encode(t, text, strlen(text), true, &ids, &count));
    assert_int_equal(count, strlen(text) - 10 + 1);
    for (int64_t i = 0; i + 1 < count; i++)
        assert_int_equal(ids[i], (unsigned char)text[i]);
    assert_int_equal(ids[count - 1], kl_tokenizer_special(t, "<|im_end|>"));
    assert_true(ids[count - 1] >= 256);
    free(ids);
    kl_tokenizer_close(t);
    expect_error(kl_tokenizer_open(&t, "tests/no such folder"), KL_EIO, "no such folder");
    expect_error(kl_tokenizer_open(&t, "Makefile"), KL_EINVAL, "directory");
}

/* ---- the file ---- */

static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* The 256 bytes as ranks 0..255, then what comes in `more`. */
static char *byte_model(const char *more)
{
    char *text = malloc(256 * 16 + strlen(more) + 1);
    assert_non_null(text);
    size_t at = 0;
    for (int b = 0; b < 256; b++)
        at += (size_t)sprintf(text + at, "%c%c== %d\n", digits[b >> 2], digits[(b & 3) << 4], b);
    strcpy(text + at, more);
    return text;
}

static void expect_refused(const char *more, const char *part)
{
    char *text = byte_model(more);
    kl_tokenizer *t;
    expect_error(kl_tokenizer_open_memory(&t, text, strlen(text)), KL_EFORMAT, part);
    assert_null(t);
    free(text);
}

static void bad_models_are_refused(void **state)
{
    (void)state;
    kl_tokenizer *t;
    char *text = byte_model("aGU= 256\n");
    assert_ok(kl_tokenizer_open_memory(&t, text, strlen(text)));
    kl_tokenizer_close(t);
    expect_error(kl_tokenizer_open_memory(&t, text, strlen(text) / 2), KL_EFORMAT, "ranks"); /* truncated */
    memcpy(text, "AQ== 0\n", 7);
    expect_error(kl_tokenizer_open_memory(&t, text, strlen(text)), KL_EFORMAT, "same bytes"); /* 0x01 twice */
    free(text);
    expect_refused("aGU= 257\n", "rank 257");
    expect_refused("aGU= 255\n", "twice");
    expect_refused("AA== 256\n", "same bytes");
    expect_refused("aGU=\n", "line 257");
    expect_refused("aGU= -1\n", "line 257");
    expect_refused("aGU= 256x\n", "line 257");
    expect_refused("aGU= 99999999999999999999\n", "line 257");
    expect_refused("a%U= 256\n", "rank 256");
    expect_refused("aGU 256\n", "rank 256");
    expect_refused("==== 256\n", "rank 256");
    expect_refused("aGV= 256\n", "rank 256"); /* unused bits set */
    expect_error(kl_tokenizer_open_memory(&t, "", 0), KL_EFORMAT, "got 0");
    text = byte_model("");
    memcpy(text, "aGU= 0\n", 7);
    expect_error(kl_tokenizer_open_memory(&t, text, strlen(text)), KL_EFORMAT, "byte 0x00");
    free(text);
}

static void put_file(const char *name, const char *text)
{
    put_bytes(name, text, strlen(text));
}

static void added_tokens(void **state)
{
    (void)state;
    kl_tokenizer *t;
    char *model = byte_model("aGU= 256\n");
    put_file("tiktoken.model", model);
    free(model);
    put_file("tokenizer_config.json", "{\"added_tokens_decoder\": {\"257\": {\"content\": \"[BOS]\"}, \"260\": {\"content\": \"<x>\", \"special\": true}}}");
    assert_ok(kl_tokenizer_open(&t, scratch));
    assert_int_equal(kl_tokenizer_size(t), 261);
    assert_int_equal(kl_tokenizer_special(t, "<x>"), 260);
    assert_int_equal(kl_tokenizer_special(t, "<|reserved_token_258|>"), 258);
    assert_int_equal(kl_tokenizer_special(t, "<|im_end|>"), -1);
    kl_tokenizer_close(t);
    static const struct {
        const char *config, *part;
    } bad[] = {{"{\"added_tokens_decoder\": {\"256\": {\"content\": \"x\"}}}", "256"},
               {"{\"added_tokens_decoder\": {\"999999\": {\"content\": \"x\"}}}", "999999"},
               {"{\"added_tokens_decoder\": {\"-1\": {\"content\": \"x\"}}}", "-1"},
               {"{\"added_tokens_decoder\": {\"257\": {\"content\": \"\"}}}", "a name of 1"},
               {"{\"added_tokens_decoder\": {\"257\": 5}}", "content"},
               {"{\"added_tokens_decoder\": {\"257\": {\"content\": \"x\"}, \"258\": {\"content\": \"x\"}}}", "two ids"},
               {"{\"added_tokens_decoder\": []}", "object"},
               {"{\"added_tokens_decoder\": {", "JSON"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        put_file("tokenizer_config.json", bad[i].config);
        expect_error(kl_tokenizer_open(&t, scratch), KL_EFORMAT, bad[i].part);
        assert_null(t);
    }
}

static void specials_by_hand(void **state)
{
    (void)state;
    static const char *const names[] = {"<a>", "<b>", "<a>"};
    static const int64_t ids[] = {256, 258, 260}, low[] = {255}, twice[] = {256, 256}, high[] = {INT64_MAX};
    kl_tokenizer *t;
    assert_ok(kl_tokenizer_bytes(&t));
    assert_ok(kl_tokenizer_set_specials(t, names, ids, 2));
    assert_int_equal(kl_tokenizer_size(t), 259);
    assert_int_equal(kl_tokenizer_special(t, "<b>"), 258);
    assert_int_equal(kl_tokenizer_special(t, "[BOS]"), -1);
    expect_error(kl_tokenizer_set_specials(t, names, low, 1), KL_EFORMAT, "255");
    expect_error(kl_tokenizer_set_specials(t, names, high, 1), KL_EFORMAT, "special token id");
    expect_error(kl_tokenizer_set_specials(t, names, twice, 2), KL_EFORMAT, "stands twice");
    expect_error(kl_tokenizer_set_specials(t, names, ids, 3), KL_EFORMAT, "'<a>' has two ids");
    assert_int_equal(kl_tokenizer_special(t, "<a>"), 256); /* as before */
    assert_ok(kl_tokenizer_set_specials(t, names, ids, 0));
    assert_int_equal(kl_tokenizer_size(t), 256);
    kl_tokenizer_close(t);
}

static void released_specials_follow_the_released_ranks(void **state)
{
    (void)state;
    enum { RANKS = 163584 };
    char *text = byte_model("");
    size_t at = strlen(text);
    text = realloc(text, at + (size_t)RANKS * 20);
    assert_non_null(text);
    for (int i = 256; i < RANKS; i++) /* three bytes that no other rank has */
        at += (size_t)sprintf(text + at, "%c%c%c%c %d\n", digits[i >> 18 & 63], digits[i >> 12 & 63], digits[i >> 6 & 63], digits[i & 63], i);
    kl_tokenizer *t;
    assert_ok(kl_tokenizer_open_memory(&t, text, at));
    assert_int_equal(kl_tokenizer_size(t), 163840);
    static const struct {
        const char *name;
        int id;
    } known[] = {{"[BOS]", 163584}, {"[EOS]", 163585}, {"<|im_end|>", 163586}, {"<|im_user|>", 163587}, {"<|im_assistant|>", 163588},
                 {"<|reserved_token_163589|>", 163589}, {"<|start_header_id|>", 163590}, {"[EOT]", 163593}, {"<|im_system|>", 163594},
                 {"<|tool_call_end|>", 163599}, {"<|im_middle|>", 163601}, {"[UNK]", 163838}, {"[PAD]", 163839}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        assert_int_equal(kl_tokenizer_special(t, known[i].name), known[i].id);
    kl_tokenizer_close(t);
    free(text);
}

/* ---- learning ---- */

static void learns_by_hand(void **state)
{
    (void)state;
    char path[200];
    snprintf(path, sizeof path, "%s/learnt.model", scratch);
    /* pieces: low x5, lower x2, newest x6, widest x3, each after the first with its space. Of the pairs seen 9 times, e-s comes before s-t;
     * then es-t; then of those seen 7 times l-o before o-w and before space-l (6: the first has none) */
    const char text[] = "low low low low low lower lower newest newest newest newest newest newest widest widest widest";
    assert_ok(kl_tokenizer_train(text, strlen(text), 259, path));
    char *model;
    size_t size;
    assert_ok(kl_file_read(path, 1 << 20, &model, &size));
    assert_non_null(strstr(model, "\nZXM= 256\nZXN0 257\nbG8= 258\n"));
    free(model);
}

static void learnt_vocabularies_work(void **state)
{
    (void)state;
    char path[200], config[200], *text, *back;
    size_t size, length;
    assert_ok(kl_file_read("LICENSE", 1 << 22, &text, &size));
    snprintf(path, sizeof path, "%s/tiktoken.model", scratch);
    snprintf(config, sizeof config, "%s/tokenizer_config.json", scratch);
    unlink(config);
    assert_ok(kl_tokenizer_train(text, size, 300, path));
    kl_tokenizer *t;
    assert_ok(kl_tokenizer_open(&t, scratch));
    assert_int_equal(kl_tokenizer_size(t), 309);
    int32_t *ids;
    int64_t count;
    assert_ok(kl_tokenizer_encode(t, text, size, false, &ids, &count));
    assert_true(count < (int64_t)size);
    assert_ok(kl_tokenizer_decode(t, ids, count, &back, &length));
    assert_int_equal(length, size);
    assert_memory_equal(back, text, size);
    free(ids);
    free(back);
    free(text);
    kl_tokenizer_close(t);
}

static void learning_refuses(void **state)
{
    (void)state;
    char path[200];
    snprintf(path, sizeof path, "%s/never.model", scratch);
    expect_error(kl_tokenizer_train("abab", 4, 300, path), KL_EINVAL, "300");
    expect_error(kl_tokenizer_train("abab", 4, 255, path), KL_EINVAL, "255");
    expect_error(kl_tokenizer_train("ab\xff", 3, 256, path), KL_EFORMAT, "byte 2");
    assert_int_not_equal(access(path, F_OK), 0);
    expect_error(kl_tokenizer_train("abab", 4, 256, "/no/such/folder/x"), KL_EIO, "/no/such/folder");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_cases),
        cmocka_unit_test(golden_chat),
        cmocka_unit_test(chat_turns),
        cmocka_unit_test(nul_bytes),
        cmocka_unit_test(specials_in_both_modes),
        cmocka_unit_test(pieces_and_their_range),
        cmocka_unit_test(invalid_utf8_names_the_offset),
        cmocka_unit_test(merges_follow_the_definition),
        cmocka_unit_test(long_runs_take_no_longer),
        cmocka_unit_test(slices_are_cut_where_they_must),
        cmocka_unit_test(blocks_count_characters),
        cmocka_unit_test(byte_fallback),
        cmocka_unit_test(bad_models_are_refused),
        cmocka_unit_test(added_tokens),
        cmocka_unit_test(specials_by_hand),
        cmocka_unit_test(released_specials_follow_the_released_ranks),
        cmocka_unit_test(learns_by_hand),
        cmocka_unit_test(learnt_vocabularies_work),
        cmocka_unit_test(learning_refuses),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, make_scratch, remove_scratch);
}
