/* JSON from outside: cJSON behind limits, so that no file costs more than its size allows. */
#ifndef KL_HARNESS_JSON_H
#define KL_HARNESS_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cjson/cJSON.h>

#include "common/status.h"

enum { KL_JSON_DEPTH = 32, KL_JSON_VALUES = 1 << 22 };

/* One object, UTF-8, nothing but white space after it; at most KL_JSON_DEPTH deep and KL_JSON_VALUES values; no NUL
 * character, no key twice in one object. name is what the message calls the text. *root: cJSON_Delete it. */
kl_status kl_json_parse(cJSON **root, const char *text, size_t length, const char *name);

/* The member, or NULL where it is absent or null. */
const cJSON *kl_json_get(const cJSON *object, const char *key);
/* false unless item is a number with an integral value of magnitude at most 2^53. */
bool kl_json_integer(const cJSON *item, int64_t *value);
/* What came, in a few words, for messages: "12.5", "\"abc\"", "an array", "nothing". */
const char *kl_json_describe(const cJSON *item, char text[64]);

/* The length of the longest valid UTF-8 prefix: length itself when all of it is. Surrogates and overlong forms are invalid. */
size_t kl_utf8_valid(const char *text, size_t length);

#endif
