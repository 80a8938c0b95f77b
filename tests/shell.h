/* Running programs from tests: status and output of one shell command. Include after cmocka. */
#ifndef TESTS_SHELL_H
#define TESTS_SHELL_H

#include <sys/wait.h>

#include "tests/folder.h"

typedef struct shell_result {
    int status;        /* exit status; -1: ended by a signal */
    char text[1 << 16]; /* standard output and error together, cut at its size */
} shell_result;

/* The build folder that is being tested. */
static inline const char *shell_build(void)
{
    const char *build = getenv("BUILD");
    return build && *build ? build : "build";
}

static inline shell_result *shell(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* free() the result. */
static inline shell_result *shell(const char *format, ...)
{
    char command[8192];
    va_list args;
    va_start(args, format);
    assert_true(vsnprintf(command, sizeof command, format, args) < (int)sizeof command);
    va_end(args);
    shell_result *r = calloc(1, sizeof *r);
    assert_non_null(r);
    fflush(NULL);
    char whole[8300];
    snprintf(whole, sizeof whole, "{ %s\n} 2>&1", command);
    FILE *pipe = popen(whole, "r");
    assert_non_null(pipe);
    size_t used = 0, got;
    char rest[4096];
    while ((got = fread(r->text + used, 1, sizeof r->text - 1 - used, pipe)) > 0)
        used += got;
    while (fread(rest, 1, sizeof rest, pipe) > 0)
        continue;
    int status = pclose(pipe);
    r->status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return r;
}

static inline int shell_lines(const char *text)
{
    int lines = 0;
    for (; *text; text++)
        lines += *text == '\n';
    return lines;
}

#endif
