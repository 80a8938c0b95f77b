/* The cache: exact sizes, forks, kept marks, files and what is wrong with them. */
#include "tests/model_support.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>

static void fill_bytes(kl_rng *r, char *at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        at[i] = (char)kl_rng_below(r, 256);
}

/* A slot whose every byte is random, as if `length` tokens had been written. */
static void fill_slot(kl_cache *cache, int64_t slot, int64_t length, uint64_t seed)
{
    const kl_config *c = &cache->config;
    kl_rng r = kl_rng_make(seed, 1);
    size_t state = (size_t)(c->kda_heads * c->kda_head_dim * c->kda_head_dim);
    size_t tail = (size_t)(c->kda_heads * c->kda_head_dim * (c->conv_width > 1 ? c->conv_width - 1 : 0)) * kl_dtype_size(cache->tail_dtype);
    size_t row = (size_t)(c->kv_lora_rank + c->qk_rope_head_dim) * kl_dtype_size(cache->latent_dtype);
    for (int64_t l = 0; l < c->num_layers; l++) {
        if (cache->kda_state[l])
            kl_fill_normal(&r, cache->kda_state[l] + (size_t)slot * state, state, 0, 1);
        for (int which = 0; which < 3 && cache->conv_tail[l]; which++)
            fill_bytes(&r, (char *)cache->conv_tail[l] + ((size_t)which * (size_t)cache->slots + (size_t)slot) * tail, tail);
        if (cache->latent[l])
            fill_bytes(&r, (char *)cache->latent[l] + (size_t)(slot * cache->capacity) * row, (size_t)length * row);
    }
    cache->length[slot] = 0;
    kl_cache_advance(cache, slot, length);
}

static void *copy_of(const kl_cache *cache)
{
    void *copy = malloc(cache->bytes);
    assert_non_null(copy);
    memcpy(copy, cache->memory, cache->bytes);
    return copy;
}

/* The content of a slot as the file has it, without the header that says whose it is. */
static char *slot_bytes(const kl_cache *cache, int64_t slot, size_t *size)
{
    char dir[256], path[300];
    make_folder(dir, sizeof dir);
    snprintf(path, sizeof path, "%s/slot", dir);
    assert_ok(kl_cache_save(cache, slot, path));
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    *size = (size_t)ftell(f);
    rewind(f);
    char *bytes = malloc(*size);
    assert_int_equal(fread(bytes, 1, *size, f), *size);
    fclose(f);
    remove_folder(dir);
    return bytes;
}

static void assert_same_slot(const kl_cache *a, int64_t i, const kl_cache *b, int64_t j)
{
    size_t n, m;
    char *x = slot_bytes(a, i, &n), *y = slot_bytes(b, j, &m);
    assert_int_equal(n, m);
    assert_memory_equal(x, y, n);
    free(x);
    free(y);
}

static void released_model_sizes_are_exact(void **state)
{
    (void)state;
    kl_config c;
    assert_ok(kl_config_preset(&c, "48b"));
    size_t states, tails, latents, all = kl_cache_bytes(&c, 1048576, &states, &tails, &latents);
    assert_int_equal(all, states + tails + latents);
    assert_int_equal(states, (size_t)20 * 32 * 128 * 128 * 4);
    assert_int_equal(tails, (size_t)20 * 3 * 4096 * 3 * 2);
    assert_int_equal(latents, (size_t)7 * 1048576 * 576 * 2);
    assert_int_equal(kl_cache_bytes(&c, 0, NULL, NULL, NULL), states + tails);
    /* a million tokens: 7.9 GB reserved, next to nothing used */
    kl_cache *cache;
    assert_ok(kl_cache_create(&cache, &c, 1, 1000000));
    assert_int_equal(cache->bytes, (size_t)41943040 + 1474560 + (size_t)8064 * 1000000);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    assert_true(usage.ru_maxrss < 512 * 1024);
    kl_cache_destroy(cache);
    /* the all-MLA model of the report's comparison: 27 layers */
    assert_ok(kl_config_set(&c, "hybrid=0:1"));
    assert_int_equal(kl_cache_bytes(&c, 4096, NULL, NULL, NULL), (size_t)27 * 4096 * 1152);
}

