/* The whole model: the same numbers however the tokens are packed, cut or cached; what is refused. */
#include "tests/model_variants.h"

#include <math.h>

/* Two orders of summation of the same float products through a few layers. */
static const double SAME_LIMIT = 2e-5;

/* ---- the same numbers in other ways ---- */

/* Feeds ids [0,n) to a slot in pieces of `chunk`; logits of every token. */
static void feed(kl_model *m, kl_cache *cache, int64_t slot, const int32_t *ids, int64_t n, int64_t chunk, float *logits)
{
    for (int64_t t = 0; t < n; t += chunk) {
        int64_t cu[] = {0, n - t < chunk ? n - t : chunk};
        kl_batch batch = {.N = 1, .cu = cu, .ids = ids + t, .slot = &slot};
        assert_ok(kl_model_forward(m, &batch, cache, &(kl_outputs){.logits = logits + t * m->config.vocab_size}));
    }
}

static void chunked_prefill_equals_one_pass(void **state)
{
    (void)state;
    static const int64_t chunks[] = {1, 7, 64, 150};
    enum { T = 150 };
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        kl_model *m = random_model(ctx, &c, 11);
        int32_t *ids = random_ids(5, T, c.vocab_size);
        int64_t cu[] = {0, T};
        float *want = all_logits(m, 1, cu, ids), *got = floats((size_t)(T * c.vocab_size));
        kl_cache *cache;
        assert_ok(kl_cache_create(&cache, &c, 2, T));
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
            kl_cache_reset(cache, 1);
            feed(m, cache, 1, ids, T, chunks[i], got);
            assert_int_equal(cache->length[1], T);
            WITHIN(kl_rel_err_f32(got, want, (size_t)(T * c.vocab_size)), SAME_LIMIT, VARIANTS[v][0]);
        }
        kl_cache_destroy(cache);
        free(want);
        free(got);
        free(ids);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

