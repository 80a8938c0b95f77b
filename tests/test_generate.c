/* Generation: prefill in chunks, batches of unequal length, streaming, stop ids, and what the cache holds afterwards. */
#include "tests/model_support.h"

#include "harness/generate.h"

enum { SEQUENCES = 5, NEW = 12, CAPACITY = 160 };
static const int64_t LENGTHS[SEQUENCES] = {1, 40, 7, 130, 64};

typedef struct setup {
    kl_ctx *ctx;
    kl_model *m;
    kl_cache *cache;
    int32_t *ids[SEQUENCES];
    int32_t out[SEQUENCES][NEW];
    int64_t count[SEQUENCES];
} setup;

static setup open_setup(void)
{
    setup s = {.ctx = make_ctx(1)};
    kl_config c = small_config((const char *[]){"layers=4", NULL});
    s.m = random_model(s.ctx, &c, 41);
    assert_ok(kl_cache_create(&s.cache, &c, SEQUENCES, CAPACITY));
    for (int n = 0; n < SEQUENCES; n++)
        s.ids[n] = random_ids((uint64_t)(100 + n), LENGTHS[n], c.vocab_size);
    return s;
}

static void close_setup(setup *s)
{
    for (int n = 0; n < SEQUENCES; n++)
        free(s->ids[n]);
    kl_cache_destroy(s->cache);
    kl_model_close(s->m);
    kl_ctx_destroy(s->ctx);
}

static kl_generation options(float temperature)
{
    return (kl_generation){.max_new = NEW, .sampling = {.temperature = temperature, .top_p = 0.9f, .repetition_penalty = 1.1f, .seed = 77}};
}

static void reset_all(setup *s)
{
    for (int n = 0; n < SEQUENCES; n++)
        kl_cache_reset(s->cache, n);
    memset(s->out, -1, sizeof s->out);
}

static kl_status generate(setup *s, const kl_generation *o, int64_t N, kl_generation_stats *stats)
{
    int32_t *out[SEQUENCES];
    for (int n = 0; n < SEQUENCES; n++)
        out[n] = s->out[n];
    return kl_generate(s->m, s->cache, N, (const int32_t *const *)s->ids, LENGTHS, o, out, s->count, stats);
}

static void chunks_and_batches_give_the_same_text(void **state)
{
    (void)state;
    static const int64_t chunks[] = {0, 1, 7, 64};
    setup s = open_setup();
    for (int hot = 0; hot < 2; hot++) {
        kl_generation o = options((float)hot * 0.8f);
        reset_all(&s);
        kl_generation_stats stats;
        assert_ok(generate(&s, &o, SEQUENCES, &stats));
        int32_t want[SEQUENCES][NEW];
        memcpy(want, s.out, sizeof want);
        int64_t prompt = 0;
        for (int n = 0; n < SEQUENCES; n++) {
            prompt += LENGTHS[n];
            assert_int_equal(s.count[n], NEW);
            assert_int_equal(s.cache->length[n], LENGTHS[n] + NEW - 1); /* the last token was never fed back */
        }
        assert_int_equal(stats.prompt_tokens, prompt);
        assert_int_equal(stats.new_tokens, SEQUENCES * NEW);
        assert_int_equal(stats.decode_steps, NEW - 1);
        assert_int_equal(stats.cache_bytes, s.cache->bytes);
        assert_true(stats.prefill_seconds > 0 && stats.decode_seconds > 0);
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
            o.prefill_chunk = chunks[i];
            reset_all(&s);
            assert_ok(generate(&s, &o, SEQUENCES, NULL));
            assert_memory_equal(s.out, want, sizeof want);
        }
        /* the first two without the others */
        o.prefill_chunk = 0;
        reset_all(&s);
        assert_ok(generate(&s, &o, 2, NULL));
        assert_memory_equal(s.out, want, 2 * sizeof *want);
        /* other neighbours for the first two: a sequence's text is its own */
        int32_t *others = s.ids[3];
        s.ids[3] = random_ids(999, LENGTHS[3], s.m->config.vocab_size);
        reset_all(&s);
        assert_ok(generate(&s, &o, SEQUENCES, NULL));
        assert_memory_equal(s.out, want, 3 * sizeof *want);
        assert_memory_equal(s.out[4], want[4], sizeof *want);
        assert_memory_not_equal(s.out[3], want[3], sizeof *want);
        free(s.ids[3]);
        s.ids[3] = others;
    }
    close_setup(&s);
}

