/* Sampling: every option alone and together, against plain arithmetic and against frequencies. */
#include "tests/model_support.h"

#include <math.h>

#include "harness/sample.h"

static const kl_sampling GREEDY = {.top_p = 1.0f, .repetition_penalty = 1.0f};

enum { VOCAB = 6 };
/* probabilities .4 .3 .15 .1 .04 .01, out of order */
static const double P[VOCAB] = {0.15, 0.4, 0.01, 0.3, 0.04, 0.1};

static void logits_of(float *logits)
{
    for (int i = 0; i < VOCAB; i++)
        logits[i] = (float)log(P[i]) + 3.0f; /* any constant may be added */
}

static int32_t sample(const kl_sampling *s, kl_rng *rng, const float *logits, int64_t vocab, const int32_t *seen, int64_t count)
{
    float *copy = malloc((size_t)vocab * sizeof *copy);
    int32_t *scratch = malloc((size_t)vocab * sizeof *scratch);
    memcpy(copy, logits, (size_t)vocab * sizeof *copy);
    int32_t id = kl_sample(s, rng, copy, vocab, seen, count, scratch);
    free(copy);
    free(scratch);
    return id;
}

/* Draws often and holds the frequencies against the weights given (any scale; 0: never). */
static void frequencies(kl_sampling s, const double *weight)
{
    enum { DRAWS = 20000 };
    float logits[VOCAB];
    int count[VOCAB] = {0};
    double total = 0;
    kl_rng rng = kl_rng_make(17, 0);
    logits_of(logits);
    for (int i = 0; i < DRAWS; i++)
        count[sample(&s, &rng, logits, VOCAB, NULL, 0)]++;
    for (int i = 0; i < VOCAB; i++)
        total += weight[i];
    for (int i = 0; i < VOCAB; i++) {
        double p = weight[i] / total, deviation = sqrt(DRAWS * p * (1 - p));
        if (!(fabs(count[i] - DRAWS * p) <= 5 * deviation)) /* one in two million by chance, and the seed is fixed */
            fail_msg("id %d: drawn %d times, expected %.0f", i, count[i], DRAWS * p);
    }
}

static void greedy_takes_the_lowest_of_the_best(void **state)
{
    (void)state;
    kl_rng rng = kl_rng_make(1, 0), before = rng;
    float logits[] = {1, 5, -2, 5, 4.9f};
    assert_int_equal(sample(&GREEDY, &rng, logits, 5, NULL, 0), 1);
    assert_memory_equal(&rng, &before, sizeof rng); /* nothing is drawn */
    float low[] = {-INFINITY, -1e30f};
    assert_int_equal(sample(&GREEDY, &rng, low, 2, NULL, 0), 1);
}

static void temperature_reshapes(void **state)
{
    (void)state;
    kl_sampling s = GREEDY;
    double w[VOCAB];
    s.temperature = 1.0f;
    frequencies(s, P);
    s.temperature = 0.5f;
    for (int i = 0; i < VOCAB; i++)
        w[i] = P[i] * P[i];
    frequencies(s, w);
    s.temperature = 2.0f;
    for (int i = 0; i < VOCAB; i++)
        w[i] = sqrt(P[i]);
    frequencies(s, w);
}

static void top_k_keeps_the_best(void **state)
{
    (void)state;
    kl_sampling s = GREEDY;
    s.temperature = 1.0f;
    s.top_k = 3;
    frequencies(s, (double[]){0.15, 0.4, 0, 0.3, 0, 0});
    s.top_k = 100;
    frequencies(s, P);
    s.top_k = 1;
    frequencies(s, (double[]){0, 1, 0, 0, 0, 0});
}

static void top_p_keeps_the_shortest_run(void **state)
{
    (void)state;
    kl_sampling s = GREEDY;
    s.temperature = 1.0f;
    s.top_p = 0.69f;
    frequencies(s, (double[]){0, 0.4, 0, 0.3, 0, 0});
    s.top_p = 0.71f;
    frequencies(s, (double[]){0.15, 0.4, 0, 0.3, 0, 0});
    s.top_p = 0.0001f;
    frequencies(s, (double[]){0, 1, 0, 0, 0, 0});
    /* after top-k the mass is that of the three: .4 .3 .15 of .85; .8 of it is .68 */
    s.top_k = 3;
    s.top_p = 0.8f;
    frequencies(s, (double[]){0, 0.4, 0, 0.3, 0, 0});
}

static void min_p_keeps_a_share_of_the_best(void **state)
{
    (void)state;
    kl_sampling s = GREEDY;
    s.temperature = 1.0f;
    s.min_p = 0.24f;
    frequencies(s, (double[]){0.15, 0.4, 0, 0.3, 0, 0.1});
    s.min_p = 0.26f;
    frequencies(s, (double[]){0.15, 0.4, 0, 0.3, 0, 0});
    s.top_k = 2;
    frequencies(s, (double[]){0, 0.4, 0, 0.3, 0, 0});
}

