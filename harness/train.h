/* Training: AdamW, clipping, warm-up and decay, progress, loss log, checkpoints, exact resume, clean SIGINT. */
#ifndef KL_HARNESS_TRAIN_H
#define KL_HARNESS_TRAIN_H

#include "harness/model.h"

typedef struct kl_train_options {
    const char *data;          /* text file */
    const char *tokenizer_dir; /* NULL: byte level */
    const char *out_dir;       /* checkpoint and state go here */
    bool resume;               /* continue from out_dir; bit-exact */
    int64_t steps, batch, context;
    double lr, min_lr, beta1, beta2, eps, weight_decay, clip; /* clip 0: none */
    int64_t warmup;            /* steps; then cosine to min_lr at `steps` */
    double validation;         /* share of the text held out at its end; 0: none */
    int64_t eval_every, save_every, log_every;
    uint64_t seed;
    kl_dtype save_dtype;
    const char *log_path;      /* JSON lines: step, loss, lr, grad_norm, tokens_per_s, val_loss; NULL: out_dir/train.jsonl */
    bool progress;             /* a bar on stderr */
    volatile int *stop;        /* set by a signal handler: save, then KL_EINTR */
} kl_train_options;

kl_status kl_train(kl_model *m, const kl_train_options *options);

#endif
