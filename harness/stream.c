#include "harness/stream.h"

#include <stdlib.h>
#include <string.h>

#include "harness/json.h"

static kl_status emit(kl_stream *s, const char *text, size_t size)
{
    if (s->size + size + 1 > s->room) {
        size_t room = 2 * s->room + size + 256;
        char *more = realloc(s->text, room);
        if (!more)
            return kl_error(KL_ENOMEM, "text: out of memory");
        s->text = more;
        s->room = room;
    }
    memcpy(s->text + s->size, text, size);
    s->size += size;
    s->text[s->size] = '\0';
    if (s->out && size && (fwrite(text, 1, size, s->out) != size || fflush(s->out) != 0))
        return kl_error_errno("standard output");
    return kl_ok();
}

/* Could these bytes, none of them a whole character, be the beginning of one? */
static bool may_continue(const char *bytes, size_t size)
{
    unsigned char lead = (unsigned char)bytes[0];
    size_t length = lead >= 0xf0 && lead <= 0xf4 ? 4 : lead >= 0xe0 && lead <= 0xef ? 3 : lead >= 0xc2 && lead <= 0xdf ? 2 : 0;
    if (size >= length)
        return false;
    for (size_t i = 1; i < size; i++)
        if (((unsigned char)bytes[i] & 0xc0) != 0x80)
            return false;
    if (size < 2)
        return true;
    unsigned char next = (unsigned char)bytes[1];
    return !(lead == 0xe0 && next < 0xa0) && !(lead == 0xed && next > 0x9f) && !(lead == 0xf0 && next < 0x90) && !(lead == 0xf4 && next > 0x8f);
}

kl_status kl_stream_add(kl_stream *s, const char *bytes, size_t size)
{
    size_t total = s->held_size + size;
    char *all = malloc(total + 1);
    if (!all)
        return kl_error(KL_ENOMEM, "text: out of memory");
    memcpy(all, s->held, s->held_size);
    if (size)
        memcpy(all + s->held_size, bytes, size);
    s->held_size = 0;
    kl_status status = kl_ok();
    size_t at = 0;
    while (at < total && !kl_failed(status)) {
        size_t valid = kl_utf8_valid(all + at, total - at);
        status = emit(s, all + at, valid);
        at += valid;
        if (at == total || kl_failed(status))
            break;
        if (may_continue(all + at, total - at)) {
            s->held_size = total - at;
            memcpy(s->held, all + at, s->held_size);
            break;
        }
        status = emit(s, "\xef\xbf\xbd", 3);
        at++;
    }
    free(all);
    return status;
}

kl_status kl_stream_end(kl_stream *s)
{
    bool held = s->held_size > 0;
    s->held_size = 0;
    return held ? emit(s, "\xef\xbf\xbd", 3) : emit(s, "", 0);
}

void kl_stream_free(kl_stream *s)
{
    free(s->text);
    *s = (kl_stream){0};
}
