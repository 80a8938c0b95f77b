/* What the subcommands of `kl` share. Each lives in harness/cli_NAME.c, parses its options with argp and returns a
 * status; main() alone turns it into one line and an exit status. */
#ifndef KL_HARNESS_CLI_H
#define KL_HARNESS_CLI_H

#include <argp.h>
#include <stdint.h>

#include "common/context.h"

struct kl_config;

typedef struct cli_line {
    int argc;          /* the whole command line, for provenance */
    char **argv;
} cli_line;

typedef struct cli_command {
    const char *name, *summary;
    /* argv[0] is "kl NAME"; line is the whole of it. */
    kl_status (*run)(const cli_line *line, int argc, char **argv);
} cli_command;

kl_status cli_info(const cli_line *line, int argc, char **argv);
kl_status cli_verify(const cli_line *line, int argc, char **argv);
kl_status cli_bench(const cli_line *line, int argc, char **argv);
kl_status cli_generate(const cli_line *line, int argc, char **argv);
kl_status cli_train(const cli_line *line, int argc, char **argv);
kl_status cli_tokenize(const cli_line *line, int argc, char **argv);

/* The options that every subcommand has. The first member of every subcommand's options. */
typedef struct cli_common {
    kl_status status;  /* what an option found wrong */
    bool json;
    kl_ctx_options context;
} cli_common;

enum { CLI_KEY_HELP = 'h', CLI_KEY_JSON = 0x1000, CLI_KEY_DEVICE, CLI_KEY_THREADS, CLI_KEY_OWN = 0x1100 };
#define CLI_OPTIONS_HELP {"help", CLI_KEY_HELP, 0, 0, "Print this and stop", -1}
#define CLI_OPTIONS_DEVICE \
    {"device", CLI_KEY_DEVICE, "cpu|cuda", 0, "Where to compute (cpu)", 8}, \
    {"threads", CLI_KEY_THREADS, "N", 0, "CPU threads (as many as there are)", 8}
#define CLI_OPTIONS_JSON {"json", CLI_KEY_JSON, 0, 0, "Print JSON instead of text", 8}

/* Handles the common keys; ARGP_ERR_UNKNOWN for the others. For a parser's default branch. */
error_t cli_common_key(int key, char *arg, cli_common *common);
/* Keeps the first failure for cli_parse and makes argp stop. */
error_t cli_fail(cli_common *common, kl_status status);

/* Refuses unknown or ambiguous options and missing values by name, then runs argp. *help: it was printed, nothing is left to do.
 * input points to options whose first member is a cli_common. */
kl_status cli_parse(const struct argp *argp, int argc, char **argv, void *input, bool *help);

/* Numbers, whole or not, from the text of the option or key so named. */
kl_status cli_int(const char *name, const char *text, int64_t low, int64_t high, int64_t *value);
kl_status cli_real(const char *name, const char *text, double low, double high, double *value);
/* "4K", "128K", "1M" (powers of 1024) or a plain number. */
kl_status cli_tokens(const char *name, const char *text, int64_t *value);
#endif
