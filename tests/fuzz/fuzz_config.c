/* A config.json from anywhere: either refused, or a configuration that holds. Text that is none is tried, line by line,
 * as options on top of a preset. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "harness/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const kl_config *c)
{
    if (kl_failed(kl_config_validate(c)))
        return;
    if (c->num_layers * c->num_experts > 128) /* counting would only be slow */
        return;
    kl_param_count n = kl_config_params(c);
    if (n.total <= 0 || n.active <= 0 || n.active > n.total)
        abort();
}

static void try_options(char *text)
{
    kl_config c;
    if (kl_failed(kl_config_preset(&c, "tiny")))
        abort();
    for (char *line = text, *end; line; line = end) {
        if ((end = strchr(line, '\n')))
            *end++ = '\0';
        (void)kl_config_set(&c, line);
    }
    check(&c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    if (!text)
        return 0;
    memcpy(text, data, size);
    text[size] = '\0';
    kl_config c;
    if (kl_failed(kl_config_parse(&c, (const char *)data, size)))
        try_options(text);
    else if (kl_failed(kl_config_validate(&c)))
        abort();
    else
        check(&c);
    free(text);
    return 0;
}
