#include "common/status.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static void cut(char *text, int wanted)
{
    if (wanted >= KL_MESSAGE_MAX)
        memcpy(text + KL_MESSAGE_MAX - 4, "...", 4);
}

kl_status kl_error(kl_code code, const char *format, ...)
{
    kl_status s = {.code = code};
    va_list args;
    va_start(args, format);
    cut(s.message, vsnprintf(s.message, sizeof s.message, format, args));
    va_end(args);
    return s;
}

kl_status kl_error_errno(const char *format, ...)
{
    int saved = errno;
    char text[KL_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return kl_error(saved == ENOMEM ? KL_ENOMEM : KL_EIO, "%s: %s", text, strerror(saved));
}

kl_status kl_error_in(kl_status s, const char *format, ...)
{
    if (!kl_failed(s))
        return s;
    char text[KL_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return kl_error(s.code, "%s: %s", text, s.message);
}

const char *kl_code_name(kl_code code)
{
    switch (code) {
    case KL_OK: return "ok";
    case KL_EINVAL: return "invalid argument";
    case KL_EUNSUPPORTED: return "unsupported";
    case KL_EFORMAT: return "bad format";
    case KL_EIO: return "input/output";
    case KL_ENOMEM: return "out of memory";
    case KL_EDEVICE: return "device";
    case KL_EINTR: return "interrupted";
    }
    return "unknown";
}
