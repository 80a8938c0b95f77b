#include "harness/cli.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

error_t cli_fail(cli_common *common, kl_status status)
{
    if (!kl_failed(common->status))
        common->status = status;
    return EINVAL;
}

error_t cli_common_key(int key, char *arg, cli_common *common)
{
    int64_t threads;
    kl_status s;
    switch (key) {
    case CLI_KEY_JSON:
        common->json = true;
        return 0;
    case CLI_KEY_DEVICE:
        if (strcmp(arg, "cpu") != 0 && strcmp(arg, "cuda") != 0)
            return cli_fail(common, kl_error(KL_EINVAL, "--device: expected cpu or cuda, got '%s'", arg));
        common->context.device = strcmp(arg, "cuda") == 0 ? KL_CUDA : KL_CPU;
        return 0;
    case CLI_KEY_THREADS:
        s = cli_int("--threads", arg, 1, 4096, &threads);
        if (kl_failed(s))
            return cli_fail(common, s);
        common->context.threads = (int)threads;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* The option so named, or the only one that begins so. */
static kl_status find_long(const struct argp_option *options, const char *program, const char *text, size_t length, const struct argp_option **found)
{
    int matches = 0;
    *found = NULL;
    for (const struct argp_option *o = options; o && (o->name || o->key || o->doc); o++) {
        if (!o->name || strncmp(o->name, text, length) != 0)
            continue;
        if (strlen(o->name) == length) {
            *found = o;
            return kl_ok();
        }
        *found = o;
        matches++;
    }
    if (matches == 1)
        return kl_ok();
    return kl_error(KL_EINVAL, "%s option '--%.*s'; '%s --help' lists them", matches ? "ambiguous" : "unknown", (int)length, text, program);
}

static const struct argp_option *find_short(const struct argp_option *options, char key)
{
    for (const struct argp_option *o = options; o && (o->name || o->key || o->doc); o++)
        if (o->key == key)
            return o;
    return NULL;
}

/* argp's own complaints are several lines long; ours are made here, before it runs. */
static kl_status check_options(const struct argp *argp, int argc, char **argv, bool *help)
{
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i];
        if (strcmp(a, "--") == 0)
            break;
        const struct argp_option *o;
        if (strncmp(a, "--", 2) == 0) {
            size_t length = strcspn(a + 2, "=");
            bool given = a[2 + length] == '=';
            KL_TRY(find_long(argp->options, argv[0], a + 2, length, &o));
            *help |= o->key == CLI_KEY_HELP;
            KL_REQUIRE(o->arg || !given, "option '--%s' takes no value", o->name);
            if (o->arg && !given && !(o->flags & OPTION_ARG_OPTIONAL))
                KL_REQUIRE(++i < argc, "option '--%s' needs a value: %s", o->name, o->arg);
        } else if (a[0] == '-' && a[1]) {
            for (const char *c = a + 1; *c; c++) {
                o = find_short(argp->options, *c);
                KL_REQUIRE(o, "unknown option '-%c'; '%s --help' lists them", *c, argv[0]);
                *help |= o->key == CLI_KEY_HELP;
                if (!o->arg)
                    continue;
                if (!c[1])
                    KL_REQUIRE(++i < argc, "option '-%c' needs a value: %s", *c, o->arg);
                break;
            }
        }
    }
    return kl_ok();
}

kl_status cli_parse(const struct argp *argp, int argc, char **argv, void *input, bool *help)
{
    cli_common *common = input;
    *help = false;
    KL_TRY(check_options(argp, argc, argv, help));
    if (*help) {
        argp_help(argp, stdout, ARGP_HELP_USAGE | ARGP_HELP_PRE_DOC | ARGP_HELP_LONG | ARGP_HELP_POST_DOC, argv[0]);
        return kl_ok();
    }
    error_t e = argp_parse(argp, argc, argv, ARGP_NO_ERRS | ARGP_NO_HELP | ARGP_NO_EXIT, NULL, input);
    if (kl_failed(common->status))
        return common->status;
    KL_REQUIRE(e == 0, "arguments not understood; '%s --help' says what is expected", argv[0]);
    return kl_ok();
}

kl_status cli_int(const char *name, const char *text, int64_t low, int64_t high, int64_t *value)
{
    char *end;
    errno = 0;
    long long n = strtoll(text, &end, 10);
    KL_REQUIRE(*text && !*end && !errno && n >= low && n <= high, "%s: expected a whole number from %lld to %lld, got '%s'", name,
               (long long)low, (long long)high, text);
    *value = n;
    return kl_ok();
}

kl_status cli_real(const char *name, const char *text, double low, double high, double *value)
{
    char *end;
    double x = strtod(text, &end);
    KL_REQUIRE(*text && !*end && isfinite(x) && x >= low && x <= high, "%s: expected a number from %g to %g, got '%s'", name, low, high, text);
    *value = x;
    return kl_ok();
}

kl_status cli_tokens(const char *name, const char *text, int64_t *value)
{
    size_t length = strlen(text);
    int shift = length && (text[length - 1] == 'K' || text[length - 1] == 'k') ? 10 : length && (text[length - 1] == 'M' || text[length - 1] == 'm') ? 20 : 0;
    char digits[32];
    KL_REQUIRE(length < sizeof digits, "%s: expected a number of tokens such as 4096, 4K or 1M, got '%s'", name, text);
    memcpy(digits, text, length + 1);
    digits[length - (shift != 0)] = '\0';
    int64_t n;
    if (kl_failed(cli_int(name, digits, 0, INT64_C(1) << 40, &n)))
        return kl_error(KL_EINVAL, "%s: expected a number of tokens such as 4096, 4K or 1M, got '%s'", name, text);
    *value = n << shift;
    return kl_ok();
}
