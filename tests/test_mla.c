/* MLA: recurrent = chunk = reference, gradients, whatever the cut, the threads and the neighbours. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "tests/mla_case.h"

static void same_bits(const char *what, const float *x, const float *y, size_t n)
{
    if (memcmp(x, y, n * sizeof(float)) != 0)
        fail_msg("%s: the bits differ", what);
}

static shape random_shape(kl_rng *r)
{
    static const kl_dtype types[] = {KL_F32, KL_BF16, KL_F16};
    shape s = {.N = 1 + (int64_t)kl_rng_below(r, 4), .H = 1 + (int64_t)kl_rng_below(r, 5), .R = 1 + (int64_t)kl_rng_below(r, 70),
               .Dn = 1 + (int64_t)kl_rng_below(r, 40), .Dr = (int64_t)kl_rng_below(r, 20), .Dv = 1 + (int64_t)kl_rng_below(r, 40),
               .latent = types[kl_rng_below(r, 2)], .weight = types[kl_rng_below(r, 3)], .size = 1.0f, .stride = (int64_t)kl_rng_below(r, 2) * 5};
    for (int64_t n = 0; n < s.N; n++) {
        s.keys[n] = (int64_t)kl_rng_below(r, 160);
        s.queries[n] = (int64_t)kl_rng_below(r, 4) == 0 ? s.keys[n] : (int64_t)kl_rng_below(r, (uint64_t)(s.keys[n] < 8 ? s.keys[n] + 1 : 8));
    }
    return s;
}

static void random_problems(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    for (uint64_t i = 0; i < 40; i++) {
        kl_rng r = kl_rng_make(seed + i, 1);
        shape s = random_shape(&r);
        check_all(&s, seed + i, 1.0);
    }
}

/* Sizes that the tiles of the AMX path take: one and several groups of rows, whole and broken blocks, several pieces. */
static void tile_sizes(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    static const shape shapes[] = {
        {.N = 2, .H = 32, .R = 64, .Dn = 16, .Dr = 32, .Dv = 16, .queries = {1, 3}, .keys = {700, 131}, .size = 1.0f},
        {.N = 3, .H = 5, .R = 96, .Dn = 16, .Dr = 0, .Dv = 16, .queries = {8, 1, 2}, .keys = {40, 1, 600}, .size = 1.0f},
        {.N = 1, .H = 48, .R = 32, .Dn = 8, .Dr = 64, .Dv = 8, .queries = {2}, .keys = {300}, .size = 1.0f},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int type = 0; type < 2; type++) {
            shape s = shapes[i];
            s.latent = type ? KL_BF16 : KL_F32;
            check_all(&s, seed + i, 1.0);
        }
}

/* Logits near 1e4: exponents stay <= 0, and the softmax is one-hot. The keys are drawn apart so that float sees the same maximum. */
static void huge_logits(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    for (int sizes = 0; sizes < 2; sizes++) {
        shape s = {.N = 1, .H = 3, .R = sizes ? 64 : 17, .Dn = 12, .Dr = sizes ? 32 : 5, .Dv = 9, .queries = {20}, .keys = {300}, .size = 1.0f};
        problem x = make(&s, seed);
        bind(&x);
        int64_t width = s.R + s.Dr, head = s.Dn + s.Dr;
        /* Key j's first shared entry is a step of its own; only that entry of q is large: logits of either sign up to 1e4, 60 apart. */
        for (int64_t j = 0; j < s.keys[0]; j++)
            x.latent[(x.kv_start[0] + j) * width + s.R] = (float)((j * 7919) % 300 - 150) / 150.0f;
        for (int64_t t = 0; t < x.tokens * s.H; t++)
            x.q[t * head + s.Dn] = (t % 2 ? 1e4f : -1e4f) * sqrtf((float)head);
        kl_from_f32(x.latent_stored, KL_F32, x.latent, latent_size(&x));
        answer a = reference(&x, true);
        int count;
        const kl_variant *v = cpu_variants(&count);
        for (int i = 0; i < count; i++) {
            forward(&v[i], &x, 2);
            check_forward(&v[i], &x, &a, seed, kl_tol_mla_f32.forward);
            if (v[i].backward) { /* ds is the difference of equal numbers: all that can be asked is that it stays finite and dW right */
                backward(&v[i], &x, 2);
                near("dkv_b", v[i].name, seed, kl_rel_err(x.dkv_b, a.dkv_b, weight_size(&x)), kl_tol_mla_f32.gradient);
            }
        }
        forget(&a);
        drop(&x);
    }
}

