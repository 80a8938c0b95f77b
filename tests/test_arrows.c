/* Keeps the include arrows of the design true: reads every source file's #include lines. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <ftw.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Which rooms a file may include from. The first rule whose prefix fits the file's path decides. */
typedef struct rule {
    const char *prefix;
    const char *rooms[8];
} rule;

static const rule rules[] = {
    {"reference/", {"reference/"}},
    {"common/", {"common/"}},
    {"kda/", {"kda/", "common/"}},
    {"mla/", {"mla/", "common/"}},
    {"moe/", {"moe/", "common/"}},
    {"harness/verify", {"harness/", "kda/", "mla/", "moe/", "common/", "reference/"}},
    {"harness/bench", {"harness/", "kda/", "mla/", "moe/", "common/", "reference/"}},
    {"harness/reference_variants", {"harness/", "kda/", "mla/", "moe/", "common/", "reference/"}},
    {"harness/", {"harness/", "kda/", "mla/", "moe/", "common/"}},
};
/* System headers that the reference may use: the C library and nothing else. */
static const char *const libc_headers[] = {"math.h", "stdint.h", "stdlib.h", "string.h", "stddef.h", "stdbool.h", "stdio.h", "float.h"};

static int files, violations;

static const rule *rule_for(const char *path)
{
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (strncmp(path, rules[i].prefix, strlen(rules[i].prefix)) == 0)
            return &rules[i];
    return NULL;
}

/* NULL when the file may include the header, otherwise why not. */
static const char *objection(const char *path, const char *header, bool system)
{
    const rule *r = rule_for(path);
    if (!r)
        return "belongs to no room";
    if (system) {
        if (strcmp(r->prefix, "reference/") != 0)
            return NULL;
        for (size_t i = 0; i < sizeof libc_headers / sizeof *libc_headers; i++)
            if (strcmp(header, libc_headers[i]) == 0)
                return NULL;
        return "reference/ may include the C library only";
    }
    if (strcmp(header, "build_info.h") == 0)
        return strcmp(path, "harness/report.c") == 0 ? NULL : "only harness/report.c knows the build";
    for (int i = 0; i < 8 && r->rooms[i]; i++)
        if (strncmp(header, r->rooms[i], strlen(r->rooms[i])) == 0)
            return NULL;
    return "points against the arrows";
}

/* The header named by an include line; false when the line is none. */
static bool included(const char *line, char *header, size_t size, bool *system)
{
    line += strspn(line, " \t");
    if (*line != '#')
        return false;
    line++;
    line += strspn(line, " \t");
    if (strncmp(line, "include", 7) != 0)
        return false;
    line += 7 + strspn(line + 7, " \t");
    if (*line != '"' && *line != '<')
        return false;
    *system = *line == '<';
    snprintf(header, size, "%.*s", (int)strcspn(line + 1, "\">\n"), line + 1);
    return true;
}

static int visit(const char *path, const struct stat *info, int kind, struct FTW *where)
{
    (void)info, (void)where;
    const char *dot = strrchr(path, '.');
    if (kind != FTW_F || !dot || (strcmp(dot, ".c") != 0 && strcmp(dot, ".h") != 0 && strcmp(dot, ".cu") != 0 && strcmp(dot, ".cuh") != 0))
        return 0;
    files++;
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    char line[1024], header[512];
    bool system;
    for (int number = 1; fgets(line, sizeof line, file); number++) {
        if (!included(line, header, sizeof header, &system))
            continue;
        const char *why = objection(path, header, system);
        if (why) {
            print_error("%s:%d: #include of %s: %s\n", path, number, header, why);
            violations++;
        }
    }
    fclose(file);
    return 0;
}

static void every_include_follows_the_arrows(void **state)
{
    (void)state;
    static const char *const rooms[] = {"reference", "common", "kda", "mla", "moe", "harness"};
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) {
        int before = files;
        assert_int_equal(nftw(rooms[i], visit, 16, FTW_PHYS), 0);
        assert_true(files > before);
    }
    assert_int_equal(violations, 0);
}

/* The rules themselves: what must be refused is refused. */
static void forbidden_includes_are_refused(void **state)
{
    (void)state;
    assert_non_null(objection("kda/cpu/chunk.c", "mla/mla.h", false));
    assert_non_null(objection("kda/cpu/chunk.c", "harness/model.h", false));
    assert_non_null(objection("moe/moe.h", "kda/kda.h", false));
    assert_non_null(objection("common/dtype.c", "kda/kda.h", false));
    assert_non_null(objection("reference/kda.c", "common/status.h", false));
    assert_non_null(objection("reference/kda.c", "omp.h", true));
    assert_non_null(objection("harness/model.c", "reference/kda.h", false));
    assert_non_null(objection("harness/model.c", "tests/golden.h", false));
    assert_non_null(objection("harness/cli.c", "build_info.h", false));
    assert_non_null(objection("kda/cpu/chunk.c", "chunk.h", false));
    assert_null(objection("harness/verify_model.c", "reference/model.h", false));
    assert_null(objection("harness/report.c", "build_info.h", false));
    assert_null(objection("kda/cpu/chunk.c", "common/simd.h", false));
    assert_null(objection("common/blas.c", "cblas.h", true));
    char header[64];
    bool system;
    assert_true(included("  #  include \"a/b.h\" // x\n", header, sizeof header, &system));
    assert_string_equal(header, "a/b.h");
    assert_false(system);
    assert_true(included("#include <math.h>\n", header, sizeof header, &system) && system);
    assert_false(included("#define include \"a.h\"\n", header, sizeof header, &system));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(forbidden_includes_are_refused),
        cmocka_unit_test(every_include_follows_the_arrows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
