#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include <cjson/cJSON.h>

#include "harness/file.h"
#include "harness/json.h"
#include "harness/tokenizer.h"
#include "harness/verify.h"

/* How many ids differ, the shorter list counting as different where it ends. */
static int64_t differing(const int32_t *ids, int64_t count, const cJSON *want)
{
    int64_t n = cJSON_GetArraySize(want), wrong = n > count ? n - count : count - n, i = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, want) {
        if (i < count && !(cJSON_IsNumber(item) && item->valuedouble == (double)ids[i]))
            wrong++;
        i++;
    }
    return wrong;
}

/* JSON strings end at NUL in memory, so a NUL in the text is read as the private character U+F8FF, which the file must not hold. */
static kl_status hide_nul(char *json, size_t size)
{
    KL_REQUIRE(!strstr(json, "\xef\xa3\xbf") && !strcasestr(json, "\\uf8ff"), "expected text without the character U+F8FF");
    for (size_t i = 0; i + 6 <= size; i++) {
        if (json[i] != '\\')
            continue;
        if (memcmp(json + i, "\\u0000", 6) == 0)
            memcpy(json + i, "\\uf8ff", 6);
        i++;
    }
    return kl_ok();
}

/* The text with its NULs back; free() it. */
static char *show_nul(const char *text, size_t *length)
{
    size_t n = strlen(text), out = 0;
    char *bytes = malloc(n + 1);
    for (size_t i = 0; bytes && i < n; out++) {
        bool hidden = strncmp(text + i, "\xef\xa3\xbf", 3) == 0;
        bytes[out] = hidden ? '\0' : text[i];
        i += hidden ? 3 : 1;
    }
    *length = out;
    return bytes;
}

static void encode_row(kl_verifier *v, const kl_tokenizer *t, const char *name, const char *hidden, bool specials, const cJSON *want)
{
    size_t size;
    char *text = show_nul(hidden, &size);
    if (!text) {
        kl_verify_fact(v, name, "tokenizer", "text", false, "out of memory");
        return;
    }
    const char *how = specials ? "ids, specials known" : "ids, specials as text";
    int32_t *ids = NULL;
    int64_t count = 0;
    kl_status s = cJSON_IsArray(want) ? kl_tokenizer_encode(t, text, size, specials, &ids, &count) : kl_error(KL_EFORMAT, "expected a list of ids");
    if (kl_failed(s)) {
        kl_verify_fact(v, name, "tokenizer", how, false, s.message);
        free(text);
        return;
    }
    kl_verify_row(v, &(kl_check){name, "tokenizer", how, (double)differing(ids, count, want), 0.0, 0.0, NULL});
    char *back = NULL;
    size_t length = 0;
    s = kl_tokenizer_decode(t, ids, count, &back, &length);
    bool same = !kl_failed(s) && length == size && memcmp(back, text, length) == 0;
    kl_verify_fact(v, name, "tokenizer", specials ? "bytes back from specials" : "bytes back", same, kl_failed(s) ? s.message : NULL);
    free(back);
    free(ids);
    free(text);
}

/* The golden vocabulary has its own special tokens, listed beside the cases. */
static kl_status take_specials(kl_verifier *v, kl_tokenizer *t, const cJSON *specials)
{
    int n = cJSON_GetArraySize(specials), i = 0;
    if (!cJSON_IsObject(specials) || n == 0)
        return kl_error(KL_EFORMAT, "special_tokens: expected an object of names and ids");
    const char **names = calloc((size_t)n, sizeof *names);
    int64_t *ids = calloc((size_t)n, sizeof *ids);
    kl_status s = names && ids ? kl_ok() : kl_error(KL_ENOMEM, "out of memory");
    const cJSON *item;
    cJSON_ArrayForEach(item, specials) {
        if (kl_failed(s))
            break;
        names[i] = item->string;
        if (!kl_json_integer(item, &ids[i++]))
            s = kl_error(KL_EFORMAT, "special_tokens: %s: expected a whole number", item->string);
    }
    if (!kl_failed(s))
        s = kl_tokenizer_set_specials(t, names, ids, n);
    for (i = 0; !kl_failed(s) && i < n; i++)
        kl_verify_fact(v, names[i], "tokenizer", "special id", kl_tokenizer_special(t, names[i]) == ids[i] && kl_tokenizer_is_special(t, ids[i]), NULL);
    free(names);
    free(ids);
    return s;
}