static void seeds_and_sequences_draw_differently(void **state)
{
    (void)state;
    setup s = open_setup();
    kl_generation o = options(1.5f);
    o.sampling.top_p = 1.0f;
    reset_all(&s);
    assert_ok(generate(&s, &o, 2, NULL));
    int32_t first[NEW];
    memcpy(first, s.out[1], sizeof first);
    o.sampling.seed++;
    reset_all(&s);
    assert_ok(generate(&s, &o, 2, NULL));
    assert_memory_not_equal(first, s.out[1], sizeof first);
    /* two equal prompts in one batch draw from different streams */
    free(s.ids[2]);
    s.ids[2] = random_ids(101, LENGTHS[1], s.m->config.vocab_size);
    const int32_t *pair[] = {s.ids[1], s.ids[2]};
    int64_t lengths[] = {LENGTHS[1], LENGTHS[1]};
    int32_t *out[] = {s.out[1], s.out[2]};
    reset_all(&s);
    assert_ok(kl_generate(s.m, s.cache, 2, pair, lengths, &o, out, s.count, NULL));
    assert_memory_not_equal(s.out[1], s.out[2], sizeof s.out[1]);
    close_setup(&s);
}

typedef struct stream {
    int32_t ids[SEQUENCES][NEW];
    int count[SEQUENCES], limit;
} stream;

static bool on_token(void *user, int64_t n, int32_t id)
{
    stream *s = user;
    s->ids[n][s->count[n]++] = id;
    return n != 2 || s->count[n] < s->limit;
}

static void tokens_stream_and_stop(void **state)
{
    (void)state;
    setup s = open_setup();
    kl_generation o = options(0.0f);
    reset_all(&s);
    assert_ok(generate(&s, &o, SEQUENCES, NULL));
    int32_t want[SEQUENCES][NEW];
    memcpy(want, s.out, sizeof want);

    stream seen = {.limit = 3};
    o.on_token = on_token;
    o.user = &seen;
    int64_t stops[] = {want[0][4], -5};
    o.stop_ids = stops;
    o.stop_count = 2;
    reset_all(&s);
    assert_ok(generate(&s, &o, SEQUENCES, NULL));
    for (int n = 0; n < SEQUENCES; n++) {
        int64_t expected = NEW;
        for (int i = NEW - 1; i >= 0; i--)
            if (want[n][i] == stops[0])
                expected = i + 1; /* the stop id itself is the last one told */
        if (n == 2 && expected > 3)
            expected = 3;
        assert_int_equal(s.count[n], expected);
        assert_int_equal(seen.count[n], expected);
        assert_memory_equal(seen.ids[n], s.out[n], (size_t)expected * sizeof(int32_t));
        assert_memory_equal(s.out[n], want[n], (size_t)expected * sizeof(int32_t));
    }
    assert_true(s.count[0] <= 5);
    close_setup(&s);
}

/* What was generated goes on where it stopped, as if it had been one call. */
static void generation_continues_a_slot(void **state)
{
    (void)state;
    setup s = open_setup();
    kl_generation o = options(0.0f);
    o.sampling.repetition_penalty = 1.0f;
    reset_all(&s);
    assert_ok(generate(&s, &o, 2, NULL));
    int32_t want[NEW];
    memcpy(want, s.out[1], sizeof want);
    reset_all(&s);
    o.max_new = 5;
    assert_ok(generate(&s, &o, 2, NULL));
    const int32_t *next[] = {&s.out[0][4], &s.out[1][4]};
    int32_t rest[2][NEW], *out[] = {rest[0], rest[1]};
    int64_t one[] = {1, 1}, count[2];
    o.max_new = NEW - 5;
    assert_ok(kl_generate(s.m, s.cache, 2, next, one, &o, out, count, NULL));
    assert_memory_equal(rest[1], want + 5, (NEW - 5) * sizeof *want);
    close_setup(&s);
}

