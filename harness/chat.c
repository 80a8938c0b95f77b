/* The released chat template, for plain turns. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/tokenizer.h"

static bool role_is_known(const char *role) { return role && (strcmp(role, "system") == 0 || strcmp(role, "user") == 0 || strcmp(role, "assistant") == 0); }

kl_status kl_chat_render(const kl_message *messages, int count, bool add_generation_prompt, char **text)
{
    *text = NULL;
    for (int i = 0; i < count; i++) {
        KL_REQUIRE(role_is_known(messages[i].role), "messages[%d].role: expected system, user or assistant, got '%.40s'", i,
                   messages[i].role ? messages[i].role : "nothing");
        KL_REQUIRE(messages[i].content, "messages[%d].content: expected text, got NULL", i);
    }
    char *made = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&made, &size);
    if (!out)
        return kl_error_errno("no memory for a chat");
    for (int i = 0; i < count; i++)
        fprintf(out, "<|im_%s|>%s<|im_middle|>%s<|im_end|>", messages[i].role, messages[i].role, messages[i].content);
    if (add_generation_prompt)
        fputs("<|im_assistant|>assistant<|im_middle|>", out);
    if (fclose(out) != 0) {
        free(made);
        return kl_error(KL_ENOMEM, "no memory for a chat");
    }
    *text = made;
    return kl_ok();
}
