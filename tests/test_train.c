/* Training: it learns, resumes bit for bit, stops cleanly, and never leaves half a checkpoint. */
#include "tests/model_support.h"

#include <math.h>
#include <sys/stat.h>

#include "harness/file.h"
#include "harness/train_internal.h"

static const char TEXT[] = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. ";

typedef struct place {
    char dir[256], text[300], out[300];
} place;

static place make_place(int repeats)
{
    place p;
    make_folder(p.dir, sizeof p.dir);
    snprintf(p.text, sizeof p.text, "%s/text.txt", p.dir);
    snprintf(p.out, sizeof p.out, "%s/out", p.dir);
    FILE *f = fopen(p.text, "w");
    assert_non_null(f);
    for (int i = 0; i < repeats; i++)
        fputs(TEXT, f);
    fclose(f);
    return p;
}

static kl_config byte_config(void)
{
    return small_config((const char *[]){"layers=4", "vocab=260", "hidden=48", NULL});
}

static kl_train_options options_for(const place *p)
{
    kl_train_options o = kl_train_defaults();
    o.data = p->text;
    o.out_dir = p->out;
    o.steps = 6;
    o.batch = 2;
    o.context = 24;
    o.warmup = 2;
    o.validation = 0.1;
    o.eval_every = 3;
    o.save_every = 0;
    o.log_every = 1;
    o.save_dtype = KL_F32;
    return o;
}

static char *read_file(const char *dir, const char *name, size_t *size)
{
    char path[600], *bytes;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_ok(kl_file_read(path, (size_t)1 << 28, &bytes, size));
    return bytes;
}

static void assert_same_file(const char *a, const char *b, const char *name)
{
    size_t n, m;
    char *x = read_file(a, name, &n), *y = read_file(b, name, &m);
    if (n != m || memcmp(x, y, n) != 0)
        fail_msg("%s differs", name);
    free(x);
    free(y);
}

/* The value of a key in the last line of the log that has it. */
static double logged(const char *dir, const char *key)
{
    size_t size;
    char *log = read_file(dir, "train.jsonl", &size), quoted[64], *at = log, *last = NULL;
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    while ((at = strstr(at, quoted)))
        last = at++;
    if (!last)
        fail_msg("train.jsonl: no %s", key);
    double x = strtod(last + strlen(quoted), NULL);
    free(log);
    return x;
}

static kl_status train(const kl_config *c, const kl_train_options *o, uint64_t seed, int threads)
{
    kl_ctx *ctx = make_ctx(threads);
    kl_model *m;
    assert_ok(kl_model_random(&m, ctx, c, seed));
    kl_status s = kl_train(m, o);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
    return s;
}

static void a_short_text_is_learnt(void **state)
{
    (void)state;
    place p = make_place(6);
    kl_config c = byte_config();
    kl_train_options o = options_for(&p);
    o.steps = 100;
    o.batch = 4;
    o.context = 64;
    o.lr = 1e-2;
    o.min_lr = 1e-3;
    o.warmup = 10;
    o.validation = 0.2;
    o.eval_every = 50;
    assert_ok(train(&c, &o, 1, 1));
    double loss = logged(p.out, "loss"), held_out = logged(p.out, "val_loss");
    if (!(loss < 0.5) || !(held_out < 0.5)) /* log 260 = 5.6 at the start */
        fail_msg("after %d steps: loss %.3f, held out %.3f", (int)o.steps, loss, held_out);
    assert_true(logged(p.out, "step") == 100.0);
    assert_true(logged(p.out, "load_max") >= 1.0);
    /* what was saved is the model that was trained */
    kl_ctx *ctx = make_ctx(1);
    kl_model *m;
    assert_ok(kl_model_open(&m, ctx, p.out));
    int32_t ids[64], targets[64];
    for (int i = 0; i < 64; i++) {
        ids[i] = (unsigned char)TEXT[i];
        targets[i] = (unsigned char)TEXT[i + 1];
    }
    int64_t cu[] = {0, 64};
    double again;
    assert_ok(kl_model_loss(m, &(kl_batch){.N = 1, .cu = cu, .ids = ids}, targets, &again, NULL, NULL, 1.0f));
    assert_true(again < 1.0);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
    remove_folder(p.dir);
}

