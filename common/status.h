/* Outcome of every entry point: a code and one line that names the thing,
 * what was expected and what came. Returned by value, so it needs no global
 * and no thread-local storage. Only main() turns one into an exit status. */
#ifndef KL_COMMON_STATUS_H
#define KL_COMMON_STATUS_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum kl_code {
    KL_OK = 0,
    KL_EINVAL,       /* an argument is wrong: size, pointer, option, shape */
    KL_EUNSUPPORTED, /* understood, but not offered here: say what is */
    KL_EFORMAT,      /* a file's bytes do not mean what they must */
    KL_EIO,          /* the operating system refused: errno's text is in the message */
    KL_ENOMEM,
    KL_EDEVICE,      /* the accelerator is absent, too old, or failed */
    KL_EINTR,        /* the user asked to stop; work so far is saved */
} kl_code;

enum { KL_MESSAGE_MAX = 504 };

typedef struct kl_status {
    kl_code code;
    char message[KL_MESSAGE_MAX]; /* empty when code is KL_OK */
} kl_status;

static inline bool kl_failed(kl_status s) { return s.code != KL_OK; }
static inline kl_status kl_ok(void)
{
    kl_status s;
    s.code = KL_OK;
    s.message[0] = '\0';
    return s;
}

/* A failure with a printf-style message; too long a message is cut with "...". */
kl_status kl_error(kl_code code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same, followed by ": " and strerror(errno). */
kl_status kl_error_errno(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* s with "prefix: " put before its message, for callers that know the file or the layer. */
kl_status kl_error_in(kl_status s, const char *format, ...) __attribute__((format(printf, 2, 3)));
const char *kl_code_name(kl_code code);

/* Leave the function with the failure of expr, if it fails. */
#define KL_TRY(expr)                       \
    do {                                   \
        kl_status kl_try_ = (expr);        \
        if (kl_failed(kl_try_))            \
            return kl_try_;                \
    } while (0)

/* Leave the function with KL_EINVAL unless cond holds. */
#define KL_REQUIRE(cond, ...)                          \
    do {                                               \
        if (!(cond))                                   \
            return kl_error(KL_EINVAL, __VA_ARGS__);   \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
