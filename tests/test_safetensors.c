/* safetensors files: what is read, what is refused, shards, and that writing is all or nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "harness/file.h"
#include "harness/safetensors.h"
#include "tests/expect.h"
#include "tests/scratch.h"

/* ---- files made by hand ---- */

typedef struct {
    char *bytes; /* aligned as a mapping would be */
    size_t size;
} image;

/* The header, padded to 8 as writers do, and then `data` bytes counting up. */
static image make_image(const char *header, size_t data)
{
    size_t n = strlen(header), padded = (n + 7) / 8 * 8;
    image f = {aligned_alloc(64, (8 + padded + data + 63) / 64 * 64), 8 + padded + data};
    assert_non_null(f.bytes);
    for (int i = 0; i < 8; i++)
        f.bytes[i] = (char)((uint64_t)padded >> (8 * i));
    memset(f.bytes + 8, ' ', padded);
    memcpy(f.bytes + 8, header, n);
    for (size_t i = 0; i < data; i++)
        f.bytes[8 + padded + i] = (char)i;
    return f;
}

static kl_status open_header(const char *header, size_t data)
{
    image f = make_image(header, data);
    kl_tensors *t;
    kl_status s = kl_tensors_open_memory(&t, f.bytes, f.size, "test");
    if (kl_failed(s))
        assert_null(t);
    kl_tensors_close(t);
    free(f.bytes);
    return s;
}

static const char two[] = "{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                          "\"a\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[24,26]}}";

static void reads_what_is_there(void **state)
{
    (void)state;
    image f = make_image(two, 26);
    kl_tensors *t;
    assert_ok(kl_tensors_open_memory(&t, f.bytes, f.size, "test"));
    assert_int_equal(kl_tensors_size(t), 2);
    const kl_tensor *a = kl_tensors_at(t, 0), *b = kl_tensors_find(t, "b");
    assert_string_equal(a->name, "a");
    assert_int_equal(a->dtype, KL_BF16);
    assert_int_equal(a->ndim, 0);
    assert_int_equal(kl_tensor_count(a), 1);
    assert_int_equal(kl_tensor_bytes(a), 2);
    assert_int_equal(b->ndim, 2);
    assert_int_equal(b->shape[1], 3);
    assert_int_equal(kl_tensor_bytes(b), 24);
    assert_int_equal(((unsigned char *)b->data)[23], 23);
    assert_int_equal(((unsigned char *)a->data)[0], 24);
    assert_null(kl_tensors_find(t, "c"));
    assert_null(kl_tensors_at(t, 2));
    assert_string_equal(kl_tensors_metadata(t, "format"), "pt");
    assert_null(kl_tensors_metadata(t, "nothing"));
    assert_int_equal(kl_tensors_file_bytes(t), f.size);
    kl_tensors_close(t);
    free(f.bytes);
}

static void every_dtype_and_empty_tensors(void **state)
{
    (void)state;
    static const char *const names[] = {"F32", "BF16", "F16", "F64", "I32", "I64", "U8"};
    for (int i = 0; i < 7; i++) {
        char header[200];
        size_t bytes = 5 * kl_dtype_size((kl_dtype)i);
        snprintf(header, sizeof header, "{\"x\":{\"dtype\":\"%s\",\"shape\":[5],\"data_offsets\":[0,%zu]}}", names[i], bytes);
        assert_ok(open_header(header, bytes));
    }
    assert_ok(open_header("{}", 0));
    assert_ok(open_header("{\"e\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[0,0]}}", 0));
    assert_ok(open_header("{\"x\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},\"e\":{\"dtype\":\"F64\",\"shape\":[0],\"data_offsets\":[3,3]}}", 3));
}

