/* The training loop. */
#include "harness/train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/timer.h"
#include "harness/file.h"
#include "harness/train_internal.h"

enum { PASS_TOKENS = 1024 };

kl_train_options kl_train_defaults(void)
{
    return (kl_train_options){
        .steps = 1000, .batch = 8, .context = 256, .lr = 3e-3, .min_lr = 3e-4, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
        .weight_decay = 0.1, .clip = 1.0, .warmup = 100, .bias_update_rate = 1e-2, .validation = 0.02,
        .eval_every = 250, .save_every = 250, .log_every = 10, .seed = 1, .save_dtype = KL_BF16,
    };
}

static kl_status check(const kl_model *m, const kl_train_options *o)
{
    KL_REQUIRE(m, "model: expected one, got NULL");
    KL_REQUIRE(o, "options: expected some, got NULL");
    KL_REQUIRE(o->data && *o->data, "data: expected a text file");
    KL_REQUIRE(o->out_dir && *o->out_dir, "out_dir: expected a directory");
    KL_REQUIRE(o->steps >= 1, "steps: expected at least 1, got %lld", (long long)o->steps);
    KL_REQUIRE(o->batch >= 1 && o->batch <= 1 << 20, "batch: expected 1 to %d sequences, got %lld", 1 << 20, (long long)o->batch);
    KL_REQUIRE(o->micro_batch >= 0, "micro_batch: expected 0 (by size) or more sequences, got %lld", (long long)o->micro_batch);
    KL_REQUIRE(o->context >= 1 && o->context <= 1 << 24, "context: expected 1 to %d tokens, got %lld", 1 << 24, (long long)o->context);
    KL_REQUIRE(m->config.max_length <= 0 || o->context <= m->config.max_length, "context: expected at most model_max_length = %lld tokens, got %lld",
               (long long)m->config.max_length, (long long)o->context);
    KL_REQUIRE(o->lr >= 0.0 && o->lr < INFINITY, "lr: expected at least 0, got %g", o->lr);
    KL_REQUIRE(o->min_lr >= 0.0 && o->min_lr <= o->lr, "min_lr: expected 0 to lr = %g, got %g", o->lr, o->min_lr);
    KL_REQUIRE(o->beta1 >= 0.0 && o->beta1 < 1.0, "beta1: expected at least 0 and below 1, got %g", o->beta1);
    KL_REQUIRE(o->beta2 >= 0.0 && o->beta2 < 1.0, "beta2: expected at least 0 and below 1, got %g", o->beta2);
    KL_REQUIRE(o->eps > 0.0, "eps: expected above 0, got %g", o->eps);
    KL_REQUIRE(o->weight_decay >= 0.0, "weight_decay: expected at least 0, got %g", o->weight_decay);
    KL_REQUIRE(o->clip >= 0.0, "clip: expected 0 (none) or more, got %g", o->clip);
    KL_REQUIRE(o->warmup >= 0 && o->warmup <= o->steps, "warmup: expected 0 to steps = %lld, got %lld", (long long)o->steps, (long long)o->warmup);
    KL_REQUIRE(o->bias_update_rate >= 0.0 && o->bias_update_rate <= 1.0, "bias_update_rate: expected 0 to 1, got %g", o->bias_update_rate);
    KL_REQUIRE(o->validation >= 0.0 && o->validation <= 0.5, "validation: expected 0 to 0.5, got %g", o->validation);
    KL_REQUIRE(o->eval_every >= 0 && o->save_every >= 0 && o->log_every >= 0, "eval_every, save_every, log_every: expected at least 0");
    KL_REQUIRE(o->save_dtype == KL_F32 || o->save_dtype == KL_BF16 || o->save_dtype == KL_F16, "save_dtype: expected float32, bfloat16 or float16, got %s",
               kl_dtype_name(o->save_dtype));
    return kl_ok();
}

/* Everything a run holds. */
typedef struct run {
    kl_model *m;
    const kl_train_options *o;
    kl_corpus data;
    kl_optimizer opt;
    kl_progress progress;
    int32_t *ids, *targets; /* [batch*context] */
    int64_t *cu;            /* [batch+1] */
    int64_t *load;          /* [layers,E] */
    int64_t step;           /* done */
} run;

