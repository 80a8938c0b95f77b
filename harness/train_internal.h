/* What the files of training share. */
#ifndef KL_HARNESS_TRAIN_INTERNAL_H
#define KL_HARNESS_TRAIN_INTERNAL_H

#include <stdio.h>

#include "harness/train.h"

/* ---- train_data.c: the text as ids, and windows of it ---- */
typedef struct kl_corpus {
    int32_t *ids;
    int64_t train, total;  /* ids[0 .. train) to learn from, ids[train .. total) held out */
    uint64_t checksum;     /* of all ids */
} kl_corpus;

kl_status kl_corpus_open(kl_corpus *c, const kl_train_options *o, int64_t vocab);
void kl_corpus_close(kl_corpus *c);
/* Fills ids and targets [batch*context] of a training step: windows drawn from (seed, step) alone. */
void kl_corpus_draw(const kl_corpus *c, const kl_train_options *o, int64_t step, int32_t *ids, int32_t *targets);
/* Window i of the held-out part; false beyond the last one used. */
bool kl_corpus_held_out(const kl_corpus *c, const kl_train_options *o, int64_t i, int32_t *ids, int32_t *targets);

/* ---- schedule.c ---- */
double kl_learning_rate(const kl_train_options *o, int64_t step); /* step counts from 1 */

/* ---- train_state.c ---- */
/* One parameter with its gradient and moments, all floats. */
typedef struct kl_slot {
    char *name;
    size_t n;
    float *w, *g, *m, *v;
    bool decay, trained;
} kl_slot;

typedef struct kl_optimizer {
    kl_weights grads, moment1, moment2;
    kl_slot *slots;
    int64_t count, room;
} kl_optimizer;

kl_status kl_optimizer_open(kl_optimizer *opt, kl_weights *weights, const kl_config *c);
void kl_optimizer_close(kl_optimizer *opt);

kl_status kl_state_save(const kl_optimizer *opt, const kl_config *c, const kl_train_options *o, const kl_corpus *data, int64_t step);
kl_status kl_state_load(kl_optimizer *opt, const kl_config *c, const kl_train_options *o, const kl_corpus *data, int64_t *step);
/* Model, tokenizer and state into out_dir. */
kl_status kl_checkpoint_save(const kl_model *m, const kl_optimizer *opt, const kl_train_options *o, const kl_corpus *data, int64_t step);

/* ---- progress.c ---- */
typedef struct kl_report {
    int64_t step;
    double loss, lr, grad_norm, tokens_per_s, load_max, val_loss; /* load_max 0, val_loss negative: none */
} kl_report;

typedef struct kl_progress {
    FILE *log;
    bool shown, tty;
    double started, last_drawn;
    int64_t first_step, steps;
} kl_progress;

/* Resuming keeps the log's lines up to first_step and drops those after it. */
kl_status kl_progress_open(kl_progress *p, const kl_train_options *o, int64_t first_step);
kl_status kl_progress_log(kl_progress *p, const kl_report *r);
void kl_progress_draw(kl_progress *p, const kl_report *r, bool now);
void kl_progress_close(kl_progress *p);

/* out_dir/name into path. */
kl_status kl_out_path(char *path, size_t size, const char *dir, const char *name);

#endif