static kl_status verify_cases(kl_verifier *v, kl_tokenizer *t, const cJSON *root)
{
    const cJSON *cases = kl_json_get(root, "cases"), *chat = kl_json_get(root, "chat"), *item;
    KL_TRY(take_specials(v, t, kl_json_get(root, "special_tokens")));
    if (!cJSON_IsArray(cases))
        return kl_error(KL_EFORMAT, "cases: expected a list");
    int i = 0;
    cJSON_ArrayForEach(item, cases) {
        const cJSON *text = kl_json_get(item, "text");
        char name[32];
        snprintf(name, sizeof name, "case %d", i++);
        if (!cJSON_IsString(text))
            return kl_error(KL_EFORMAT, "%s: text: expected a string", name);
        encode_row(v, t, name, text->valuestring, false, kl_json_get(item, "ids"));
        encode_row(v, t, name, text->valuestring, true, kl_json_get(item, "ids_special"));
    }
    if (chat && cJSON_IsString(kl_json_get(chat, "text")))
        encode_row(v, t, "chat", kl_json_get(chat, "text")->valuestring, true, kl_json_get(chat, "ids"));
    return kl_ok();
}

/* The released template on the one user turn that the golden chat holds. */
static void verify_template(kl_verifier *v, const cJSON *root)
{
    static const char before[] = "<|im_user|>user<|im_middle|>", after[] = "<|im_end|><|im_assistant|>assistant<|im_middle|>";
    const cJSON *chat = kl_json_get(root, "chat"), *text = chat ? kl_json_get(chat, "text") : NULL;
    if (!cJSON_IsString(text) || strncmp(text->valuestring, before, strlen(before)) != 0)
        return;
    size_t length = strlen(text->valuestring), edges = strlen(before) + strlen(after);
    if (length < edges)
        return;
    char *content = strndup(text->valuestring + strlen(before), length - edges), *rendered = NULL;
    kl_status s = content ? kl_chat_render(&(kl_message){"user", content}, 1, true, &rendered) : kl_error(KL_ENOMEM, "out of memory");
    kl_verify_fact(v, "chat", "tokenizer", "template", !kl_failed(s) && strcmp(rendered, text->valuestring) == 0, kl_failed(s) ? s.message : NULL);
    free(rendered);
    free(content);
}

kl_status kl_verify_tokenizer(kl_verifier *v, const char *dir)
{
    char path[4096], *bytes;
    size_t size;
    cJSON *root;
    kl_tokenizer *t;
    KL_REQUIRE(snprintf(path, sizeof path, "%s/expected.json", dir) < (int)sizeof path, "%s: path too long", dir);
    KL_TRY(kl_file_read(path, (size_t)64 << 20, &bytes, &size));
    kl_status s = kl_error_in(hide_nul(bytes, size), "%s", path);
    if (!kl_failed(s))
        s = kl_json_parse(&root, bytes, size, path);
    free(bytes);
    KL_TRY(s);
    char model[4096];
    snprintf(model, sizeof model, "%.4000s/tiktoken.model", dir);
    s = kl_file_read(model, (size_t)64 << 20, &bytes, &size);
    if (!kl_failed(s)) {
        free(bytes);
        s = kl_tokenizer_open(&t, dir);
    }
    if (!kl_failed(s)) {
        s = kl_error_in(verify_cases(v, t, root), "%s", path);
        verify_template(v, root);
        kl_tokenizer_close(t);
    }
    cJSON_Delete(root);
    return s;
}
