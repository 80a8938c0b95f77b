#include "harness/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bytes of the character at p, 0 where it is not valid UTF-8. */
static size_t utf8_character(const unsigned char *p, size_t left)
{
    if (p[0] < 0x80)
        return 1;
    size_t n = p[0] >= 0xc2 && p[0] <= 0xdf ? 2 : (p[0] & 0xf0) == 0xe0 ? 3 : p[0] >= 0xf0 && p[0] <= 0xf4 ? 4 : 0;
    if (n == 0 || n > left)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    bool overlong = (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xf0 && p[1] < 0x90);
    bool beyond = (p[0] == 0xed && p[1] >= 0xa0) || (p[0] == 0xf4 && p[1] >= 0x90);
    return overlong || beyond ? 0 : n;
}

size_t kl_utf8_valid(const char *text, size_t length)
{
    size_t i = 0;
    while (i < length) {
        size_t n = utf8_character((const unsigned char *)text + i, length - i);
        if (n == 0)
            return i;
        i += n;
    }
    return length;
}

/* What cJSON does not limit: depth, number of values, NUL characters, which it would take for a string's end. */
static kl_status check_limits(const char *text, size_t length, const char *name)
{
    size_t valid = kl_utf8_valid(text, length);
    if (valid != length)
        return kl_error(KL_EFORMAT, "%s: expected UTF-8, byte %zu is not", name, valid);
    int depth = 0;
    int64_t values = 0;
    bool string = false;
    for (size_t i = 0; i < length; i++) {
        char c = text[i];
        if ((unsigned char)c < 0x20 && (string || !(c == ' ' || c == '\t' || c == '\n' || c == '\r')))
            return kl_error(KL_EFORMAT, "%s: not JSON: control character at byte %zu", name, i);
        if (string) {
            if (c == '\\' && length - i > 5 && memcmp(text + i + 1, "u0000", 5) == 0)
                return kl_error(KL_EFORMAT, "%s: NUL character in the string at byte %zu", name, i);
            i += c == '\\';
            string = c != '"';
            continue;
        }
        string = c == '"';
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        values += c == '{' || c == '[' || c == ',' || c == ':';
        if (depth > KL_JSON_DEPTH)
            return kl_error(KL_EFORMAT, "%s: JSON nested deeper than %d at byte %zu", name, KL_JSON_DEPTH, i);
        if (values > KL_JSON_VALUES)
            return kl_error(KL_EFORMAT, "%s: more than %d JSON values", name, KL_JSON_VALUES);
    }
    return kl_ok();
}

static int compare_keys(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static kl_status check_unique_here(const cJSON *object, const char *name)
{
    size_t n = 0;
    for (const cJSON *item = object->child; item; item = item->next)
        n++;
    if (n < 2)
        return kl_ok();
    const char **keys = malloc(n * sizeof *keys);
    if (!keys)
        return kl_error(KL_ENOMEM, "%s: no memory for %zu keys", name, n);
    n = 0;
    for (const cJSON *item = object->child; item; item = item->next)
        keys[n++] = item->string;
    qsort(keys, n, sizeof *keys, compare_keys);
    kl_status s = kl_ok();
    for (size_t i = 1; i < n && !kl_failed(s); i++)
        if (strcmp(keys[i - 1], keys[i]) == 0)
            s = kl_error(KL_EFORMAT, "%s: key '%.100s' stands twice", name, keys[i]);
    free(keys);
    return s;
}

static kl_status check_unique(const cJSON *item, const char *name)
{
    if (cJSON_IsObject(item))
        KL_TRY(check_unique_here(item, name));
    for (const cJSON *child = item->child; child; child = child->next)
        if (child->child)
            KL_TRY(check_unique(child, name));
    return kl_ok();
}

kl_status kl_json_parse(cJSON **root, const char *text, size_t length, const char *name)
{
    *root = NULL;
    KL_TRY(check_limits(text, length, name));
    const char *end = text;
    cJSON *json = length ? cJSON_ParseWithLengthOpts(text, length, &end, 0) : NULL;
    if (!json)
        return kl_error(KL_EFORMAT, "%s: not JSON: stopped at byte %zu of %zu", name, end ? (size_t)(end - text) : 0, length);
    size_t used = (size_t)(end - text);
    while (used < length && strchr(" \t\r\n", text[used]))
        used++;
    kl_status s = kl_ok();
    if (used != length)
        s = kl_error(KL_EFORMAT, "%s: not JSON: more text after the value, at byte %zu", name, used);
    else if (!cJSON_IsObject(json))
        s = kl_error(KL_EFORMAT, "%s: expected a JSON object", name);
    else
        s = check_unique(json, name);
    if (kl_failed(s))
        cJSON_Delete(json);
    else
        *root = json;
    return s;
}

const cJSON *kl_json_get(const cJSON *object, const char *key)
{
    const cJSON *item = object ? cJSON_GetObjectItemCaseSensitive(object, key) : NULL;
    return cJSON_IsNull(item) ? NULL : item;
}

bool kl_json_integer(const cJSON *item, int64_t *value)
{
    if (!cJSON_IsNumber(item) || !(fabs(item->valuedouble) <= 9007199254740992.0))
        return false;
    *value = (int64_t)item->valuedouble;
    return (double)*value == item->valuedouble;
}

const char *kl_json_describe(const cJSON *item, char text[64])
{
    if (!item)
        return "nothing";
    if (cJSON_IsNumber(item))
        snprintf(text, 64, "%.17g", item->valuedouble);
    else if (cJSON_IsString(item))
        snprintf(text, 64, "\"%.40s\"", item->valuestring);
    else
        return cJSON_IsArray(item) ? "an array" : cJSON_IsObject(item) ? "an object" : cJSON_IsNull(item) ? "null" : cJSON_IsTrue(item) ? "true" : "false";
    return text;
}
