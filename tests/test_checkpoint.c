/* The bundled checkpoint: small, a 3:1 hybrid, better than chance on text it never saw, and a writer of real words. */
#define _GNU_SOURCE
#include "tests/model_support.h"

#include <ctype.h>
#include <sys/stat.h>

#include "harness/file.h"
#include "harness/generate.h"
#include "harness/tokenizer.h"

#define DIR "experiments/checkpoint/model"
#define TEXT "experiments/checkpoint/text/sample.txt"

typedef struct setup {
    kl_ctx *ctx;
    kl_model *m;
    kl_tokenizer *t;
    char *text; /* held out */
    size_t length;
    int32_t *ids;
    int64_t count;
} setup;

static setup open_setup(void)
{
    setup s = {.ctx = make_ctx(2)};
    assert_ok(kl_model_open(&s.m, s.ctx, DIR));
    assert_ok(kl_tokenizer_open(&s.t, DIR));
    assert_ok(kl_file_read(TEXT, 1 << 20, &s.text, &s.length));
    assert_ok(kl_tokenizer_encode(s.t, s.text, s.length, false, &s.ids, &s.count));
    return s;
}

static void close_setup(setup *s)
{
    free(s->ids);
    free(s->text);
    kl_tokenizer_close(s->t);
    kl_model_close(s->m);
    kl_ctx_destroy(s->ctx);
}

static void is_small_and_three_to_one(void **state)
{
    (void)state;
    off_t bytes = 0;
    const char *const files[] = {DIR "/config.json", DIR "/model.safetensors", DIR "/tiktoken.model"};
    for (int i = 0; i < 3; i++) {
        struct stat st;
        assert_int_equal(stat(files[i], &st), 0);
        bytes += st.st_size;
    }
    assert_true(bytes <= 4000000);
    setup s = open_setup();
    const kl_config *c = &s.m->config;
    int64_t kda = 0;
    for (int64_t l = 0; l < c->num_layers; l++)
        kda += c->mixer[l] == KL_MIX_KDA;
    assert_int_equal(kda, 3 * (c->num_layers - kda));
    assert_true(c->num_experts > c->top_k && c->mla_use_nope);
    assert_int_equal(kl_tokenizer_size(s.t), c->vocab_size);
    close_setup(&s);
}

/* Equal guesses cost ln 2048 = 7.6 nats a token; counting tokens alone still costs about 6. */
static void predicts_text_it_never_saw(void **state)
{
    (void)state;
    setup s = open_setup();
    enum { N = 8, T = 256 };
    int64_t cu[N + 1];
    assert_true(s.count > N * T);
    for (int n = 0; n <= N; n++)
        cu[n] = n * T;
    int32_t targets[N * T];
    for (int i = 0; i < N * T; i++)
        targets[i] = (i + 1) % T ? s.ids[i + 1] : -1;
    double loss;
    int64_t counted;
    assert_ok(kl_model_loss(s.m, &(kl_batch){.N = N, .cu = cu, .ids = s.ids}, targets, &loss, &counted, NULL, 1.0f));
    assert_int_equal(counted, N * (T - 1));
    print_message("%.3f nats a token on held-out text\n", loss);
    assert_true(loss < 3.9);
    close_setup(&s);
}

/* Does the text hold this word, between anything but letters? */
static bool holds_word(const char *text, const char *word, size_t length)
{
    for (const char *p = text; (p = strcasestr(p, word)); p++)
        if ((p == text || !isalpha((unsigned char)p[-1])) && !isalpha((unsigned char)p[length]))
            return true;
    return false;
}

static void writes_real_words(void **state)
{
    (void)state;
    setup s = open_setup();
    enum { NEW = 300, PROMPT = 100 };
    kl_cache *cache;
    assert_ok(kl_cache_create(&cache, &s.m->config, 1, NEW + PROMPT));
    int32_t fresh[NEW];
    int64_t lengths[] = {PROMPT}, count;
    kl_generation o = {.max_new = NEW, .sampling = {.temperature = 0.7f, .top_p = 0.95f, .repetition_penalty = 1.0f, .seed = 1}};
    assert_ok(kl_generate(s.m, cache, 1, (const int32_t *const[]){s.ids}, lengths, &o, (int32_t *const[]){fresh}, &count, NULL));
    char *said;
    size_t length;
    assert_ok(kl_tokenizer_decode(s.t, fresh, count, &said, &length));

    int words = 0, real = 0;
    for (char *p = said; *p;) {
        size_t n = 0;
        while (isalpha((unsigned char)p[n]))
            n++;
        if (n == 0) {
            p++;
            continue;
        }
        char word[64];
        snprintf(word, sizeof word, "%.*s", (int)n, p);
        words++;
        real += holds_word(s.text, word, strlen(word));
        p += n;
    }
    print_message("%d of %d words are in the held-out text\n", real, words);
    assert_true(words > 100);
    assert_true(real >= 0.9 * words);
    free(said);
    kl_cache_destroy(cache);
    close_setup(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(is_small_and_three_to_one),
        cmocka_unit_test(predicts_text_it_never_saw),
        cmocka_unit_test(writes_real_words),
    };
    return cmocka_run_group_tests_name("checkpoint", tests, NULL, NULL);
}