static void absurd_sizes_are_refused(void **state)
{
    (void)state;
    kl_config c;
    kl_cache *cache;
    assert_ok(kl_config_preset(&c, "48b"));
    assert_int_equal(kl_cache_bytes(&c, INT64_MAX / 2, NULL, NULL, NULL), SIZE_MAX);
    assert_int_equal(kl_cache_bytes(&c, -1, NULL, NULL, NULL), SIZE_MAX);
    expect_error(kl_cache_create(&cache, &c, 1, INT64_MAX / 2), KL_ENOMEM, "slots");
    assert_null(cache);
    expect_error(kl_cache_create(&cache, &c, INT64_MAX / 4, 1000), KL_ENOMEM, "slots");
    expect_error(kl_cache_create(&cache, &c, 0, 10), KL_EINVAL, "slots");
    expect_error(kl_cache_create(&cache, &c, 1, 0), KL_EINVAL, "capacity");
    expect_error(kl_cache_create(&cache, NULL, 1, 10), KL_EINVAL, "config");
    c.kda_heads = -1;
    expect_error(kl_cache_create(&cache, &c, 1, 10), KL_EINVAL, "num_heads");
}

static kl_cache *small_cache(const char *const *changes, int64_t slots, int64_t capacity)
{
    kl_config c = small_config(changes);
    kl_cache *cache;
    assert_ok(kl_cache_create(&cache, &c, slots, capacity));
    return cache;
}

static void parts_fill_the_block_exactly(void **state)
{
    (void)state;
    kl_cache *cache = small_cache(NULL, 3, 17);
    assert_int_equal(cache->bytes, 3 * kl_cache_bytes(&cache->config, 17, NULL, NULL, NULL));
    for (int64_t slot = 0; slot < 3; slot++) {
        memset(cache->memory, 0, cache->bytes);
        fill_slot(cache, slot, 17, 5);
        size_t zero = 0;
        for (size_t i = 0; i < cache->bytes; i += 4) {
            uint32_t word;
            memcpy(&word, (char *)cache->memory + i, 4);
            zero += word == 0;
        }
        assert_int_equal(zero, cache->bytes / 4 * 2 / 3); /* the two other slots */
    }
    kl_cache_destroy(cache);
}

static void fork_copies_and_reset_clears(void **state)
{
    (void)state;
    kl_cache *cache = small_cache(NULL, 3, 20);
    fill_slot(cache, 0, 12, 1);
    fill_slot(cache, 1, 20, 2);
    fill_slot(cache, 2, 5, 3);
    void *before = copy_of(cache);
    assert_ok(kl_cache_fork(cache, 0, 0));
    assert_memory_equal(cache->memory, before, cache->bytes);
    assert_ok(kl_cache_fork(cache, 0, 2));
    assert_int_equal(cache->length[2], 12);
    assert_same_slot(cache, 0, cache, 2);
    expect_error(kl_cache_fork(cache, 3, 0), KL_EINVAL, "from");
    expect_error(kl_cache_fork(cache, 0, -1), KL_EINVAL, "to");
    kl_cache *fresh = small_cache(NULL, 1, 20);
    kl_cache_reset(cache, 0);
    assert_same_slot(cache, 0, fresh, 0);
    assert_int_equal(cache->length[1], 20);
    free(before);
    kl_cache_destroy(fresh);
    kl_cache_destroy(cache);
}