static kl_status own_weights(kl_model *m)
{
    if (!m->weights.mapping)
        return kl_ok();
    kl_weights copy;
    KL_TRY(kl_weights_to_f32(&copy, &m->weights, &m->config));
    kl_weights_free(&m->weights);
    m->weights = copy;
    return kl_ok();
}

static kl_status open_run(run *r)
{
    const kl_train_options *o = r->o;
    const kl_config *c = &r->m->config;
    KL_TRY(kl_make_dir(o->out_dir));
    KL_TRY(kl_corpus_open(&r->data, o, c->vocab_size));
    KL_TRY(own_weights(r->m));
    KL_TRY(kl_optimizer_open(&r->opt, &r->m->weights, c));
    size_t tokens = (size_t)(o->batch * o->context);
    r->ids = calloc(tokens, sizeof *r->ids);
    r->targets = calloc(tokens, sizeof *r->targets);
    r->cu = calloc((size_t)o->batch + 1, sizeof *r->cu);
    r->load = calloc((size_t)(c->num_layers * c->num_experts) + 1, sizeof *r->load);
    if (!r->ids || !r->targets || !r->cu || !r->load)
        return kl_error(KL_ENOMEM, "training: out of memory for %lld sequences of %lld tokens", (long long)o->batch, (long long)o->context);
    for (int64_t b = 0; b <= o->batch; b++)
        r->cu[b] = b * o->context;
    if (o->resume)
        KL_TRY(kl_state_load(&r->opt, c, o, &r->data, &r->step));
    return kl_progress_open(&r->progress, o, r->step);
}

static void close_run(run *r)
{
    kl_progress_close(&r->progress);
    kl_corpus_close(&r->data);
    kl_optimizer_close(&r->opt);
    free(r->ids);
    free(r->targets);
    free(r->cu);
    free(r->load);
}

/* ---- one step ---- */

/* Global norm of all gradients: sqrt of the sum of all squares. */
static kl_status gradient_norm(const run *r, double *norm)
{
    double sum = 0.0;
    for (int64_t i = 0; i < r->opt.count; i++) {
        double part;
        KL_TRY(r->m->ops->sumsq(r->m->ctx, r->opt.slots[i].n, r->opt.slots[i].g, &part));
        sum += part;
    }
    *norm = sqrt(sum);
    return kl_ok();
}

static kl_status update(const run *r, double lr, double norm)
{
    const kl_train_options *o = r->o;
    double clip = o->clip > 0.0 && norm > o->clip ? o->clip / norm : 1.0;
    for (int64_t i = 0; i < r->opt.count; i++) {
        const kl_slot *s = &r->opt.slots[i];
        if (s->trained)
            KL_TRY(r->m->ops->adamw(r->m->ctx, s->n, s->w, s->g, s->m, s->v, lr, o->beta1, o->beta2, o->eps, s->decay ? o->weight_decay : 0.0,
                                    clip, r->step + 1));
    }
    return kl_ok();
}

/* Balance without a loss term: an expert chosen more often than the mean becomes a little harder to choose, one chosen
 * less often a little easier. The largest load over the mean, over all layers, is reported. */
static double balance(run *r)
{
    const kl_config *c = &r->m->config;
    int64_t E = c->num_experts;
    double mean = (double)(r->o->batch * r->o->context * c->top_k) / (double)(E ? E : 1), most = 0.0;
    float rate = (float)r->o->bias_update_rate;
    for (int64_t l = 0; l < c->num_layers; l++) {
        if (!c->sparse[l])
            continue;
        float *bias = r->m->weights.layers[l].router_bias.data;
        for (int64_t e = 0; e < E; e++) {
            double load = (double)r->load[l * E + e];
            most = load > most ? load : most;
            if (rate > 0.0f)
                bias[e] += load < mean ? rate : load > mean ? -rate : 0.0f;
        }
    }
    memset(r->load, 0, (size_t)(c->num_layers * E) * sizeof *r->load);
    return E && mean > 0.0 ? most / mean : 0.0;
}

/* Sequences that go through the model together: enough tokens for full tiles, few enough that the activations of a layer
 * stay near the caches. */
static int64_t sequences_a_pass(const kl_train_options *o)
{
    int64_t n = o->micro_batch ? o->micro_batch : PASS_TOKENS / o->context;
    return n < 1 ? 1 : n > o->batch ? o->batch : n;
}