/* Latents of a bf16 model are cached in bf16: the same up to that rounding, and the same for every chunk size. */
static void bf16_latents_do_not_depend_on_chunks(void **state)
{
    (void)state;
    enum { T = 100 };
    kl_ctx *ctx = make_ctx(1);
    kl_config c = small_config((const char *[]){"layers=4", "dtype=bfloat16", NULL});
    kl_model *m = random_model(ctx, &c, 12);
    int32_t *ids = random_ids(6, T, c.vocab_size);
    int64_t cu[] = {0, T};
    float *want = all_logits(m, 1, cu, ids), *whole = floats((size_t)(T * c.vocab_size)), *pieces = floats((size_t)(T * c.vocab_size));
    kl_cache *cache;
    assert_ok(kl_cache_create(&cache, &c, 2, T));
    assert_int_equal(cache->latent_dtype, KL_BF16);
    feed(m, cache, 0, ids, T, T, whole);
    feed(m, cache, 1, ids, T, 7, pieces);
    WITHIN(kl_rel_err_f32(whole, want, (size_t)(T * c.vocab_size)), kl_tol_model_bf16.forward, "bf16 latents");
    /* a latent near a rounding boundary may fall either way: a few bf16 ulps of a few numbers */
    WITHIN(kl_rel_err_f32(pieces, whole, (size_t)(T * c.vocab_size)), kl_tol_model_bf16.forward / 4, "pieces");
    kl_cache_destroy(cache);
    free(want);
    free(whole);
    free(pieces);
    free(ids);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

static void packed_sequences_do_not_see_each_other(void **state)
{
    (void)state;
    static const int64_t cu[] = {0, 0, 1, 34, 34, 99, 131};
    enum { N = 6, T = 131 };
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        kl_model *m = random_model(ctx, &c, 13);
        int32_t *ids = random_ids(8, T, c.vocab_size);
        float *packed = all_logits(m, N, cu, ids);
        float *last = floats((size_t)(N * c.vocab_size));
        assert_ok(kl_model_forward(m, &(kl_batch){.N = N, .cu = cu, .ids = ids}, NULL, &(kl_outputs){.logits = last, .last_only = true}));
        for (int n = 0; n < N; n++) {
            int64_t alone_cu[] = {0, cu[n + 1] - cu[n]};
            size_t count = (size_t)(alone_cu[1] * c.vocab_size);
            float *alone = all_logits(m, 1, alone_cu, ids + cu[n]);
            WITHIN(kl_rel_err_f32(packed + cu[n] * c.vocab_size, alone, count), SAME_LIMIT, VARIANTS[v][0]);
            if (alone_cu[1])
                WITHIN(kl_rel_err_f32(last + n * c.vocab_size, alone + count - c.vocab_size, (size_t)c.vocab_size), SAME_LIMIT, "last token");
            else
                assert_true(isnan(last[n * c.vocab_size])); /* left alone */
            free(alone);
        }
        /* another neighbour, the same bits */
        for (int64_t t = cu[4]; t < cu[5]; t++)
            ids[t] = (ids[t] + 1) % (int32_t)c.vocab_size;
        float *changed = all_logits(m, N, cu, ids);
        WITHIN(kl_rel_err_f32(changed, packed, (size_t)(cu[4] * c.vocab_size)), SAME_LIMIT, "before the changed sequence");
        WITHIN(kl_rel_err_f32(changed + cu[5] * c.vocab_size, packed + cu[5] * c.vocab_size, (size_t)((T - cu[5]) * c.vocab_size)), SAME_LIMIT,
               "after the changed sequence");
        assert_true(kl_rel_err_f32(changed + cu[4] * c.vocab_size, packed + cu[4] * c.vocab_size, (size_t)((cu[5] - cu[4]) * c.vocab_size)) > 1e-2);
        free(changed);
        free(packed);
        free(last);
        free(ids);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

static void later_tokens_leave_earlier_logits_alone(void **state)
{
    (void)state;
    enum { T = 90 };
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 14);
    int32_t *ids = random_ids(9, T, c.vocab_size);
    int64_t cu[] = {0, T};
    float *a = all_logits(m, 1, cu, ids);
    ids[70] = (ids[70] + 1) % (int32_t)c.vocab_size;
    float *b = all_logits(m, 1, cu, ids);
    WITHIN(kl_rel_err_f32(b, a, (size_t)(70 * c.vocab_size)), SAME_LIMIT, "before the changed token");
    for (int64_t t = 70; t < T; t++)
        assert_true(kl_rel_err_f32(b + t * c.vocab_size, a + t * c.vocab_size, (size_t)c.vocab_size) > 1e-5);
    free(a);
    free(b);
    free(ids);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

/* Nothing is read that was not written in the same call: workspace and unused cache rows hold NaN. */
static void poisoned_memory_changes_nothing(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    for (int v = 0; v < VARIANT_COUNT; v++) {
        kl_config c = variant_config(v);
        kl_model *m = random_model(ctx, &c, 15);
        int32_t *ids = random_ids(9, 75, c.vocab_size);
        int64_t cu[] = {0, 33, 33, 34, 75};
        float *want = all_logits(m, 4, cu, ids), *cached = floats((size_t)(75 * c.vocab_size));
        memset(m->workspace, 0xff, m->workspace_bytes);
        float *got = all_logits(m, 4, cu, ids);
        assert_memory_equal(got, want, (size_t)(75 * c.vocab_size) * sizeof *got);
        kl_cache *cache;
        assert_ok(kl_cache_create(&cache, &c, 4, 60));
        for (int64_t l = 0; l < c.num_layers; l++)
            if (cache->latent[l])
                memset(cache->latent[l], 0xff, (size_t)(4 * 60 * (c.kv_lora_rank + c.qk_rope_head_dim)) * sizeof(float));
        memset(m->workspace, 0xff, m->workspace_bytes);
        assert_ok(kl_model_forward(m, &(kl_batch){.N = 4, .cu = cu, .ids = ids}, cache, &(kl_outputs){.logits = cached}));
        WITHIN(kl_rel_err_f32(cached, want, (size_t)(75 * c.vocab_size)), SAME_LIMIT, VARIANTS[v][0]);
        kl_cache_destroy(cache);

        kl_weights grads[2];
        double loss[2];
        int32_t *targets = random_ids(10, 75, c.vocab_size);
        for (int i = 0; i < 2; i++) {
            assert_ok(kl_weights_zeros(&grads[i], &c));
            assert_ok(kl_model_loss(m, &(kl_batch){.N = 4, .cu = cu, .ids = ids}, targets, &loss[i], NULL, &grads[i], 1.0f));
            memset(m->workspace, 0xff, m->workspace_bytes);
        }
        assert_true(loss[0] == loss[1]);
        assert_memory_equal(grads[0].owned, grads[1].owned, grads[0].owned_bytes);
        kl_weights_free(&grads[0]);
        kl_weights_free(&grads[1]);
        free(want);
        free(got);
        free(cached);
        free(ids);
        free(targets);
        kl_model_close(m);
    }
    kl_ctx_destroy(ctx);
}

/* A token more each step, but no allocation each step. */
static void decoding_seldom_allocates(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *m = random_model(ctx, &c, 16);
    kl_cache *cache;
    assert_ok(kl_cache_create(&cache, &c, 1, 500));
    float *logits = floats((size_t)c.vocab_size);
    int64_t cu[] = {0, 1};
    int32_t id = 3;
    int grown = 0;
    for (size_t bytes = 0, i = 0; i < 500; i++) {
        assert_ok(kl_model_forward(m, &(kl_batch){.N = 1, .cu = cu, .ids = &id}, cache, &(kl_outputs){.logits = logits, .last_only = true}));
        grown += m->workspace_bytes != bytes;
        bytes = m->workspace_bytes;
    }
    assert_true(grown >= 1 && grown <= 20); /* each time by an eighth at least */
    size_t kept = m->workspace_bytes;
    kl_model_trim(m, kept);
    assert_int_equal(m->workspace_bytes, kept);
    kl_model_trim(m, kept - 1);
    assert_int_equal(m->workspace_bytes, 0);
    free(logits);
    kl_cache_destroy(cache);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

/* ---- what is refused ---- */

static void bad_arguments_are_named(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = small_config((const char *[]){"layers=4", "max_length=30", NULL});
    kl_model *m = random_model(ctx, &c, 31);
    kl_cache *cache;
    assert_ok(kl_cache_create(&cache, &c, 2, 20));
    int32_t *ids = random_ids(1, 40, c.vocab_size);
    float *logits = floats((size_t)(40 * c.vocab_size));
    feed(m, cache, 0, ids, 15, 15, logits);
    void *before = malloc(cache->bytes);
    memcpy(before, cache->memory, cache->bytes);
    kl_outputs out = {.logits = logits, .last_only = true};

    int64_t six[] = {0, 6}, falling[] = {0, 4, 2}, offset[] = {1, 3}, pair[] = {0, 1, 2}, triple[] = {0, 1, 2, 3}, long_one[] = {0, 31};
    int64_t slot2 = 2, same[] = {1, 1};
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = six, .ids = ids}, cache, &out), KL_EINVAL, "capacity of 20");
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = long_one, .ids = ids}, NULL, &out), KL_EINVAL, "model_max_length = 30");
    expect_error(kl_model_forward(m, &(kl_batch){.N = 2, .cu = falling, .ids = ids}, cache, &out), KL_EINVAL, "cu[2]");
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = offset, .ids = ids}, cache, &out), KL_EINVAL, "cu[0]");
    expect_error(kl_model_forward(m, &(kl_batch){.N = 3, .cu = triple, .ids = ids}, cache, &out), KL_EINVAL, "2 slots");
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids, .slot = &slot2}, cache, &out), KL_EINVAL, "slot[0]");
    expect_error(kl_model_forward(m, &(kl_batch){.N = 2, .cu = pair, .ids = ids, .slot = same}, cache, &out), KL_EINVAL, "distinct");
    expect_error(kl_model_forward(m, &(kl_batch){.N = -1, .cu = pair, .ids = ids}, cache, &out), KL_EINVAL, "batch.N");
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair}, cache, &out), KL_EINVAL, "batch.ids");
    ids[0] = 512;
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, cache, &out), KL_EINVAL, "ids[0]");
    ids[0] = -1;
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, cache, &out), KL_EINVAL, "got -1");
    ids[0] = 0;
    kl_config other = small_config((const char *[]){"layers=4", "hybrid=1:1", NULL});
    kl_cache *alien;
    assert_ok(kl_cache_create(&alien, &other, 1, 20));
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, alien, &out), KL_EINVAL, "layer 1");
    kl_cache_destroy(alien);

    assert_int_equal(cache->length[0], 15);
    assert_memory_equal(cache->memory, before, cache->bytes);
    m->kda_variant = "no such variant";
    expect_error(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, NULL, &out), KL_EUNSUPPORTED, "no such variant");
    m->kda_variant = NULL;
    assert_ok(kl_model_forward(m, &(kl_batch){.N = 1, .cu = pair, .ids = ids}, cache, &out));
    kl_model *none = m;
    expect_error(kl_model_open(&none, ctx, "tests/golden/models/absent"), KL_EIO, "absent");
    assert_null(none);
    free(before);
    free(ids);
    free(logits);
    kl_cache_destroy(cache);
    kl_model_close(m);
    kl_ctx_destroy(ctx);
}