static void resuming_is_bit_exact(void **state)
{
    (void)state;
    place p = make_place(20);
    kl_config c = byte_config();
    char whole[350], parts[350];
    snprintf(whole, sizeof whole, "%s/whole", p.dir);
    snprintf(parts, sizeof parts, "%s/parts", p.dir);
    kl_train_options o = options_for(&p);
    o.out_dir = whole;
    assert_ok(train(&c, &o, 3, 2));
    /* the same in pieces of one step: stop is set before it begins; other thread counts, other initial weights on resuming */
    volatile int stop = 1;
    o.out_dir = parts;
    o.stop = &stop;
    expect_error(train(&c, &o, 3, 1), KL_EINTR, "step 1 of 6");
    o.resume = true;
    expect_error(train(&c, &o, 77, 2), KL_EINTR, "step 2 of 6");
    expect_error(train(&c, &o, 78, 3), KL_EINTR, "step 3 of 6");
    stop = 0;
    assert_ok(train(&c, &o, 79, 1));
    assert_same_file(whole, parts, "training_state.safetensors");
    assert_same_file(whole, parts, "model.safetensors");
    assert_same_file(whole, parts, "config.json");
    /* the log tells each step once */
    size_t size;
    char *log = read_file(parts, "train.jsonl", &size);
    int lines = 0;
    for (size_t i = 0; i < size; i++)
        lines += log[i] == '\n';
    assert_int_equal(lines, 6);
    free(log);
    remove_folder(p.dir);
}

/* A kill between two saves: the log and the model are ahead of the state; resuming runs the lost steps again. */
static void a_lost_stretch_is_run_again(void **state)
{
    (void)state;
    place p = make_place(20);
    kl_config c = byte_config();
    char whole[350], killed[350], command[1200];
    snprintf(whole, sizeof whole, "%s/whole", p.dir);
    snprintf(killed, sizeof killed, "%s/killed", p.dir);
    kl_train_options o = options_for(&p);
    o.out_dir = whole;
    assert_ok(train(&c, &o, 4, 1));
    volatile int stop = 1;
    o.out_dir = killed;
    o.stop = &stop;
    expect_error(train(&c, &o, 4, 1), KL_EINTR, "step 1");
    snprintf(command, sizeof command, "cp %s/training_state.safetensors %s/early", killed, p.dir);
    assert_int_equal(system(command), 0);
    o.resume = true;
    expect_error(train(&c, &o, 4, 1), KL_EINTR, "step 2");
    snprintf(command, sizeof command, "mv %s/early %s/training_state.safetensors", p.dir, killed);
    assert_int_equal(system(command), 0);
    stop = 0;
    assert_ok(train(&c, &o, 4, 1));
    assert_same_file(whole, killed, "training_state.safetensors");
    assert_same_file(whole, killed, "model.safetensors");
    size_t size;
    char *log = read_file(killed, "train.jsonl", &size);
    int told = 0;
    for (const char *at = log; (at = strstr(at, "{\"step\":2,")); at++)
        told++;
    assert_int_equal(told, 1);
    free(log);
    remove_folder(p.dir);
}

static void resuming_another_run_is_refused(void **state)
{
    (void)state;
    place p = make_place(20);
    kl_config c = byte_config(), other = small_config((const char *[]){"layers=4", "vocab=260", "hidden=48", "rope=1", NULL});
    kl_train_options o = options_for(&p);
    o.steps = 2;
    o.resume = true;
    expect_error(train(&c, &o, 1, 1), KL_EIO, "resume");
    o.resume = false;
    assert_ok(train(&c, &o, 1, 1));
    o.resume = true;
    o.seed = 2;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "seed 1, now it is 2");
    o.seed = 1, o.context = 25;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "context");
    o.context = 24, o.batch = 3;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "batch");
    o.batch = 2;
    expect_error(train(&other, &o, 1, 1), KL_EINVAL, "model");
    FILE *f = fopen(p.text, "r+");
    fputs("T", f); /* one letter is another */
    fclose(f);
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "text");
    f = fopen(p.text, "r+");
    fputs("t", f);
    fclose(f);
    /* a state cut short */
    char path[400];
    snprintf(path, sizeof path, "%s/training_state.safetensors", p.out);
    assert_int_equal(truncate(path, 5000), 0);
    expect_error(train(&c, &o, 1, 1), KL_EFORMAT, "training_state");
    remove_folder(p.dir);
}

