/* Streamed text: characters cut between tokens come out whole, bytes that are none come out as U+FFFD. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "harness/stream.h"
#include "tests/expect.h"

#define BAD "\xef\xbf\xbd"

/* The bytes, `piece` at a time; what came out. free() it. */
static char *streamed(const char *bytes, size_t size, size_t piece)
{
    kl_stream s = {0};
    for (size_t at = 0; at < size; at += piece)
        assert_ok(kl_stream_add(&s, bytes + at, size - at < piece ? size - at : piece));
    assert_ok(kl_stream_end(&s));
    return s.text;
}

static void characters_come_out_whole(void **state)
{
    (void)state;
    static const char text[] = "a\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x8e\xbbz";
    for (size_t piece = 1; piece <= sizeof text; piece++) {
        char *out = streamed(text, sizeof text - 1, piece);
        assert_string_equal(out, text);
        free(out);
    }
}

static void half_a_character_is_held_back(void **state)
{
    (void)state;
    kl_stream s = {0};
    assert_ok(kl_stream_add(&s, "x\xf0\x9f\x8e", 4));
    assert_string_equal(s.text, "x");
    assert_ok(kl_stream_add(&s, "\xbb", 1));
    assert_string_equal(s.text, "x\xf0\x9f\x8e\xbb");
    kl_stream_free(&s);
}

static void what_is_no_character_is_replaced(void **state)
{
    (void)state;
    static const struct { const char *in, *out; } cases[] = {
        {"a\xff" "b", "a" BAD "b"}, {"\x80", BAD}, {"a\xc3", "a" BAD}, {"\xc3" "b", BAD "b"}, {"\xe0\x80\x80", BAD BAD BAD},
        {"\xed\xa0\x80", BAD BAD BAD}, {"\xf5\x80\x80\x80", BAD BAD BAD BAD}, {"\xe4\xbd" "a", BAD BAD "a"}, {"", ""}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (size_t piece = 1; piece <= 4; piece++) {
            char *out = streamed(cases[i].in, strlen(cases[i].in), piece);
            assert_string_equal(out, cases[i].out);
            free(out);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(characters_come_out_whole),
        cmocka_unit_test(half_a_character_is_held_back),
        cmocka_unit_test(what_is_no_character_is_replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
