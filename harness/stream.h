/* Text on its way out, piece by piece: a character whose bytes come from several tokens is held back until it is whole. */
#ifndef KL_HARNESS_STREAM_H
#define KL_HARNESS_STREAM_H

#include <stdio.h>

#include "common/status.h"

typedef struct kl_stream {
    FILE *out;      /* NULL: only collected */
    char held[8];   /* the beginning of a character */
    size_t held_size;
    char *text;     /* everything so far, valid UTF-8, NUL-terminated; NULL before the first piece */
    size_t size, room;
} kl_stream;

/* Bytes that can never become a character come out as U+FFFD. */
kl_status kl_stream_add(kl_stream *s, const char *bytes, size_t size);
/* What is still held back cannot be completed any more. */
kl_status kl_stream_end(kl_stream *s);
void kl_stream_free(kl_stream *s);

#endif