static void rewinding_restores_what_was_kept(void **state)
{
    (void)state;
    kl_cache *cache = small_cache(NULL, 2, 40), *twin = small_cache(NULL, 2, 40);
    kl_cache_mark *mark, *later, *empty, *alien;
    assert_ok(kl_cache_keep(cache, 0, &empty));
    fill_slot(cache, 0, 10, 1);
    assert_ok(kl_cache_fork(cache, 0, 1)); /* what it must be again */
    assert_ok(kl_cache_keep(cache, 0, &mark));
    /* more tokens: other states, more latents */
    memset(cache->kda_state[0], 7, 64);
    kl_cache_advance(cache, 0, 15);
    assert_ok(kl_cache_keep(cache, 0, &later));
    assert_ok(kl_cache_rewind(cache, 0, mark));
    assert_int_equal(cache->length[0], 10);
    assert_same_slot(cache, 0, cache, 1);
    expect_error(kl_cache_rewind(cache, 0, later), KL_EINVAL, "10 tokens, got 25");
    kl_cache_advance(cache, 0, 20); /* other tokens where `later` had its own */
    expect_error(kl_cache_rewind(cache, 0, later), KL_EINVAL, "overwritten");
    assert_ok(kl_cache_rewind(cache, 0, mark)); /* as often as one likes */
    expect_error(kl_cache_rewind(cache, 1, mark), KL_EINVAL, "slot 1");
    fill_slot(twin, 0, 10, 1);
    assert_ok(kl_cache_keep(twin, 0, &alien));
    expect_error(kl_cache_rewind(cache, 0, alien), KL_EINVAL, "another");
    expect_error(kl_cache_rewind(cache, 0, NULL), KL_EINVAL, "mark");
    assert_ok(kl_cache_rewind(cache, 0, empty));
    assert_int_equal(cache->length[0], 0);
    kl_cache_reset(cache, 0);
    kl_cache_advance(cache, 0, 30);
    expect_error(kl_cache_rewind(cache, 0, mark), KL_EINVAL, "overwritten");
    kl_cache_mark_free(mark);
    kl_cache_mark_free(later);
    kl_cache_mark_free(empty);
    kl_cache_mark_free(alien);
    kl_cache_mark_free(NULL);
    kl_cache_destroy(cache);
    kl_cache_destroy(twin);
}

static void files_bring_a_slot_back(void **state)
{
    (void)state;
    static const char *const kinds[][3] = {{NULL}, {"hybrid=0:1"}, {"hybrid=n:0"}, {"conv=0"}, {"dtype=bfloat16"}};
    char dir[256], path[300];
    make_folder(dir, sizeof dir);
    snprintf(path, sizeof path, "%s/cache", dir);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        kl_cache *cache = small_cache(kinds[i], 2, 30), *other = small_cache(kinds[i], 3, 13);
        for (int64_t length = 0; length <= 13; length += 13) {
            fill_slot(cache, 1, length, 7);
            assert_ok(kl_cache_save(cache, 1, path));
            fill_slot(other, 2, 9, 8);
            fill_slot(other, 0, 9, 9);
            kl_cache_mark *mark;
            assert_ok(kl_cache_keep(other, 2, &mark));
            assert_ok(kl_cache_load(other, 2, path));
            assert_int_equal(other->length[2], length);
            assert_same_slot(cache, 1, other, 2);
            if (length)
                expect_error(kl_cache_rewind(other, 2, mark), KL_EINVAL, "overwritten");
            kl_cache_mark_free(mark);
        }
        kl_cache_destroy(cache);
        kl_cache_destroy(other);
    }
    remove_folder(dir);
}

static void refused_untouched(kl_cache *cache, const char *bytes, size_t size, const void *before, const char *text)
{
    kl_code want = KL_EFORMAT;
    expect_error(kl_cache_load_memory(cache, 0, bytes, size, "the file"), want, text);
    assert_memory_equal(cache->memory, before, cache->bytes);
    assert_int_equal(cache->length[0], 9);
}

