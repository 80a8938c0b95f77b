/* make install into a fresh prefix; the example built against what it put there, and run; every header on its own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/shell.h"

static char prefix[128];

static const char *environment(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static const char *sanitizers(void)
{
    return strcmp(environment("SAN", "0"), "1") == 0 ? "-fsanitize=address,undefined" : "";
}

static int install(void **state)
{
    (void)state;
    make_folder(prefix, sizeof prefix);
    shell_result *r = shell("make --no-print-directory install PREFIX='%s' BUILD='%s' SAN=%s CC=%s", prefix, shell_build(), environment("SAN", "0"), environment("CC", "gcc"));
    if (r->status != 0)
        print_error("%s", r->text);
    int status = r->status;
    free(r);
    return status;
}

static int uninstall(void **state)
{
    (void)state;
    remove_folder(prefix);
    return 0;
}

static void the_library_and_its_links_are_there(void **state)
{
    (void)state;
    shell_result *r = shell("cd '%s' && test -f lib/libkl.a && test -x bin/kl && test -f lib/pkgconfig/kl.pc && test -L lib/libkl.so && "
                            "test -f \"$(readlink -f lib/libkl.so)\" && readlink lib/libkl.so.0 && ./bin/kl --version", prefix);
    assert_int_equal(r->status, 0);
    assert_non_null(strstr(r->text, "libkl.so.0."));
    free(r);
}

static void the_example_builds_through_pkg_config_and_runs(void **state)
{
    (void)state;
    shell_result *r = shell("set -e; export PKG_CONFIG_PATH='%s/lib/pkgconfig'; "
                            "%s -std=gnu11 -Wall -Wextra -Werror %s experiments/example/kda_example.c $(pkg-config --cflags --libs kl) -lm -o '%s/example'; "
                            "LD_LIBRARY_PATH='%s/lib' '%s/example'", prefix, environment("CC", "gcc"), sanitizers(), prefix, prefix, prefix);
    if (r->status != 0)
        print_error("%s", r->text);
    assert_int_equal(r->status, 0);
    assert_non_null(strstr(r->text, "largest difference"));
    free(r);
}

static void every_installed_header_stands_alone(void **state)
{
    (void)state;
    shell_result *r = shell("cd '%s/include/kl' && n=0 && for h in */*.h; do "
                            "echo \"#include <$h>\" | %s -std=gnu11 -Wall -Werror -fopenmp -fsyntax-only -I. -x c - || exit 1; n=$((n+1)); done; echo $n headers",
                            prefix, environment("CC", "gcc"));
    if (r->status != 0)
        print_error("%s", r->text);
    assert_int_equal(r->status, 0);
    assert_null(strstr(r->text, "\n0 headers"));
    free(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_library_and_its_links_are_there),
        cmocka_unit_test(the_example_builds_through_pkg_config_and_runs),
        cmocka_unit_test(every_installed_header_stands_alone),
    };
    return cmocka_run_group_tests(tests, install, uninstall);
}