/* A prompt in one piece, and the same in pieces of 1, 7, 64 ... tokens against the growing cache. */
static void split_anywhere(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    shape s = {.N = 1, .H = 4, .R = 64, .Dn = 24, .Dr = 32, .Dv = 20, .queries = {200}, .keys = {230}, .latent = KL_BF16, .size = 1.0f};
    problem x = make(&s, seed);
    bind(&x);
    answer a = reference(&x, false);
    static const int64_t cuts[] = {1, 8, 15, 79, 80, 143, 200};
    int count;
    const kl_variant *v = cpu_variants(&count);
    for (int i = 0; i < count; i++) {
        poison(x.o, out_size(&x));
        poison(x.lse, (size_t)(x.tokens * s.H));
        for (size_t c = 0, from = 0; c < sizeof cuts / sizeof *cuts; from = (size_t)cuts[c++]) {
            problem part = x;
            bind(&part);
            part.cu_q[0] = (int64_t)from; /* rows of q, o and lse are found by cu_q */
            part.cu_q[1] = cuts[c];
            part.kv_len[0] = s.keys[0] - s.queries[0] + cuts[c];
            assert_false(kl_failed(run(&v[i], &part, KL_FORWARD, 2)));
        }
        check_forward(&v[i], &x, &a, seed, kl_tol_mla_f32.forward);
    }
    forget(&a);
    drop(&x);
}

/* 1, 2 and 3 threads: the same bits. */
static void same_for_any_threads(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    static const shape shapes[] = {
        {.N = 3, .H = 3, .R = 40, .Dn = 24, .Dr = 9, .Dv = 20, .queries = {300, 1, 5}, .keys = {300, 700, 90}, .weight = KL_BF16, .size = 1.0f},
        {.N = 2, .H = 20, .R = 64, .Dn = 24, .Dr = 32, .Dv = 20, .queries = {5, 1}, .keys = {300, 700}, .latent = KL_BF16, .size = 1.0f},
    };
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        problem x = make(&shapes[k], seed), y = make(&shapes[k], seed);
        bind(&x);
        bind(&y);
        int count;
        const kl_variant *v = cpu_variants(&count);
        for (int i = 0; i < count; i++) {
            forward(&v[i], &x, 1);
            for (int threads = 2; threads <= 3; threads++) {
                forward(&v[i], &y, threads);
                same_bits("o", x.o, y.o, out_size(&x));
                same_bits("lse", x.lse, y.lse, (size_t)(x.tokens * x.p.H));
            }
            if (!v[i].backward)
                continue;
            backward(&v[i], &x, 1);
            for (int threads = 2; threads <= 3; threads++) {
                backward(&v[i], &y, threads);
                same_bits("dq", x.dq, y.dq, q_size(&x));
                same_bits("dlatent", x.dlatent, y.dlatent, latent_size(&x));
                same_bits("dkv_b", x.dkv_b, y.dkv_b, weight_size(&x));
            }
        }
        drop(&x);
        drop(&y);
    }
}

