/* Gradients of the whole model: against finite differences in every variant, accumulated and scaled, recomputed, without targets, over
 * thread counts. */
#include "tests/model_variants.h"

#include <math.h>

typedef struct problem {
    int64_t N, T;
    const int64_t *cu;
    int32_t *ids, *targets;
} problem;

static const int64_t PROBLEM_CU[] = {0, 33, 33, 34, 75};

static problem make_problem(int64_t vocab)
{
    problem p = {.N = 4, .T = 75, .cu = PROBLEM_CU, .ids = random_ids(3, 75, vocab), .targets = random_ids(4, 75, vocab)};
    p.targets[0] = p.targets[40] = p.targets[74] = -1;
    return p;
}

static double loss_of(kl_model *m, const problem *p, kl_weights *grads)
{
    double loss;
    int64_t counted;
    assert_ok(kl_model_loss(m, &(kl_batch){.N = p->N, .cu = p->cu, .ids = p->ids}, p->targets, &loss, &counted, grads, 1.0f));
    assert_int_equal(counted, 72);
    return loss;
}

/* A direction in the space of all trained parameters, along each about as long as the parameter itself. */
typedef struct direction {
    kl_rng rng;
    double step, slope; /* slope: sum of gradient times direction */
    const kl_config *c;
    kl_weights *grads;
    int64_t index;
} direction;

typedef struct nth {
    int64_t wanted, at;
    kl_param *param;
} nth;

static kl_status find_nth(void *user, const kl_param_info *info, kl_param *p)
{
    nth *n = user;
    (void)info;
    if (n->at++ == n->wanted)
        n->param = p;
    return kl_ok();
}

static kl_status move_one(void *user, const kl_param_info *info, kl_param *p)
{
    direction *d = user;
    int64_t index = d->index++;
    if (!info->trained)
        return kl_ok();
    nth found = {.wanted = index};
    if (d->grads)
        assert_ok(kl_weights_each(d->c, d->grads, find_nth, &found));
    float *x = p->data;
    size_t n = (size_t)(p->rows * p->columns);
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    double scale = sqrt(sum / (double)n) + 1e-3;
    for (size_t i = 0; i < n; i++) {
        double along = scale * kl_rng_normal(&d->rng);
        if (d->grads)
            d->slope += along * (double)((float *)found.param->data)[i];
        x[i] = (float)((double)x[i] + d->step * along);
    }
    return kl_ok();
}

/* Moves all weights by step along the direction of the seed; returns the slope when grads are given. */
static double move(kl_model *m, uint64_t seed, double step, kl_weights *grads)
{
    direction d = {.rng = kl_rng_make(seed, 99), .step = step, .c = &m->config, .grads = grads};
    assert_ok(kl_weights_each(&m->config, &m->weights, move_one, &d));
    return d.slope;
}

/* d loss along a random direction of every parameter at once, against central differences. The loss carries float noise of
 * about 1e-6 (relative 1e-7 a token, 72 tokens) over a step of 2e-3 times a slope of order 1; the truncation error goes with the
 * step squared and is taken out by Richardson's extrapolation from two steps. A choice of experts that flips would be a jump:
 * here every expert is chosen. */