static void damaged_files_are_refused(void **state)
{
    (void)state;
    kl_cache *cache = small_cache(NULL, 2, 12);
    fill_slot(cache, 0, 9, 1);
    fill_slot(cache, 1, 11, 2);
    void *before = copy_of(cache);
    size_t size;
    char *file = slot_bytes(cache, 1, &size), *bad = malloc(size + 8);
    memcpy(bad, file, size);
    for (size_t cut = 0; cut < size; cut += cut < 200 ? 1 : 997)
        refused_untouched(cache, bad, cut, before, "expected");
    memset(bad + size, 0, 8);
    refused_untouched(cache, bad, size + 1, before, "bytes in all");
    /* one flipped bit anywhere */
    for (size_t at = 0; at < size; at += at < 200 ? 1 : 1009) {
        memcpy(bad, file, size);
        bad[at] ^= (char)(1 << at % 8);
        refused_untouched(cache, bad, size, before, "the file");
    }
    memcpy(bad, file, size);
    bad[0] = 'X';
    refused_untouched(cache, bad, size, before, "KLCACHE");
    memcpy(bad, file, size);
    bad[8] = 9;
    refused_untouched(cache, bad, size, before, "version 9");
    /* two words exchanged: an additive checksum would not see it */
    memcpy(bad, file, size);
    memcpy(bad + size - 16, file + size - 8, 8);
    memcpy(bad + size - 8, file + size - 16, 8);
    refused_untouched(cache, bad, size, before, "checksum");

    kl_cache *shorter = small_cache(NULL, 1, 10), *rotated = small_cache((const char *[]){"rope=1", NULL}, 1, 12);
    kl_cache *half = small_cache((const char *[]){"dtype=bfloat16", NULL}, 1, 12), *deeper = small_cache((const char *[]){"layers=5", NULL}, 1, 12);
    expect_error(kl_cache_load_memory(shorter, 0, file, size, "f"), KL_EFORMAT, "at most 10 tokens");
    expect_error(kl_cache_load_memory(rotated, 0, file, size, "f"), KL_EFORMAT, "another");
    expect_error(kl_cache_load_memory(half, 0, file, size, "f"), KL_EFORMAT, "bfloat16");
    expect_error(kl_cache_load_memory(deeper, 0, file, size, "f"), KL_EFORMAT, "another");
    expect_error(kl_cache_load_memory(cache, 2, file, size, "f"), KL_EINVAL, "slot");
    kl_cache_destroy(shorter);
    kl_cache_destroy(rotated);
    kl_cache_destroy(half);
    kl_cache_destroy(deeper);
    free(file);
    free(bad);
    free(before);
    kl_cache_destroy(cache);
}

static void file_errors_are_named(void **state)
{
    (void)state;
    char dir[256], path[300], nested[400];
    make_folder(dir, sizeof dir);
    snprintf(path, sizeof path, "%s/cache", dir);
    snprintf(nested, sizeof nested, "%s/absent/cache", dir);
    kl_cache *cache = small_cache(NULL, 1, 12);
    fill_slot(cache, 0, 9, 1);
    expect_error(kl_cache_load(cache, 0, path), KL_EIO, path);
    expect_error(kl_cache_load(cache, 0, dir), KL_EFORMAT, "no regular file");
    expect_error(kl_cache_save(cache, 0, nested), KL_EIO, "absent");
    expect_error(kl_cache_save(cache, 1, path), KL_EINVAL, "slot");
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    close(fd);
    expect_error(kl_cache_load(cache, 0, path), KL_EFORMAT, "empty");
    /* a full disk leaves the old file */
    assert_ok(kl_cache_save(cache, 0, path));
    struct rlimit old, low = {1000, 1000};
    getrlimit(RLIMIT_FSIZE, &old);
    low.rlim_max = old.rlim_max;
    fill_slot(cache, 0, 12, 2);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &low);
    kl_status s = kl_cache_save(cache, 0, path);
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, handler);
    assert_int_equal(s.code, KL_EIO);
    assert_ok(kl_cache_load(cache, 0, path));
    assert_int_equal(cache->length[0], 9);
    kl_cache_destroy(cache);
    remove_folder(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(released_model_sizes_are_exact),
        cmocka_unit_test(absurd_sizes_are_refused),
        cmocka_unit_test(parts_fill_the_block_exactly),
        cmocka_unit_test(fork_copies_and_reset_clears),
        cmocka_unit_test(rewinding_restores_what_was_kept),
        cmocka_unit_test(files_bring_a_slot_back),
        cmocka_unit_test(damaged_files_are_refused),
        cmocka_unit_test(file_errors_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