static void bad_options_are_named(void **state)
{
    (void)state;
    place p = make_place(3); /* 261 bytes */
    kl_config c = byte_config();
    kl_train_options o = options_for(&p);
    o.data = "/nonexistent/text";
    expect_error(train(&c, &o, 1, 1), KL_EIO, "/nonexistent/text");
    o = options_for(&p), o.context = 300;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "context + 1 = 301");
    o = options_for(&p), o.validation = 0.01;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "validation");
    o = options_for(&p), o.steps = 0;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "steps");
    o = options_for(&p), o.lr = NAN;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "lr");
    o = options_for(&p), o.beta2 = 1.0;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "beta2");
    o = options_for(&p), o.warmup = 7;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "warmup");
    o = options_for(&p), o.out_dir = NULL;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "out_dir");
    o = options_for(&p), o.save_dtype = KL_I32;
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "save_dtype");
    c.vocab_size = 100;
    o = options_for(&p);
    expect_error(train(&c, &o, 1, 1), KL_EINVAL, "vocab_size of 100");
    remove_folder(p.dir);
}

static void a_broken_model_is_not_saved(void **state)
{
    (void)state;
    place p = make_place(5);
    kl_config c = byte_config();
    kl_ctx *ctx = make_ctx(1);
    kl_model *m;
    assert_ok(kl_model_random(&m, ctx, &c, 1));
    ((float *)m->weights.norm.data)[0] = NAN;
    kl_train_options o = options_for(&p);
    expect_error(kl_train(m, &o), KL_EINVAL, "finite loss");
    char path[400];
    snprintf(path, sizeof path, "%s/model.safetensors", p.out);
    assert_int_not_equal(access(path, F_OK), 0);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
    remove_folder(p.dir);
}

static void mapped_weights_can_be_trained(void **state)
{
    (void)state;
    place p = make_place(5);
    kl_config c = byte_config();
    kl_train_options o = options_for(&p);
    o.steps = 2;
    o.save_dtype = KL_BF16;
    assert_ok(train(&c, &o, 1, 1));
    kl_ctx *ctx = make_ctx(1);
    kl_model *m;
    assert_ok(kl_model_open(&m, ctx, p.out));
    assert_int_equal(m->weights.embed.dtype, KL_BF16);
    char next[350];
    snprintf(next, sizeof next, "%s/next", p.dir);
    o.out_dir = next;
    assert_ok(kl_train(m, &o));
    assert_int_equal(m->weights.embed.dtype, KL_F32);
    kl_model_close(m);
    /* and the bf16 checkpoint resumes from its float state */
    o.out_dir = p.out;
    o.resume = true;
    o.steps = 3;
    assert_ok(kl_model_open(&m, ctx, p.out));
    assert_ok(kl_train(m, &o));
    kl_model_close(m);
    kl_ctx_destroy(ctx);
    remove_folder(p.dir);
}

static void choice_bias_balances_the_experts(void **state)
{
    (void)state;
    place p = make_place(10);
    kl_config c = byte_config();
    double load[2];
    for (int on = 0; on < 2; on++) {
        kl_ctx *ctx = make_ctx(1);
        kl_model *m;
        assert_ok(kl_model_random(&m, ctx, &c, 5));
        /* a router that prefers two experts whatever comes */
        for (int64_t l = 0; l < c.num_layers; l++)
            for (int64_t e = 0; c.sparse[l] && e < 2; e++)
                ((float *)m->weights.layers[l].router_bias.data)[e] = 0.5f;
        kl_train_options o = options_for(&p);
        o.steps = 40;
        o.lr = o.min_lr = 1e-4;
        o.bias_update_rate = on ? 0.03 : 0.0;
        o.validation = 0;
        assert_ok(kl_train(m, &o));
        load[on] = logged(p.out, "load_max");
        kl_model_close(m);
        kl_ctx_destroy(ctx);
    }
    if (!(load[1] < 0.75 * load[0]))
        fail_msg("busiest expert over the mean: %.2f without, %.2f with the update", load[0], load[1]);
    remove_folder(p.dir);
}

