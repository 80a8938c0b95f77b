/* What a run tells of itself: JSON lines in a file, a bar (or, without a terminal, plain lines) on stderr. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/timer.h"
#include "harness/file.h"
#include "harness/train_internal.h"

static const double REDRAW_SECONDS = 0.2;
enum { BAR = 24 };

/* The step a log line speaks of; -1: none. */
static int64_t step_of(const char *line, size_t length)
{
    static const char key[] = "{\"step\":";
    if (length < sizeof key || strncmp(line, key, sizeof key - 1) != 0)
        return -1;
    return strtoll(line + sizeof key - 1, NULL, 10);
}

/* Whole lines about steps up to `last` stay; those of the part that is run again go. */
static kl_status trim(const char *path, int64_t last)
{
    char *text;
    size_t size;
    KL_TRY(kl_file_read(path, (size_t)1 << 30, &text, &size));
    kl_writer w;
    kl_status s = kl_writer_open(&w, path);
    bool open = !kl_failed(s);
    for (const char *line = text, *end; !kl_failed(s) && (end = memchr(line, '\n', (size_t)(text + size - line))); line = end + 1) {
        int64_t step = step_of(line, (size_t)(end - line));
        if (step >= 0 && step <= last)
            s = kl_writer_write(&w, line, (size_t)(end + 1 - line));
    }
    if (open && kl_failed(s))
        kl_writer_abandon(&w);
    else if (open)
        s = kl_writer_commit(&w);
    free(text);
    return s;
}

kl_status kl_progress_open(kl_progress *p, const kl_train_options *o, int64_t first_step)
{
    *p = (kl_progress){.shown = o->progress, .tty = isatty(STDERR_FILENO), .started = kl_now(), .first_step = first_step, .steps = o->steps};
    char path[4096];
    if (o->log_path) {
        int n = snprintf(path, sizeof path, "%s", o->log_path);
        KL_REQUIRE(n > 0 && n < (int)sizeof path, "log_path: expected a path below %zu bytes", sizeof path);
    } else {
        KL_TRY(kl_out_path(path, sizeof path, o->out_dir, "train.jsonl"));
    }
    bool keep = first_step > 0 && access(path, F_OK) == 0;
    if (keep)
        KL_TRY(trim(path, first_step));
    p->log = fopen(path, keep ? "a" : "w");
    return p->log ? kl_ok() : kl_error_errno("%s", path);
}

kl_status kl_progress_log(kl_progress *p, const kl_report *r)
{
    fprintf(p->log, "{\"step\":%lld,\"loss\":%.6f,\"lr\":%.6g,\"grad_norm\":%.6g,\"tokens_per_s\":%.1f", (long long)r->step, r->loss, r->lr,
            r->grad_norm, r->tokens_per_s);
    if (r->load_max > 0.0)
        fprintf(p->log, ",\"load_max\":%.3f", r->load_max);
    if (r->val_loss >= 0.0)
        fprintf(p->log, ",\"val_loss\":%.6f", r->val_loss);
    fputs("}\n", p->log);
    return fflush(p->log) == 0 ? kl_ok() : kl_error_errno("training log");
}

void kl_progress_draw(kl_progress *p, const kl_report *r, bool now)
{
    double t = kl_now();
    if (!p->shown || (p->tty ? !now && t - p->last_drawn < REDRAW_SECONDS : !now))
        return;
    p->last_drawn = t;
    int64_t done = r->step - p->first_step, left = p->steps - r->step;
    double eta = done > 0 ? (t - p->started) / (double)done * (double)left : 0.0;
    char bar[BAR + 1], validation[32] = "";
    int full = p->steps > 0 ? (int)(BAR * r->step / p->steps) : BAR;
    memset(bar, '.', BAR);
    memset(bar, '#', (size_t)(full < BAR ? full : BAR));
    bar[BAR] = '\0';
    if (r->val_loss >= 0.0)
        snprintf(validation, sizeof validation, "  val %.4f", r->val_loss);
    if (p->tty)
        fprintf(stderr, "\r\033[K[%s] ", bar);
    fprintf(stderr, "step %lld/%lld  loss %.4f%s  %.0f tokens/s  %lld:%02lld left%s", (long long)r->step, (long long)p->steps, r->loss, validation,
            r->tokens_per_s, (long long)eta / 60, (long long)eta % 60, p->tty ? "" : "\n");
    fflush(stderr);
}

void kl_progress_close(kl_progress *p)
{
    if (p->shown && p->tty && p->last_drawn > 0.0)
        fputc('\n', stderr);
    if (p->log)
        fclose(p->log);
    p->log = NULL;
}