static void penalty_divides_and_multiplies_once(void **state)
{
    (void)state;
    kl_sampling s = GREEDY;
    kl_rng rng = kl_rng_make(1, 0);
    s.repetition_penalty = 1.5f;
    float logits[] = {3, 2.5f, -1, -1.2f}, down[] = {-9, -9, -1, -1.2f};
    int32_t seen[] = {0, 0, 0};
    assert_int_equal(sample(&s, &rng, logits, 4, seen, 3), 1);   /* 3 / 1.5 = 2 < 2.5 */
    s.repetition_penalty = 1.15f;
    assert_int_equal(sample(&s, &rng, logits, 4, seen, 3), 0);   /* once: 2.61; three times would be 1.97 */
    int32_t seen2[] = {2, 99, -4};                               /* ids outside are ignored */
    s.repetition_penalty = 1.5f;
    assert_int_equal(sample(&s, &rng, down, 4, seen2, 3), 3);    /* -1 * 1.5 = -1.5 < -1.2 */
}

static void odd_logits_are_survived(void **state)
{
    (void)state;
    kl_sampling s = GREEDY;
    kl_rng rng = kl_rng_make(3, 0);
    float none[] = {NAN, -INFINITY, NAN}, some[] = {NAN, 2, -INFINITY, 1}, infinite[] = {1, INFINITY, 0};
    for (int i = 0; i < 2; i++) {
        s.temperature = (float)i;
        assert_int_equal(sample(&s, &rng, none, 3, NULL, 0), -1);
        assert_int_equal(sample(&s, &rng, infinite, 3, NULL, 0), 1);
        for (int j = 0; j < 200; j++) {
            int32_t id = sample(&s, &rng, some, 4, NULL, 0);
            assert_true(id == 1 || (i && id == 3));
        }
    }
}

/* The heap against a plain sort, over a vocabulary of the usual size. */
static void large_vocabularies_agree_with_a_sort(void **state)
{
    (void)state;
    enum { N = 20000, K = 50 };
    float *logits = floats(N);
    kl_rng r = kl_rng_make(9, 0), rng = kl_rng_make(10, 0);
    kl_fill_normal(&r, logits, N, 0, 2);
    float sorted[K];
    float *copy = floats(N);
    memcpy(copy, logits, N * sizeof *copy);
    for (int k = 0; k < K; k++) {
        int best = 0;
        for (int i = 1; i < N; i++)
            if (copy[i] > copy[best])
                best = i;
        sorted[k] = copy[best];
        copy[best] = -INFINITY;
    }
    kl_sampling s = {.temperature = 3.0f, .top_k = K, .top_p = 1.0f, .repetition_penalty = 1.0f};
    bool lowest = false;
    for (int i = 0; i < 2000; i++) {
        int32_t id = sample(&s, &rng, logits, N, NULL, 0);
        assert_true(logits[id] >= sorted[K - 1]);
        lowest = lowest || logits[id] == sorted[K - 1];
    }
    assert_true(lowest);
    free(copy);
    free(logits);
}

static void same_seed_same_draws(void **state)
{
    (void)state;
    kl_sampling s = {.temperature = 1.0f, .top_p = 0.95f, .min_p = 0.01f, .repetition_penalty = 1.1f};
    float logits[VOCAB];
    logits_of(logits);
    kl_rng a = kl_rng_make(5, 2), b = kl_rng_make(5, 2), c = kl_rng_make(5, 3);
    int same = 0;
    int32_t seen[] = {1};
    for (int i = 0; i < 100; i++) {
        int32_t x = sample(&s, &a, logits, VOCAB, seen, 1);
        assert_int_equal(x, sample(&s, &b, logits, VOCAB, seen, 1));
        same += x == sample(&s, &c, logits, VOCAB, seen, 1);
    }
    assert_true(same < 80);
}

static void bad_options_are_named(void **state)
{
    (void)state;
    assert_ok(kl_sampling_validate(&GREEDY));
    expect_error(kl_sampling_validate(NULL), KL_EINVAL, "sampling");
    kl_sampling s = GREEDY;
    s.temperature = -1;
    expect_error(kl_sampling_validate(&s), KL_EINVAL, "temperature");
    s = GREEDY, s.temperature = NAN;
    expect_error(kl_sampling_validate(&s), KL_EINVAL, "temperature");
    s = GREEDY, s.top_k = -1;
    expect_error(kl_sampling_validate(&s), KL_EINVAL, "top_k");
    s = GREEDY, s.top_p = 0;
    expect_error(kl_sampling_validate(&s), KL_EINVAL, "top_p");
    s = GREEDY, s.top_p = 1.5f;
    expect_error(kl_sampling_validate(&s), KL_EINVAL, "top_p");
    s = GREEDY, s.min_p = 2;
    expect_error(kl_sampling_validate(&s), KL_EINVAL, "min_p");
    s = GREEDY, s.repetition_penalty = 0;
    expect_error(kl_sampling_validate(&s), KL_EINVAL, "repetition_penalty");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_lowest_of_the_best),
        cmocka_unit_test(temperature_reshapes),
        cmocka_unit_test(top_k_keeps_the_best),
        cmocka_unit_test(top_p_keeps_the_shortest_run),
        cmocka_unit_test(min_p_keeps_a_share_of_the_best),
        cmocka_unit_test(penalty_divides_and_multiplies_once),
        cmocka_unit_test(odd_logits_are_survived),
        cmocka_unit_test(large_vocabularies_agree_with_a_sort),
        cmocka_unit_test(same_seed_same_draws),
        cmocka_unit_test(bad_options_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