/* A sequence alone and among others of other lengths gets the same bits, under dispatch too. */
static void neighbours_do_not_matter(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    shape s = {.N = 5, .H = 4, .R = 32, .Dn = 12, .Dr = 32, .Dv = 16, .queries = {130, 1, 0, 3, 90}, .keys = {130, 600, 4, 333, 90}, .size = 1.0f};
    problem x = make(&s, seed);
    bind(&x);
    float *alone = poisoned(out_size(&x)), *lse = poisoned((size_t)(x.tokens * s.H)), *dq = poisoned(q_size(&x)), *dlatent = poisoned(latent_size(&x));
    int count;
    const kl_variant *table = cpu_variants(&count);
    for (int i = 0; i <= count; i++) {
        const kl_variant *v = i < count ? &table[i] : mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD);
        if (i == count)
            assert_string_equal(v->name, "mixed"); /* this batch has sequences for either */
        forward(v, &x, 2);
        for (int64_t n = 0; n < s.N; n++) {
            problem one = x;
            bind(&one);
            one.p.N = 1;
            one.p.cu_q += n, one.p.kv_start += n, one.p.kv_len += n;
            one.p.o = alone, one.p.lse = lse;
            const kl_variant *w = i < count ? v : mla_pick(KL_CPU, NULL, &one.p, KL_FORWARD);
            assert_false(kl_failed(run(w, &one, KL_FORWARD, 2)));
        }
        same_bits("o", alone, x.o, out_size(&x));
        same_bits("lse", lse, x.lse, (size_t)(x.tokens * s.H));
        if (i < count && v->backward) {
            backward(v, &x, 2);
            for (int64_t n = 0; n < s.N; n++) {
                problem one = x;
                bind(&one);
                one.p.N = 1;
                one.p.cu_q += n, one.p.kv_start += n, one.p.kv_len += n;
                one.g.dq = dq, one.g.dlatent = dlatent, one.g.dkv_b = NULL;
                assert_false(kl_failed(run(v, &one, KL_BACKWARD, 2)));
            }
            same_bits("dq", dq, x.dq, q_size(&x));
            same_bits("dlatent", dlatent, x.dlatent, latent_size(&x));
        }
    }
    free(alone);
    free(lse);
    free(dq);
    free(dlatent);
    drop(&x);
}

/* Any subset of the gradients is what it is among all of them; dkv_b is added to. */
static void subsets_of_gradients(void **state)
{
    (void)state;
    shape s = {.N = 2, .H = 3, .R = 20, .Dn = 8, .Dr = 4, .Dv = 12, .queries = {40, 5}, .keys = {60, 30}, .weight = KL_F16, .size = 1.0f};
    problem x = make(&s, 5), y = make(&s, 5);
    bind(&x);
    bind(&y);
    const kl_variant *v = mla_pick(KL_CPU, NULL, &x.p, KL_BACKWARD);
    backward(v, &x, 2);
    y.p.o = NULL, y.p.lse = NULL; /* not read, not needed */
    for (int wanted = 0; wanted < 8; wanted++) {
        poison(y.dq, q_size(&y));
        poison(y.dlatent, latent_size(&y));
        for (size_t i = 0; i < weight_size(&y); i++)
            y.dkv_b[i] = 0.0f;
        y.g = (mla_grads){.d_o = y.d_o, .dq = wanted & 1 ? y.dq : NULL, .dlatent = wanted & 2 ? y.dlatent : NULL, .dkv_b = wanted & 4 ? y.dkv_b : NULL};
        assert_false(kl_failed(run(v, &y, KL_BACKWARD, 2)));
        if (wanted & 1)
            same_bits("dq", x.dq, y.dq, q_size(&x));
        if (wanted & 2)
            same_bits("dlatent", x.dlatent, y.dlatent, latent_size(&x));
        if (wanted & 4)
            same_bits("dkv_b", x.dkv_b, y.dkv_b, weight_size(&x));
    }
    y.g = (mla_grads){.d_o = y.d_o, .dkv_b = y.dkv_b};
    assert_false(kl_failed(run(v, &y, KL_BACKWARD, 2)));
    for (size_t i = 0; i < weight_size(&y); i++)
        assert_true(fabsf(y.dkv_b[i] - 2.0f * x.dkv_b[i]) <= 1e-5f * (1.0f + fabsf(x.dkv_b[i])));
    drop(&x);
    drop(&y);
}

/* Given what the forward pass wrote, the gradients are those that are found without. */
static void given_what_the_forward_pass_wrote(void **state)
{
    (void)state;
    shape s = {.N = 2, .H = 3, .R = 20, .Dn = 8, .Dr = 4, .Dv = 13, .queries = {40, 5}, .keys = {60, 30}, .size = 1.0f};
    problem x = make(&s, 5);
    bind(&x);
    const kl_variant *v = mla_pick(KL_CPU, NULL, &x.p, KL_BACKWARD);
    answer a = reference(&x, true);
    forward(mla_pick(KL_CPU, NULL, &x.p, KL_FORWARD), &x, 2);
    x.g.o = x.o, x.g.lse = x.lse;
    backward(v, &x, 2);
    check_backward(v, &x, &a, 5, kl_tol_mla_f32.gradient);
    forget(&a);
    drop(&x);
}