/* Same configuration, other weights: their caches must not meet, neither directly nor through a file. */
static void caches_of_other_weights_are_refused(void **state)
{
    (void)state;
    kl_ctx *ctx = make_ctx(1);
    kl_config c = variant_config(0);
    kl_model *a = random_model(ctx, &c, 1), *b = random_model(ctx, &c, 2), *again = random_model(ctx, &c, 1);
    kl_cache *cache[3];
    int32_t ids[] = {1, 2, 3, 4};
    int64_t cu[] = {0, 4};
    kl_batch batch = {.N = 1, .cu = cu, .ids = ids};
    for (int i = 0; i < 3; i++)
        assert_ok(kl_cache_create(&cache[i], &c, 1, 20));
    assert_ok(kl_model_forward(a, &batch, cache[0], NULL));
    assert_ok(kl_model_forward(again, &batch, cache[0], NULL));
    expect_error(kl_model_forward(b, &batch, cache[0], NULL), KL_EINVAL, "cache");
    assert_int_equal(cache[0]->length[0], 8);
    char dir[256], path[300];
    make_folder(dir, sizeof dir);
    snprintf(path, sizeof path, "%s/cache", dir);
    assert_ok(kl_cache_save(cache[0], 0, path));
    assert_ok(kl_model_forward(b, &batch, cache[1], NULL));
    expect_error(kl_cache_load(cache[1], 0, path), KL_EFORMAT, "another model");
    assert_int_equal(cache[1]->length[0], 4);
    assert_ok(kl_cache_load(cache[2], 0, path));
    expect_error(kl_model_forward(b, &batch, cache[2], NULL), KL_EINVAL, "cache");
    assert_ok(kl_model_forward(a, &batch, cache[2], NULL));
    remove_folder(dir);
    for (int i = 0; i < 3; i++)
        kl_cache_destroy(cache[i]);
    kl_model_close(a);
    kl_model_close(b);
    kl_model_close(again);
    kl_ctx_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chunked_prefill_equals_one_pass),
        cmocka_unit_test(bf16_latents_do_not_depend_on_chunks),
        cmocka_unit_test(packed_sequences_do_not_see_each_other),
        cmocka_unit_test(later_tokens_leave_earlier_logits_alone),
        cmocka_unit_test(poisoned_memory_changes_nothing),
        cmocka_unit_test(decoding_seldom_allocates),
        cmocka_unit_test(bad_arguments_are_named),
        cmocka_unit_test(caches_of_other_weights_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