/* Mean loss of the batch, and its gradient summed over the passes in their order. */
static kl_status gradients(run *r, double *mean)
{
    const kl_train_options *o = r->o;
    int64_t each = sequences_a_pass(o);
    *mean = 0.0;
    for (int64_t b = 0; b < o->batch; b += each) {
        int64_t N = o->batch - b < each ? o->batch - b : each, at = b * o->context;
        double loss, share = (double)N / (double)o->batch; /* sequences have equally many targets */
        kl_batch batch = {.N = N, .cu = r->cu, .ids = r->ids + at};
        KL_TRY(kl_model_loss(r->m, &batch, r->targets + at, &loss, NULL, &r->opt.grads, (float)share));
        *mean += share * loss;
    }
    return kl_ok();
}

static kl_status one_step(run *r, kl_report *report)
{
    const kl_train_options *o = r->o;
    kl_model *m = r->m;
    int64_t step = r->step + 1;
    kl_corpus_draw(&r->data, o, step, r->ids, r->targets);
    for (int64_t i = 0; i < r->opt.count; i++)
        KL_TRY(m->ops->zero(m->ctx, r->opt.slots[i].g, r->opt.slots[i].n * sizeof(float)));
    m->expert_load = r->load;
    kl_status s = gradients(r, &report->loss);
    m->expert_load = NULL;
    KL_TRY(s);
    KL_TRY(gradient_norm(r, &report->grad_norm));
    if (!isfinite(report->loss) || !isfinite(report->grad_norm))
        return kl_error(KL_EINVAL, "step %lld: expected a finite loss and gradient, got loss %g, gradient norm %g; the last saved state is unharmed",
                        (long long)step, report->loss, report->grad_norm);
    report->lr = kl_learning_rate(o, step);
    KL_TRY(update(r, report->lr, report->grad_norm));
    report->load_max = balance(r);
    report->step = r->step = step;
    return kl_ok();
}

/* ---- validation ---- */

static kl_status validate(run *r, double *mean)
{
    const kl_train_options *o = r->o;
    double sum = 0.0;
    int64_t windows = 0, each = sequences_a_pass(o);
    for (bool more = true; more;) {
        int64_t N = 0;
        for (; N < each && more; N += more)
            more = kl_corpus_held_out(&r->data, o, windows + N, r->ids + N * o->context, r->targets + N * o->context);
        if (N == 0)
            break;
        kl_batch batch = {.N = N, .cu = r->cu, .ids = r->ids};
        double loss;
        KL_TRY(kl_model_loss(r->m, &batch, r->targets, &loss, NULL, NULL, 1.0f));
        sum += loss * (double)N; /* windows have equally many targets */
        windows += N;
    }
    *mean = sum / (double)windows;
    return kl_ok();
}

/* ---- the loop ---- */

static bool due(int64_t step, int64_t every, int64_t steps) { return step == steps || (every > 0 && step % every == 0); }

static kl_status loop(run *r)
{
    const kl_train_options *o = r->o;
    double busy = 0.0;
    int64_t since = 0;
    while (r->step < o->steps) {
        kl_report report = {.val_loss = -1.0};
        double start = kl_now();
        KL_TRY(one_step(r, &report));
        busy += kl_now() - start;
        since++;
        report.tokens_per_s = (double)(since * o->batch * o->context) / busy;
        bool stop = o->stop && *o->stop, log = due(r->step, o->log_every, o->steps);
        if (o->validation > 0.0 && due(r->step, o->eval_every, o->steps)) {
            KL_TRY(validate(r, &report.val_loss));
            log = true;
        }
        if (log || stop)
            KL_TRY(kl_progress_log(&r->progress, &report));
        kl_progress_draw(&r->progress, &report, log || stop);
        if (log) {
            busy = 0.0;
            since = 0;
        }
        if (stop || due(r->step, o->save_every, o->steps))
            KL_TRY(kl_checkpoint_save(r->m, &r->opt, o, &r->data, r->step));
        if (stop && r->step < o->steps)
            return kl_error(KL_EINTR, "stopped after step %lld of %lld and saved to %s; resume continues from there", (long long)r->step,
                            (long long)o->steps, o->out_dir);
    }
    return kl_ok();
}

kl_status kl_train(kl_model *m, const kl_train_options *options)
{
    KL_TRY(check(m, options));
    run r = {.m = m, .o = options};
    kl_status s = open_run(&r);
    if (!kl_failed(s))
        s = loop(&r);
    close_run(&r);
    m->identity = 0;
    return s;
}
