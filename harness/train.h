/* Training: AdamW, clipping, warm-up and decay, progress, loss log, checkpoints, exact resume, clean SIGINT. */
#ifndef KL_HARNESS_TRAIN_H
#define KL_HARNESS_TRAIN_H

#include "harness/model.h"

typedef struct kl_train_options {
    const char *data;          /* text file */
    const char *tokenizer_dir; /* NULL: byte level */
    const char *out_dir;       /* checkpoint and state go here */
    bool resume;               /* continue from out_dir; bit-exact */
    int64_t steps, batch, context; /* updates; sequences and tokens of each in an update */
    int64_t micro_batch;       /* sequences that go through the model together; 0: about 1,024 tokens. Decides rounding, not meaning */
    double lr, min_lr, beta1, beta2, eps, weight_decay, clip; /* clip 0: none */
    int64_t warmup;            /* steps; then cosine to min_lr at `steps` */
    double bias_update_rate;   /* the router's choice bias moves by this much a step towards experts chosen less than the mean; 0: stays */
    double validation;         /* share of the text held out at its end, in [0, 0.5]; 0: none. At most 32,768 tokens of it are used */
    int64_t eval_every, save_every, log_every; /* steps; 0: only at the end */
    uint64_t seed;
    kl_dtype save_dtype;
    const char *log_path;      /* JSON lines: step, loss, lr, grad_norm, tokens_per_s, load_max (the busiest expert's share over the mean),
                                  val_loss; NULL: out_dir/train.jsonl */
    bool progress;             /* a bar on stderr */
    volatile int *stop;        /* set by a signal handler: save, then KL_EINTR */
} kl_train_options;

/* What `kl train` starts from: everything but data, out_dir and the sizes. */
kl_train_options kl_train_defaults(void);

/* Trains m, whose weights become owned floats if they were mapped. out_dir receives the model (config.json,
 * model.safetensors, the tokenizer's files), the log, and training_state.safetensors: float weights, moments and
 * step, from which alone a run resumes. Each is replaced atomically. KL_EINTR: stopped and saved. A loss that is not
 * a number ends the run without saving over the last good state. */
kl_status kl_train(kl_model *m, const kl_train_options *options);

#endif