static void gradients_match_finite_differences(void **state)
{
    (void)state;
    const double limit = 1e-2;
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        assert_ok(kl_config_set(&c, "experts=3"));
        assert_ok(kl_config_set(&c, "top_k=3"));
        kl_model *m = random_model(ctx, &c, 21);
        problem p = make_problem(c.vocab_size);
        kl_weights grads;
        assert_ok(kl_weights_zeros(&grads, &c));
        loss_of(m, &p, &grads);
        const double h = 4e-3, steps[4] = {-h, -h / 2, h / 2, h};
        double slope = move(m, 7, 0.0, &grads), at[4];
        kl_weights saved;
        assert_ok(kl_weights_to_f32(&saved, &m->weights, &c));
        for (int i = 0; i < 4; i++) {
            move(m, 7, steps[i], NULL);
            at[i] = loss_of(m, &p, NULL);
            memcpy(m->weights.owned, saved.owned, saved.owned_bytes);
        }
        kl_weights_free(&saved);
        double wide = (at[3] - at[0]) / (2 * h), near = (at[2] - at[1]) / h, numeric = (4 * near - wide) / 3;
        if (!(fabs(numeric - slope) <= limit * (fabs(slope) + 0.05)))
            fail_msg("%s: gradient says %.6g, differences say %.6g", VARIANTS[v][0], slope, numeric);
        kl_weights_free(&grads);
        free(p.ids);
        free(p.targets);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

static void gradients_accumulate_and_scale(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 22);
    problem p = make_problem(c.vocab_size);
    kl_weights once, thrice;
    assert_ok(kl_weights_zeros(&once, &c));
    assert_ok(kl_weights_zeros(&thrice, &c));
    loss_of(m, &p, &once);
    loss_of(m, &p, &thrice);
    double loss;
    assert_ok(kl_model_loss(m, &(kl_batch){.N = p.N, .cu = p.cu, .ids = p.ids}, p.targets, &loss, NULL, &thrice, 2.0f));
    size_t n = once.owned_bytes / sizeof(float);
    float *want = floats(n);
    for (size_t i = 0; i < n; i++)
        want[i] = 3.0f * ((float *)once.owned)[i];
    WITHIN(kl_rel_err_f32(thrice.owned, want, n), 1e-6, "one and two more");
    free(want);
    kl_weights_free(&once);
    kl_weights_free(&thrice);
    free(p.ids);
    free(p.targets);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void recomputing_gives_the_same_bits(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 23);
    problem p = make_problem(c.vocab_size);
    kl_weights kept, again;
    assert_ok(kl_weights_zeros(&kept, &c));
    assert_ok(kl_weights_zeros(&again, &c));
    double a = loss_of(m, &p, &kept);
    m->keep_bytes = 1;
    double b = loss_of(m, &p, &again);
    assert_true(a == b);
    assert_memory_equal(kept.owned, again.owned, kept.owned_bytes);
    kl_weights_free(&kept);
    kl_weights_free(&again);
    free(p.ids);
    free(p.targets);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void no_target_no_gradient(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 24);
    kl_weights grads;
    assert_ok(kl_weights_zeros(&grads, &c));
    int64_t cu[] = {0, 3}, counted = 9;
    int32_t ids[] = {1, 2, 3}, none[] = {-1, -1, -1};
    double loss = 5.0;
    assert_ok(kl_model_loss(m, &(kl_batch){.N = 1, .cu = cu, .ids = ids}, none, &loss, &counted, &grads, 1.0f));
    assert_true(loss == 0.0);
    assert_int_equal(counted, 0);
    for (size_t i = 0; i < grads.owned_bytes / sizeof(float); i++)
        assert_true(((float *)grads.owned)[i] == 0.0f);
    int32_t bad[] = {1, 512, 1};
    expect_error(kl_model_loss(m, &(kl_batch){.N = 1, .cu = cu, .ids = ids}, bad, &loss, NULL, NULL, 1.0f), KL_EINVAL, "targets[1]");
    kl_weights_free(&grads);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void expert_load_counts_every_choice(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 25);
    problem p = make_problem(c.vocab_size);
    int64_t load[LAYERS * 8] = {0};
    kl_weights grads;
    assert_ok(kl_weights_zeros(&grads, &c));
    m->expert_load = load;
    m->keep_bytes = 1; /* what is recomputed is not counted twice */
    loss_of(m, &p, &grads);
    for (int64_t l = 0; l < LAYERS; l++) {
        int64_t sum = 0;
        for (int64_t e = 0; e < 8; e++)
            sum += load[l * 8 + e];
        assert_int_equal(sum, c.sparse[l] ? p.T * c.top_k : 0);
    }
    kl_weights_free(&grads);
    free(p.ids);
    free(p.targets);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void threads_do_not_change_bits(void **state)
{
    (void)state;
    static const int threads[] = {1, 2, 3};
    float *logits[3];
    kl_weights grads[3];
    kl_config c = variant_config(0);
    problem p = make_problem(c.vocab_size);
    size_t count = (size_t)(p.T * c.vocab_size);
    for (int i = 0; i < 3; i++) {
        kl_ctx *ctx = make_ctx(threads[i]);
        kl_model *m = random_model(ctx, &c, 26);
        logits[i] = all_logits(m, p.N, p.cu, p.ids);
        assert_ok(kl_weights_zeros(&grads[i], &c));
        loss_of(m, &p, &grads[i]);
        kl_model_close(m);
        kl_ctx_destroy(ctx);
        assert_memory_equal(logits[i], logits[0], count * sizeof(float));
        assert_memory_equal(grads[i].owned, grads[0].owned, grads[0].owned_bytes);
    }
    for (int i = 0; i < 3; i++) {
        free(logits[i]);
        kl_weights_free(&grads[i]);
    }
    free(p.ids);
    free(p.targets);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_match_finite_differences),
        cmocka_unit_test(gradients_accumulate_and_scale),
        cmocka_unit_test(recomputing_gives_the_same_bits),
        cmocka_unit_test(no_target_no_gradient),
        cmocka_unit_test(expert_load_counts_every_choice),
        cmocka_unit_test(threads_do_not_change_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