static void a_full_cache_ends_a_sequence(void **state)
{
    (void)state;
    setup s = open_setup();
    kl_cache *tight;
    assert_ok(kl_cache_create(&tight, &s.m->config, 1, 44));
    kl_generation o = options(0.0f);
    const int32_t *prompt = s.ids[1];
    int32_t *out = s.out[1];
    assert_ok(kl_generate(s.m, tight, 1, &prompt, &LENGTHS[1], &o, &out, s.count, NULL));
    assert_int_equal(s.count[0], 5); /* 40 + 4 fed, the fifth has no room to be fed */
    assert_int_equal(tight->length[0], 44);
    expect_error(kl_generate(s.m, tight, 1, &prompt, &LENGTHS[1], &o, &out, s.count, NULL), KL_EINVAL, "at most 0 tokens");
    kl_cache_destroy(tight);
    close_setup(&s);
}

static void nothing_to_add_only_fills_the_cache(void **state)
{
    (void)state;
    setup s = open_setup();
    kl_generation o = options(0.0f);
    o.max_new = 0;
    reset_all(&s);
    assert_ok(generate(&s, &o, 3, NULL));
    for (int n = 0; n < 3; n++) {
        assert_int_equal(s.count[n], 0);
        assert_int_equal(s.cache->length[n], LENGTHS[n]);
    }
    assert_ok(generate(&s, &o, 0, NULL));
    close_setup(&s);
}

static void bad_requests_are_named(void **state)
{
    (void)state;
    setup s = open_setup();
    kl_generation o = options(0.0f);
    reset_all(&s);
    expect_error(generate(&s, &o, 6, NULL), KL_EINVAL, "5 slots");
    expect_error(generate(&s, NULL, 1, NULL), KL_EINVAL, "options");
    o.max_new = -1;
    expect_error(generate(&s, &o, 1, NULL), KL_EINVAL, "max_new");
    o = options(0.0f), o.prefill_chunk = -2;
    expect_error(generate(&s, &o, 1, NULL), KL_EINVAL, "prefill_chunk");
    o = options(0.0f), o.stop_count = 1;
    expect_error(generate(&s, &o, 1, NULL), KL_EINVAL, "stop_ids");
    o = options(-1.0f);
    expect_error(generate(&s, &o, 1, NULL), KL_EINVAL, "temperature");
    o = options(0.0f);
    int32_t kept = s.ids[1][3];
    s.ids[1][3] = 5000;
    expect_error(generate(&s, &o, 2, NULL), KL_EINVAL, "prompt 1: ids[3]");
    s.ids[1][3] = kept;
    int64_t zero = 0, long_one = CAPACITY + 1;
    int32_t *out = s.out[0], *many = random_ids(1, CAPACITY + 1, 512);
    const int32_t *prompt = many;
    expect_error(kl_generate(s.m, s.cache, 1, &prompt, &zero, &o, &out, s.count, NULL), KL_EINVAL, "at least 1 token");
    expect_error(kl_generate(s.m, s.cache, 1, &prompt, &long_one, &o, &out, s.count, NULL), KL_EINVAL, "at most 160 tokens");
    assert_int_equal(s.cache->length[0], 0);
    free(many);
    close_setup(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chunks_and_batches_give_the_same_text),
        cmocka_unit_test(seeds_and_sequences_draw_differently),
        cmocka_unit_test(tokens_stream_and_stop),
        cmocka_unit_test(generation_continues_a_slot),
        cmocka_unit_test(a_full_cache_ends_a_sequence),
        cmocka_unit_test(nothing_to_add_only_fills_the_cache),
        cmocka_unit_test(bad_requests_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