/* However the batch is cut into passes, it is one batch: the loss and the gradient's norm agree up to rounding. */
static void passes_add_up_to_the_batch(void **state)
{
    (void)state;
    place p = make_place(10);
    kl_config c = byte_config();
    double loss[3], norm[3];
    static const int64_t cuts[] = {5, 2, 1};
    for (int i = 0; i < 3; i++) {
        kl_train_options o = options_for(&p);
        o.batch = 5;
        o.micro_batch = cuts[i];
        o.steps = 1;
        o.warmup = 0;
        o.validation = 0;
        assert_ok(train(&c, &o, 6, 1));
        loss[i] = logged(p.out, "loss");
        norm[i] = logged(p.out, "grad_norm");
        WITHIN(fabs(loss[i] - loss[0]), 2e-6, "loss");
        WITHIN(fabs(norm[i] - norm[0]), 1e-4 * norm[0], "gradient norm");
    }
    remove_folder(p.dir);
}

static void the_schedule_warms_up_and_decays(void **state)
{
    (void)state;
    kl_train_options o = {.steps = 110, .warmup = 10, .lr = 1.0, .min_lr = 0.1};
    assert_true(fabs(kl_learning_rate(&o, 1) - 0.1) < 1e-12);
    assert_true(fabs(kl_learning_rate(&o, 10) - 1.0) < 1e-12);
    assert_true(fabs(kl_learning_rate(&o, 60) - 0.55) < 1e-12);
    assert_true(fabs(kl_learning_rate(&o, 110) - 0.1) < 1e-12);
    for (int64_t s = 11; s <= 110; s++)
        assert_true(kl_learning_rate(&o, s) < kl_learning_rate(&o, s - 1));
    o.warmup = 0;
    assert_true(kl_learning_rate(&o, 1) < 1.0 && kl_learning_rate(&o, 1) > 0.99);
}

static void windows_depend_on_seed_and_step_alone(void **state)
{
    (void)state;
    enum { B = 4, C = 8 };
    int32_t ids[200], a[B * C], at[B * C], b[B * C], bt[B * C];
    for (int i = 0; i < 200; i++)
        ids[i] = i;
    kl_corpus corpus = {.ids = ids, .train = 160, .total = 200};
    kl_train_options o = {.seed = 3, .batch = B, .context = C};
    bool first = false, last = false;
    for (int64_t step = 1; step < 400; step++) {
        kl_corpus_draw(&corpus, &o, step, a, at);
        kl_corpus_draw(&corpus, &o, step, b, bt);
        assert_memory_equal(a, b, sizeof a);
        for (int i = 0; i < B * C; i++) {
            assert_int_equal(at[i], a[i] + 1); /* the text counts up */
            assert_true(at[i] < 160);          /* never from the held-out part */
            first = first || a[i] == 0;
            last = last || at[i] == 159;
        }
        kl_corpus_draw(&corpus, &o, step + 1, b, bt);
        assert_memory_not_equal(a, b, sizeof a);
    }
    assert_true(first && last);
    int64_t windows = 0;
    while (kl_corpus_held_out(&corpus, &o, windows, a, at)) {
        assert_int_equal(a[0], 160 + windows * C);
        windows++;
    }
    assert_int_equal(windows, 4); /* 39 targets are there: four windows of 8, not five */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_short_text_is_learnt),
        cmocka_unit_test(resuming_is_bit_exact),
        cmocka_unit_test(a_lost_stretch_is_run_again),
        cmocka_unit_test(resuming_another_run_is_refused),
        cmocka_unit_test(bad_options_are_named),
        cmocka_unit_test(a_broken_model_is_not_saved),
        cmocka_unit_test(mapped_weights_can_be_trained),
        cmocka_unit_test(choice_bias_balances_the_experts),
        cmocka_unit_test(passes_add_up_to_the_batch),
        cmocka_unit_test(the_schedule_warms_up_and_decays),
        cmocka_unit_test(windows_depend_on_seed_and_step_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