/* More expanded rows than the budget holds: heads in several groups, one head in several stretches of keys. The reference
 * takes the last five queries alone: they see what they see among all. */
static void long_sequences(void **state)
{
    (void)state;
    uint64_t seed = first_seed();
    shape groups = {.N = 1, .H = 2, .R = 8, .Dn = 300, .Dr = 8, .Dv = 2000, .queries = {6}, .keys = {4000}, .size = 1.0f};
    shape stretches = {.N = 1, .H = 1, .R = 8, .Dn = 10, .Dr = 0, .Dv = 3000, .queries = {130}, .keys = {6000}, .size = 1.0f};
    const shape *shapes[] = {&groups, &stretches};
    const kl_variant *v = mla_pick(KL_CPU, "chunk", NULL, KL_FORWARD);
    kl_ctx *ctx = context(2);
    for (int i = 0; i < 2; i++) {
        problem x = make(shapes[i], seed), last = x;
        bind(&x);
        bind(&last);
        assert_true(v->workspace(ctx, &x.p, KL_FORWARD) < (size_t)80 << 20);
        last.cu_q[0] = x.tokens - 5;
        answer a = reference(&last, false);
        forward(v, &x, 2);
        size_t skip = (size_t)((x.tokens - 5) * x.p.H), Dv = (size_t)x.p.Dv;
        for (size_t t = 0; t < out_size(&x); t++)
            assert_true(isfinite(x.o[t]));
        near("o", v->name, seed, kl_rel_err_blocks(x.o + skip * Dv, a.o + skip * Dv, 5, (size_t)x.p.H, Dv, 1), kl_tol_mla_f32.forward);
        near("lse", v->name, seed, kl_rel_err(x.lse + skip, a.lse + skip, 5 * (size_t)x.p.H), kl_tol_mla_f32.forward);
        forget(&a);
        drop(&x);
    }
    kl_ctx_destroy(ctx);
}

/* Latent rows beyond 2^31 elements: a cache of 10 GB of which only the last pages exist. */
static void beyond_two_to_the_31(void **state)
{
    (void)state;
    shape s = {.N = 1, .H = 2, .R = 64, .Dn = 8, .Dr = 32, .Dv = 8, .queries = {3}, .keys = {200}, .size = 1.0f};
    problem x = make(&s, 9);
    bind(&x);
    int count;
    const kl_variant *v = cpu_variants(&count);
    size_t width = (size_t)(s.R + s.Dr), rows = ((size_t)1 << 31) / width + 5000, bytes = rows * width * sizeof(float);
    float *cache = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cache == MAP_FAILED) {
        drop(&x);
        skip();
    }
    float *o = poisoned(out_size(&x));
    for (int i = 0; i < count; i++) {
        forward(&v[i], &x, 2);
        memcpy(o, x.o, out_size(&x) * sizeof(float));
        problem far = x;
        bind(&far);
        far.kv_start[0] = (int64_t)rows - s.keys[0];
        memcpy(cache + (size_t)far.kv_start[0] * width, x.latent + (size_t)x.kv_start[0] * width, (size_t)s.keys[0] * width * sizeof(float));
        far.p.latent = cache;
        far.p.latent_rows = (int64_t)rows;
        forward(&v[i], &far, 2);
        same_bits("o", o, far.o, out_size(&x));
    }
    free(o);
    munmap(cache, bytes);
    drop(&x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_problems),
        cmocka_unit_test(tile_sizes),
        cmocka_unit_test(huge_logits),
        cmocka_unit_test(split_anywhere),
        cmocka_unit_test(same_for_any_threads),
        cmocka_unit_test(neighbours_do_not_matter),
        cmocka_unit_test(subsets_of_gradients),
        cmocka_unit_test(given_what_the_forward_pass_wrote),
        cmocka_unit_test(long_sequences),
        cmocka_unit_test(beyond_two_to_the_31),
    };
    return cmocka_run_group_tests_name("mla", tests, NULL, NULL);
}
