/* kl: the program. Finds the subcommand, and turns its status into one line and an exit status. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/gpu.h"
#include "harness/cli.h"
#include "harness/report.h"

static const cli_command commands[] = {
    {"info", "a model's configuration, parameters and cache sizes", cli_info},
    {"verify", "every kernel, model and tokenizer against golden data and the references", cli_verify},
    {"bench", "time, rate, fraction of the machine's ceiling and error of every variant", cli_bench},
    {"generate", "text from a checkpoint", cli_generate},
    {"train", "a model from text", cli_train},
    {"tokenize", "text to ids and back; learn a vocabulary", cli_tokenize},
    {NULL, NULL, NULL},
};

static void print_help(FILE *out)
{
    fprintf(out, "Usage: kl COMMAND [OPTION...]\n\nKimi Linear kernel toolkit.\n\n");
    for (int i = 0; commands[i].name; i++)
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fprintf(out, "\n  kl COMMAND --help   its options\n  kl --version        the build and what this machine offers\n");
}

static void print_version(void)
{
    kl_build b = kl_build_describe();
    kl_provenance p = kl_provenance_now(NULL, 0, NULL);
    char gpu[160];
    kl_gpu_describe(0, gpu, sizeof gpu);
    printf("kl %s (%s%s)\n", b.version, b.commit, b.dirty ? " with local changes" : "");
    printf("  compiler  %s, -march=%s\n", b.compiler, b.arch);
    printf("  CPU       %s, %s\n", p.device, p.toolkit);
    printf("  CUDA      %s\n", kl_gpu_compiled() ? kl_gpu_toolkit() : "not compiled in");
    printf("  GPU       %s\n", gpu);
}

static kl_status run(int argc, char **argv)
{
    KL_REQUIRE(argc > 1, "expected a command; 'kl --help' lists them");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return kl_ok();
    }
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0) {
        print_version();
        return kl_ok();
    }
    KL_REQUIRE(argv[1][0] != '-', "unknown option '%s'; 'kl --help' lists the commands", argv[1]);
    for (int i = 0; commands[i].name; i++) {
        if (strcmp(argv[1], commands[i].name) != 0)
            continue;
        cli_line line = {argc, argv};
        char *name;
        char **arguments = malloc((size_t)argc * sizeof *arguments);
        if (!arguments || asprintf(&name, "kl %s", commands[i].name) < 0)
            return kl_error(KL_ENOMEM, "out of memory");
        memcpy(arguments, argv + 1, (size_t)argc * sizeof *arguments);
        arguments[0] = name;
        kl_status s = commands[i].run(&line, argc - 1, arguments);
        free(name);
        free(arguments);
        return s;
    }
    return kl_error(KL_EINVAL, "unknown command '%s'; 'kl --help' lists them", argv[1]);
}

/* libgomp's waiting threads spin for milliseconds by default: with more threads than free processors every parallel
 * region then waits for one that spins. It reads its settings before main() runs, so the program starts over once
 * with a short spin, unless the user has chosen. */
static void wait_briefly(char **argv)
{
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY") || setenv("GOMP_SPINCOUNT", "1000", 1) != 0)
        return;
    execv("/proc/self/exe", argv); /* where that fails, it only runs slower */
}

int main(int argc, char **argv)
{
    wait_briefly(argv);
    kl_status s = run(argc, argv);
    if (!kl_failed(s) && fflush(stdout) != 0)
        s = kl_error_errno("standard output");
    if (!kl_failed(s))
        return EXIT_SUCCESS;
    fflush(stdout);
    fprintf(stderr, "kl: %s\n", s.message);
    return s.code == KL_EINTR ? 130 : EXIT_FAILURE;
}