#define ONE(dtype, shape, offsets) "{\"x\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void each_refusal_names_its_tensor(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t data;
        const char *part;
    } cases[] = {
        {ONE("F8_E4M3", "[4]", "[0,4]"), 4, "'x': dtype: expected one of F32"},
        {ONE("BOOL", "[4]", "[0,4]"), 4, "BOOL"},
        {"{\"x\":{\"dtype\":5,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "'x': dtype"},
        {"{\"x\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "got nothing"},
        {"{\"x\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "'x': shape"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "'x': data_offsets"},
        {"{\"x\":5}", 0, "'x': expected an object"},
        {ONE("F32", "[-1]", "[0,4]"), 4, "-1"},
        {ONE("F32", "[1.5]", "[0,6]"), 6, "1.5"},
        {ONE("F32", "[\"1\"]", "[0,4]"), 4, "\"1\""},
        {ONE("F32", "[1e300]", "[0,4]"), 4, "1e+300"},
        {ONE("F32", "4", "[0,16]"), 16, "'x': shape: expected an array"},
        {ONE("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "at most 8 dimensions"},
        {ONE("F32", "[4294967296,4294967296]", "[0,4]"), 4, "63 bits"},
        {ONE("F32", "[4294967296,536870912,0]", "[0,0]"), 0, "63 bits"},
        {ONE("F32", "[2]", "[0,4]"), 4, "expected 8 bytes for its shape and dtype, got 4"},
        {ONE("F32", "[1]", "[0,8]"), 8, "expected 4 bytes"},
        {ONE("F32", "[1]", "[4,0]"), 4, "0 <= begin <= end"},
        {ONE("F32", "[1]", "[-4,0]"), 4, "0 <= begin <= end"},
        {ONE("F32", "[1]", "[0.5,4.5]"), 8, "0 <= begin <= end"},
        {ONE("F32", "[1]", "[0]"), 4, "0 <= begin <= end"},
        {ONE("F32", "[1]", "[0,4,8]"), 8, "0 <= begin <= end"},
        {ONE("F32", "[1]", "[0,9007199254740993]"), 8, "data_offsets"},
        {ONE("F32", "[4]", "[0,16]"), 12, "ends at byte 16 of 12"}, /* truncated */
        {ONE("F32", "[4]", "[0,16]"), 17, "overlong"},
        {ONE("F32", "[1]", "[4,8]"), 8, "bytes 0 to there belong to no tensor"},
        {"{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[1,5]}}", 5, "'y'"}, /* misaligned */
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"y\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "inside 'x'"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"y\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "inside"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12, "bytes 4 to there"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "'x' stands twice"},
        {"{\"__metadata__\":[],\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "__metadata__"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "'a'"},
        {"{\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor name"},
        {"{\"a\\nb\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor name"},
        {"{\"a\\u0000b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "NUL"},
        {"[]", 0, "object"},
        {"{\"x\":", 0, "JSON"},
        {"{} {}", 0, "more text"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kl_status s = open_header(cases[i].header, cases[i].data);
        if (s.code != KL_EFORMAT || !strstr(s.message, cases[i].part) || strchr(s.message, '\n'))
            fail_msg("%s: expected bad format naming '%s', got %s: %s", cases[i].header, cases[i].part, kl_code_name(s.code), s.message);
    }
}

static void every_truncation_is_refused(void **state)
{
    (void)state;
    image f = make_image(two, 26);
    for (size_t n = 0; n < f.size; n++) {
        char *copy = malloc(n ? n : 1); /* so that a sanitizer sees a read past the end */
        assert_non_null(copy);
        memcpy(copy, f.bytes, n);
        kl_tensors *t;
        expect_error(kl_tensors_open_memory(&t, copy, n, "cut"), KL_EFORMAT, "cut");
        free(copy);
    }
    free(f.bytes);
}

static void absurd_header_lengths(void **state)
{
    (void)state;
    image f = make_image(two, 26);
    static const uint64_t lengths[] = {UINT64_MAX, (uint64_t)1 << 63, 100000001, 100000000, 4096, 0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (int b = 0; b < 8; b++)
            f.bytes[b] = (char)(lengths[i] >> (8 * b));
        kl_tensors *t;
        expect_error(kl_tensors_open_memory(&t, f.bytes, f.size, "long"), KL_EFORMAT, lengths[i] ? "header of" : "JSON");
    }
    free(f.bytes);
}

static void one_flipped_byte_never_crashes(void **state)
{
    (void)state;
    image f = make_image(two, 26);
    int opened = 0;
    for (size_t at = 0; at < f.size - 26; at++)
        for (int bit = 0; bit < 8; bit++) {
            f.bytes[at] = (char)(f.bytes[at] ^ 1 << bit);
            kl_tensors *t;
            kl_status s = kl_tensors_open_memory(&t, f.bytes, f.size, "flipped");
            opened += !kl_failed(s);
            kl_tensors_close(t);
            f.bytes[at] = (char)(f.bytes[at] ^ 1 << bit);
        }
    assert_true(opened > 0 && opened < (int)(f.size - 26) * 4); /* names and metadata may differ, structure may not */
    free(f.bytes);
}

static void files_that_are_none(void **state)
{
    (void)state;
    kl_tensors *t;
    expect_error(kl_tensors_open(&t, "/no/such/file"), KL_EIO, "/no/such/file");
    expect_error(kl_tensors_open(&t, "/dev/null"), KL_EINVAL, "regular file");
    put_bytes("empty", "", 0);
    expect_error(kl_tensors_open(&t, in_scratch("empty")), KL_EFORMAT, "0 bytes");
    expect_error(kl_tensors_open(&t, "Makefile"), KL_EFORMAT, "Makefile");
    kl_status s = kl_make_dir(in_scratch("nothing/inside"));
    assert_ok(s);
    expect_error(kl_tensors_open(&t, in_scratch("nothing")), KL_EIO, "model.safetensors.index.json");
}

static void golden_files_open(void **state)
{
    (void)state;
    static const char *const paths[] = {"tests/golden/models/tiny", "tests/golden/models/d128/expected.safetensors",
                                        "tests/golden/kda/04_kimi_T64_H2_HV2_K32_V32.safetensors"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        kl_tensors *t;
        assert_ok(kl_tensors_open(&t, paths[i]));
        assert_true(kl_tensors_size(t) > 5);
        for (int k = 1; k < kl_tensors_size(t); k++) {
            assert_true(strcmp(kl_tensors_at(t, k - 1)->name, kl_tensors_at(t, k)->name) < 0);
            assert_ptr_equal(kl_tensors_find(t, kl_tensors_at(t, k)->name), kl_tensors_at(t, k));
        }
        kl_tensors_close(t);
    }
}

/* ---- shards ---- */

static void put_image(const char *name, const char *header, size_t data)
{
    image f = make_image(header, data);
    put_bytes(name, f.bytes, f.size);
    free(f.bytes);
}

static void put_shards(const char *index)
{
    assert_ok(kl_make_dir(in_scratch("shards")));
    put_image("shards/one.safetensors", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[4,5]}}", 5);
    put_image("shards/two.safetensors", "{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4);
    put_bytes("shards/model.safetensors.index.json", index, strlen(index));
}

static void shards_are_one_set(void **state)
{
    (void)state;
    put_shards("{\"metadata\":{\"total_size\":9},\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}");
    kl_tensors *t;
    assert_ok(kl_tensors_open(&t, in_scratch("shards")));
    assert_int_equal(kl_tensors_size(t), 3);
    assert_string_equal(kl_tensors_at(t, 1)->name, "b");
    assert_non_null(kl_tensors_find(t, "c"));
    kl_tensors_close(t);
}

static void bad_indices_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *index, *part;
        kl_code code;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"three.safetensors\",\"c\":\"one.safetensors\"}}", "three.safetensors", KL_EIO},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\",\"d\":\"two.safetensors\"}}", "'d'", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}", "'c'", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\"}}", "'c'", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"../shards/one.safetensors\"}}", "plain name", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "plain name", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"..\"}}", "plain name", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"\"}}", "plain name", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":1}}", "plain name", KL_EFORMAT},
        {"{\"weight_map\":{}}", "weight_map", KL_EFORMAT},
        {"{\"weight_map\":[]}", "weight_map", KL_EFORMAT},
        {"{}", "weight_map", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"one.safetensors\",\"a\":\"two.safetensors\"}}", "'a' stands twice", KL_EFORMAT},
        {"{", "JSON", KL_EFORMAT},
        {"{\"weight_map\":{\"a\":\"model.safetensors.index.json\"}}", "model.safetensors.index.json", KL_EFORMAT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kl_tensors *t;
        put_shards(cases[i].index);
        expect_error(kl_tensors_open(&t, in_scratch("shards")), cases[i].code, cases[i].part);
        assert_null(t);
    }
}

static void the_same_tensor_in_two_shards(void **state)
{
    (void)state;
    put_shards("{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"one.safetensors\"}}");
    put_image("shards/two.safetensors", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8);
    kl_tensors *t;
    expect_error(kl_tensors_open(&t, in_scratch("shards")), KL_EFORMAT, "'a' stands in both");
}

/* ---- writing ---- */

static float numbers[3] = {1, 2.5f, -7};
static uint8_t small[5] = {1, 2, 3, 4, 5};
static kl_tensor to_save[] = {
    {.name = (char *)"small \"q\" \\ \xe4\xbd\xa0", .data = small, .dtype = KL_U8, .ndim = 1, .shape = {5}},
    {.name = (char *)"numbers", .data = numbers, .dtype = KL_F32, .ndim = 2, .shape = {3, 1}},
    {.name = (char *)"none", .data = NULL, .dtype = KL_F64, .ndim = 2, .shape = {4, 0}},
};

static void saving_round_trip(void **state)
{
    (void)state;
    static const char *const metadata[] = {"format", "pt", "note", "a \"quoted\"\nline", NULL};
    assert_ok(kl_tensors_save(in_scratch("saved"), to_save, 3, metadata));
    kl_tensors *t;
    assert_ok(kl_tensors_open(&t, in_scratch("saved")));
    assert_int_equal(kl_tensors_size(t), 3);
    for (int i = 0; i < 3; i++) {
        const kl_tensor *x = kl_tensors_find(t, to_save[i].name);
        assert_non_null(x);
        assert_int_equal(x->dtype, to_save[i].dtype);
        assert_int_equal(x->ndim, to_save[i].ndim);
        assert_memory_equal(x->shape, to_save[i].shape, sizeof(int64_t) * (size_t)x->ndim);
        if (kl_tensor_bytes(x))
            assert_memory_equal(x->data, to_save[i].data, kl_tensor_bytes(x));
    }
    assert_string_equal(kl_tensors_metadata(t, "note"), "a \"quoted\"\nline");
    kl_tensors_close(t);
    assert_ok(kl_tensors_save(in_scratch("saved"), NULL, 0, NULL));
    assert_ok(kl_tensors_open(&t, in_scratch("saved")));
    assert_int_equal(kl_tensors_size(t), 0);
    kl_tensors_close(t);
}

static void bad_tensors_are_not_saved(void **state)
{
    (void)state;
    kl_tensor twice[] = {to_save[1], to_save[1]}, bad = to_save[1];
    expect_error(kl_tensors_save(in_scratch("bad"), twice, 2, NULL), KL_EINVAL, "given twice");
    bad.shape[0] = -3;
    expect_error(kl_tensors_save(in_scratch("bad"), &bad, 1, NULL), KL_EINVAL, "numbers");
    bad.shape[0] = INT64_MAX;
    expect_error(kl_tensors_save(in_scratch("bad"), &bad, 1, NULL), KL_EINVAL, "numbers");
    bad = to_save[1];
    bad.data = NULL;
    expect_error(kl_tensors_save(in_scratch("bad"), &bad, 1, NULL), KL_EINVAL, "NULL");
    bad.dtype = (kl_dtype)99;
    expect_error(kl_tensors_save(in_scratch("bad"), &bad, 1, NULL), KL_EINVAL, "99");
    assert_int_not_equal(access(in_scratch("bad"), F_OK), 0);
}

/* A disk that is full after 64 KiB, as far as this process can tell. */
static kl_status save_on_a_full_disk(const char *path, const kl_tensor *t)
{
    struct rlimit old, low;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    low = old;
    low.rlim_cur = 64 << 10;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    kl_status s = kl_tensors_save(path, t, 1, NULL);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, handler);
    return s;
}

static void a_full_disk_changes_nothing(void **state)
{
    (void)state;
    static float large[64 << 10];
    kl_tensor t = {.name = (char *)"large", .data = large, .dtype = KL_F32, .ndim = 1, .shape = {64 << 10}};
    assert_ok(kl_make_dir(in_scratch("disk")));
    const char *path = in_scratch("disk/model.safetensors");
    expect_error(save_on_a_full_disk(path, &t), KL_EIO, strerror(EFBIG));
    assert_int_equal(entries_in(in_scratch("disk")), 0);
    assert_ok(kl_tensors_save(path, to_save, 3, NULL));
    expect_error(save_on_a_full_disk(path, &t), KL_EIO, path);
    assert_int_equal(entries_in(in_scratch("disk")), 1);
    kl_tensors *back; /* still the old file, whole */
    assert_ok(kl_tensors_open(&back, path));
    assert_int_equal(kl_tensors_size(back), 3);
    kl_tensors_close(back);
    expect_error(kl_tensors_save("/dev/full", &t, 1, NULL), KL_EINVAL, "/dev/full");
    expect_error(kl_tensors_save(in_scratch("no/such/folder/x"), &t, 1, NULL), KL_EIO, "no/such/folder");
    expect_error(kl_tensors_save(in_scratch("disk"), &t, 1, NULL), KL_EINVAL, "not a regular file");
}

static void writers_leave_nothing_when_abandoned(void **state)
{
    (void)state;
    kl_writer w;
    assert_ok(kl_make_dir(in_scratch("writer")));
    assert_ok(kl_writer_open(&w, in_scratch("writer/x")));
    assert_ok(kl_writer_write(&w, "abc", 3));
    kl_writer_abandon(&w);
    assert_int_equal(entries_in(in_scratch("writer")), 0);
    expect_error(kl_writer_write(&w, "abc", 3), KL_EINVAL, "after a failure");
    expect_error(kl_writer_commit(&w), KL_EINVAL, "after a failure");
    put_bytes("writer/file", "x", 1);
    expect_error(kl_make_dir(in_scratch("writer/file/inside")), KL_EIO, "file");
    expect_error(kl_make_dir(in_scratch("writer/file")), KL_EINVAL, "not a directory");
}

static void whole_files_within_their_limit(void **state)
{
    (void)state;
    char *bytes;
    size_t size;
    put_bytes("five", "12345", 5);
    assert_ok(kl_file_read(in_scratch("five"), 5, &bytes, &size));
    assert_int_equal(size, 5);
    assert_string_equal(bytes, "12345");
    free(bytes);
    expect_error(kl_file_read(in_scratch("five"), 4, &bytes, &size), KL_EFORMAT, "at most 4 bytes, found 5");
    assert_null(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_what_is_there),
        cmocka_unit_test(every_dtype_and_empty_tensors),
        cmocka_unit_test(each_refusal_names_its_tensor),
        cmocka_unit_test(every_truncation_is_refused),
        cmocka_unit_test(absurd_header_lengths),
        cmocka_unit_test(one_flipped_byte_never_crashes),
        cmocka_unit_test(files_that_are_none),
        cmocka_unit_test(golden_files_open),
        cmocka_unit_test(shards_are_one_set),
        cmocka_unit_test(bad_indices_are_refused),
        cmocka_unit_test(the_same_tensor_in_two_shards),
        cmocka_unit_test(saving_round_trip),
        cmocka_unit_test(bad_tensors_are_not_saved),
        cmocka_unit_test(a_full_disk_changes_nothing),
        cmocka_unit_test(writers_leave_nothing_when_abandoned),
        cmocka_unit_test(whole_files_within_their_limit),
    };
    return cmocka_run_group_tests_name("safetensors", tests, make_scratch, remove_scratch);
}
