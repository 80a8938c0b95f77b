/* Assertions about kl_status; include after cmocka.h. */
#ifndef TESTS_EXPECT_H
#define TESTS_EXPECT_H

#include <string.h>

#include "common/status.h"

#define assert_ok(status)                                  \
    do {                                                   \
        kl_status ok_ = (status);                          \
        if (kl_failed(ok_))                                \
            fail_msg("expected success: %s", ok_.message); \
    } while (0)

/* A failure of that kind, in one line that says `part`. */
static inline void expect_error(kl_status s, kl_code code, const char *part)
{
    if (s.code != code || !strstr(s.message, part) || strchr(s.message, '\n'))
        fail_msg("expected %s with '%s', got %s: %s", kl_code_name(code), part, kl_code_name(s.code), s.message);
}

/* A failure of any kind that says `part`. */
static inline void expect_refusal(kl_status s, const char *part)
{
    if (!kl_failed(s) || !strstr(s.message, part))
        fail_msg("expected a refusal naming \"%s\", got \"%s\"", part, s.message);
}

#endif
