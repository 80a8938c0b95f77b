/* The parameters of a model: their names, mapping a checkpoint in either spelling, and writing one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <omp.h>

#include "harness/file.h"
#include "harness/weights.h"
#include "tests/expect.h"
#include "tests/scratch.h"

static kl_config preset(const char *name)
{
    kl_config c;
    assert_ok(kl_config_preset(&c, name));
    return c;
}

/* ---- names ---- */

typedef struct {
    int tensors, f32, experts;
    char first[128], last[128];
    bool seen_conv, seen_a_log;
} census;

static kl_status take_census(void *user, const kl_param_info *info, kl_param *param)
{
    census *n = user;
    int64_t count = 1;
    for (int i = 0; i < info->ndim; i++)
        count *= info->shape[i];
    assert_int_equal(count, info->rows * info->columns);
    assert_int_equal(param->rows, info->rows);
    if (n->tensors++ == 0)
        strcpy(n->first, info->name);
    strcpy(n->last, info->name);
    n->f32 += info->dtype == KL_F32;
    n->experts += info->expert >= 0;
    if (strcmp(info->name, "model.layers.4.self_attn.k_conv1d.weight") == 0)
        n->seen_conv = info->ndim == 3 && info->shape[0] == 4096 && info->shape[1] == 1 && info->shape[2] == 4;
    if (strcmp(info->name, "model.layers.0.self_attn.A_log") == 0)
        n->seen_a_log = info->ndim == 4 && info->shape[2] == 32 && info->rows == 1;
    return kl_ok();
}

static void the_released_inventory(void **state)
{
    (void)state;
    kl_config c = preset("48b");
    census n = {0};
    assert_ok(kl_weights_each(&c, NULL, take_census, &n));
    assert_int_equal(n.tensors, 20493);
    assert_int_equal(n.experts, 26 * 256 * 3);
    assert_int_equal(n.f32, 20 * 2 + 26);
    assert_string_equal(n.first, "model.embed_tokens.weight");
    assert_string_equal(n.last, "lm_head.weight");
    assert_true(n.seen_conv && n.seen_a_log);
}

static void variants_have_their_own_inventory(void **state)
{
    (void)state;
    static const struct {
        const char *set;
        int fewer; /* tensors than tiny: 4 KDA layers, 2 MLA */
    } cases[] = {{"gate=none", 16}, {"output_gate=none", 8}, {"conv=0", 12}, {"tied=1", 1}, {"shared=0", 15}, {"gate=head", 0}};
    kl_config c = preset("tiny");
    census plain = {0};
    assert_ok(kl_weights_each(&c, NULL, take_census, &plain));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        census n = {0};
        c = preset("tiny");
        assert_ok(kl_config_set(&c, cases[i].set));
        assert_ok(kl_weights_each(&c, NULL, take_census, &n));
        assert_int_equal(plain.tensors - n.tensors, cases[i].fewer);
    }
}

static kl_status stop_at_once(void *user, const kl_param_info *info, kl_param *param)
{
    (void)info;
    (void)param;
    ++*(int *)user;
    return kl_error(KL_EINTR, "enough");
}

static void a_visit_stops_at_the_first_failure(void **state)
{
    (void)state;
    kl_config c = preset("tiny");
    int calls = 0;
    expect_error(kl_weights_each(&c, NULL, stop_at_once, &calls), KL_EINTR, "enough");
    assert_int_equal(calls, 1);
}

/* ---- making ---- */

static void initial_weights_depend_on_the_seed_alone(void **state)
{
    (void)state;
    kl_config c = preset("tiny");
    kl_weights a, b, other;
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    assert_ok(kl_weights_init(&a, &c, 7));
    omp_set_num_threads(3);
    assert_ok(kl_weights_init(&b, &c, 7));
    omp_set_num_threads(threads);
    assert_ok(kl_weights_init(&other, &c, 8));
    assert_int_equal(a.embed.dtype, KL_F32);
    assert_memory_equal(a.embed.data, b.embed.data, 512 * 96 * 4);
    assert_memory_equal(a.layers[5].w2[7].data, b.layers[5].w2[7].data, 96 * 48 * 4);
    assert_memory_not_equal(a.embed.data, other.embed.data, 512 * 96 * 4);
    assert_ptr_equal(a.layers[5].w2_data[7], a.layers[5].w2[7].data);
    assert_null(a.layers[3].q_proj.data); /* an MLA layer */
    assert_null(a.layers[0].router.data); /* a dense one */
    assert_int_equal(a.layers[0].q_conv.rows, 96);
    assert_int_equal(a.layers[0].q_conv.columns, 4);
    for (int i = 0; i < 96; i++) {
        /* softplus(dt_bias) is the rate of a head without input */
        double dt = log1p(exp(((float *)a.layers[0].dt_bias.data)[i]));
        assert_true(dt > 0.00099 && dt < 0.101);
        assert_true(((float *)a.norm.data)[i] == 1);
    }
    for (int i = 0; i < 4; i++)
        assert_true(((float *)a.layers[0].A_log.data)[i] >= 0 && ((float *)a.layers[0].A_log.data)[i] < logf(16.01f));
    kl_weights_free(&a);
    kl_weights_free(&b);
    kl_weights_free(&other);
}

static void zeros_and_ties(void **state)
{
    (void)state;
    kl_config c = preset("demo");
    kl_weights w;
    assert_ok(kl_weights_zeros(&w, &c));
    assert_ptr_equal(w.lm_head.data, w.embed.data);
    assert_int_equal(w.lm_head.rows, c.vocab_size);
    for (size_t i = 0; i < w.owned_bytes; i++)
        if (((char *)w.owned)[i])
            fail_msg("byte %zu is not zero", i);
    kl_weights_free(&w);
    assert_null(w.owned);
    kl_weights_free(&w);
}

/* ---- files ---- */

static kl_config load_config(const char *dir)
{
    char path[300];
    kl_config c;
    snprintf(path, sizeof path, "%s/config.json", dir);
    assert_ok(kl_config_load(&c, path));
    return c;
}

static void golden_models_open(void **state)
{
    (void)state;
    static const char *const dirs[] = {"tests/golden/models/tiny", "tests/golden/models/d128"};
    for (int i = 0; i < 2; i++) {
        kl_config c = load_config(dirs[i]);
        kl_weights w;
        assert_ok(kl_weights_open(&w, &c, dirs[i]));
        assert_int_equal(w.embed.dtype, i ? KL_BF16 : KL_F32);
        assert_int_equal(w.layers[1].A_log.dtype, KL_F32);
        assert_int_equal(w.layers[1].router_bias.dtype, KL_F32);
        assert_ptr_equal(w.embed.data, kl_tensors_find(w.mapping, "model.embed_tokens.weight")->data);
        assert_ptr_equal(w.layers[0].up_proj.data, kl_tensors_find(w.mapping, "model.layers.0.block_sparse_moe.up_proj.weight")->data);
        assert_ptr_equal(w.layers[2].w3_data[5], kl_tensors_find(w.mapping, "model.layers.2.block_sparse_moe.experts.5.w3.weight")->data);
        kl_weights_free(&w);
    }
}

static void expect_same_tensors(const kl_tensors *a, const kl_tensors *b)
{
    assert_int_equal(kl_tensors_size(a), kl_tensors_size(b));
    for (int i = 0; i < kl_tensors_size(a); i++) {
        const kl_tensor *x = kl_tensors_at(a, i), *y = kl_tensors_at(b, i);
        assert_string_equal(x->name, y->name);
        assert_int_equal(x->dtype, y->dtype);
        assert_memory_equal(x->shape, y->shape, sizeof x->shape);
        assert_memory_equal(x->data, y->data, kl_tensor_bytes(x));
    }
}

static void save_and_open(void **state)
{
    (void)state;
    kl_config c = preset("tiny"), read;
    kl_weights made, opened, floats, again;
    assert_ok(kl_weights_init(&made, &c, 3));
    for (int dtype = KL_F32; dtype <= KL_F16; dtype++) {
        assert_ok(kl_weights_save(&made, &c, (kl_dtype)dtype, in_scratch("first/inner")));
        read = load_config(in_scratch("first/inner"));
        assert_int_equal(read.dtype, dtype);
        assert_ok(kl_weights_open(&opened, &read, in_scratch("first/inner")));
        assert_int_equal(opened.layers[0].q_proj.dtype, dtype);
        assert_int_equal(opened.layers[0].dt_bias.dtype, KL_F32);
        assert_ok(kl_weights_to_f32(&floats, &opened, &read));
        assert_int_equal(floats.layers[4].w1[2].dtype, KL_F32);
        assert_ok(kl_weights_save(&floats, &read, read.dtype, in_scratch("second")));
        assert_ok(kl_weights_open(&again, &read, in_scratch("second")));
        expect_same_tensors(opened.mapping, again.mapping);
        if (dtype == KL_F32)
            assert_memory_equal(floats.owned, made.owned, 512 * 96 * 4);
        kl_weights_free(&opened);
        kl_weights_free(&floats);
        kl_weights_free(&again);
    }
    expect_error(kl_weights_save(&made, &c, KL_I32, in_scratch("third")), KL_EINVAL, "dtype");
    kl_weights_free(&made);
}

/* ---- the transformers-native spelling, made from a released one ---- */

static char *replace(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    char *made = malloc(strlen(text) + strlen(to) + 1);
    assert_non_null(made);
    if (at)
        sprintf(made, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    else
        strcpy(made, text);
    return made;
}

/* Copies `parts` tensors of that name pattern (one %d) one after another. */
static kl_tensor stack(const kl_tensors *t, const char *name, int ndim, int64_t a, int64_t b, int64_t c, const char *const *patterns, int kinds, int layer, int parts)
{
    kl_tensor made = {.name = strdup(name), .ndim = ndim, .shape = {a, b, c}, .dtype = KL_F32};
    char *at = made.data = malloc(kl_tensor_bytes(&made));
    assert_non_null(at);
    for (int i = 0; i < parts; i++)
        for (int k = 0; k < kinds; k++) {
            char part[160];
            snprintf(part, sizeof part, patterns[k], layer, i);
            const kl_tensor *x = kl_tensors_find(t, part);
            assert_non_null(x);
            memcpy(at, x->data, kl_tensor_bytes(x));
            at += kl_tensor_bytes(x);
        }
    assert_int_equal(at - (char *)made.data, kl_tensor_bytes(&made));
    return made;
}

typedef struct {
    kl_tensor tensors[200];
    int count;
} native;

static void add_renamed(native *n, const kl_tensor *t)
{
    static const char *const names[][2] = {{".block_sparse_moe.", ".mlp."}, {".self_attn.A_log", ".self_attn.forget_gate.A_log"},
                                           {".self_attn.dt_bias", ".self_attn.forget_gate.dt_bias"}, {".self_attn.f_a_proj.", ".self_attn.forget_gate.f_a_proj."},
                                           {".self_attn.f_b_proj.", ".self_attn.forget_gate.f_b_proj."}};
    if (strstr(t->name, ".experts.") || strstr(t->name, "_conv1d."))
        return;
    kl_tensor made = *t;
    made.name = strdup(t->name);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *renamed = replace(made.name, names[i][0], names[i][1]);
        free(made.name);
        made.name = renamed;
    }
    made.data = malloc(kl_tensor_bytes(t));
    assert_non_null(made.data);
    memcpy(made.data, t->data, kl_tensor_bytes(t));
    if (strstr(made.name, "A_log")) { /* [1,1,H,1] as [H] */
        made.ndim = 1;
        made.shape[0] = kl_tensor_count(t);
    }
    n->tensors[n->count++] = made;
}

static void make_native(native *n, const kl_tensors *t, const kl_config *c)
{
    static const char *const up[] = {"model.layers.%d.block_sparse_moe.experts.%d.w1.weight", "model.layers.%d.block_sparse_moe.experts.%d.w3.weight"};
    static const char *const down[] = {"model.layers.%d.block_sparse_moe.experts.%d.w2.weight"};
    static const char *const conv[] = {"model.layers.%d.self_attn.q_conv1d.weight", "model.layers.%d.self_attn.k_conv1d.weight",
                                       "model.layers.%d.self_attn.v_conv1d.weight"};
    int64_t P = c->kda_heads * c->kda_head_dim;
    for (int i = 0; i < kl_tensors_size(t); i++)
        add_renamed(n, kl_tensors_at(t, i));
    for (int l = 0; l < c->num_layers; l++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.self_attn.conv1d.weight", l);
        if (c->mixer[l] == KL_MIX_KDA)
            n->tensors[n->count++] = stack(t, name, 3, 3 * P, 1, c->conv_width, conv, 3, l, 1);
        if (!c->sparse[l])
            continue;
        snprintf(name, sizeof name, "model.layers.%d.mlp.experts.gate_up_proj", l);
        n->tensors[n->count++] = stack(t, name, 3, c->num_experts, 2 * c->moe_intermediate_size, c->hidden_size, up, 2, l, (int)c->num_experts);
        snprintf(name, sizeof name, "model.layers.%d.mlp.experts.down_proj", l);
        n->tensors[n->count++] = stack(t, name, 3, c->num_experts, c->hidden_size, c->moe_intermediate_size, down, 1, l, (int)c->num_experts);
    }
}

static void free_native(native *n)
{
    for (int i = 0; i < n->count; i++) {
        free(n->tensors[i].name);
        free(n->tensors[i].data);
    }
    n->count = 0;
}

static void native_names_give_the_same_model(void **state)
{
    (void)state;
    kl_config c = preset("tiny");
    kl_weights made, opened, read, floats;
    native n = {.count = 0};
    assert_ok(kl_weights_init(&made, &c, 5));
    assert_ok(kl_weights_save(&made, &c, KL_F32, in_scratch("released")));
    assert_ok(kl_weights_open(&opened, &c, in_scratch("released")));
    make_native(&n, opened.mapping, &c);
    assert_ok(kl_make_dir(in_scratch("native")));
    assert_ok(kl_tensors_save(in_scratch("native/model.safetensors"), n.tensors, n.count, NULL));
    assert_ok(kl_weights_open(&read, &c, in_scratch("native")));
    assert_null(kl_tensors_find(read.mapping, "model.layers.1.block_sparse_moe.experts.0.w1.weight"));
    assert_ok(kl_weights_to_f32(&floats, &read, &c));
    assert_ok(kl_weights_save(&floats, &c, KL_F32, in_scratch("back"))); /* always in released names */
    kl_weights_free(&read);
    assert_ok(kl_weights_open(&read, &c, in_scratch("back")));
    expect_same_tensors(opened.mapping, read.mapping);
    free_native(&n);
    kl_weights_free(&made);
    kl_weights_free(&opened);
    kl_weights_free(&read);
    kl_weights_free(&floats);
}

/* ---- checkpoints that do not fit ---- */

/* The tiny model's tensors, to be damaged one at a time. */
static kl_tensors *tiny_tensors(kl_tensor *list, int *count)
{
    kl_tensors *t;
    assert_ok(kl_tensors_open(&t, "tests/golden/models/tiny"));
    *count = kl_tensors_size(t);
    for (int i = 0; i < *count; i++)
        list[i] = *kl_tensors_at(t, i);
    return t;
}

static int index_of(const kl_tensor *list, int count, const char *name)
{
    for (int i = 0; i < count; i++)
        if (strcmp(list[i].name, name) == 0)
            return i;
    fail_msg("no tensor %s", name);
    return -1;
}

static void open_damaged(const kl_tensor *list, int count, const char *part)
{
    kl_config c = load_config("tests/golden/models/tiny");
    kl_weights w;
    assert_ok(kl_make_dir(in_scratch("damaged")));
    assert_ok(kl_tensors_save(in_scratch("damaged/model.safetensors"), list, count, NULL));
    expect_error(kl_weights_open(&w, &c, in_scratch("damaged")), KL_EFORMAT, part);
    assert_null(w.layers);
    assert_null(w.mapping);
}

static void misfits_are_refused_by_name(void **state)
{
    (void)state;
    static const char *const names[] = {"model.embed_tokens.weight", "model.layers.0.self_attn.A_log", "model.layers.0.self_attn.q_conv1d.weight",
                                        "model.layers.3.self_attn.kv_b_proj.weight", "model.layers.2.block_sparse_moe.experts.7.w2.weight",
                                        "model.layers.0.block_sparse_moe.gate_proj.weight", "model.layers.4.block_sparse_moe.gate.e_score_correction_bias"};
    kl_tensor list[400], damaged[400];
    int count;
    kl_tensors *t = tiny_tensors(list, &count);
    static char room[4 << 20];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int at = index_of(list, count, names[i]);
        const char *last = strrchr(names[i], '.') + 1;
        memcpy(damaged, list, sizeof list); /* missing */
        damaged[at] = damaged[count - 1];
        open_damaged(damaged, count - 1, "is missing");
        memcpy(damaged, list, sizeof list); /* one row more */
        damaged[at].shape[0]++;
        damaged[at].data = room;
        open_damaged(damaged, count, "expected shape [");
        open_damaged(damaged, count, last);
        memcpy(damaged, list, sizeof list); /* one dimension more */
        damaged[at].shape[damaged[at].ndim++] = 1;
        open_damaged(damaged, count, names[i]);
        memcpy(damaged, list, sizeof list); /* integers */
        damaged[at].dtype = KL_I32;
        open_damaged(damaged, count, "int32");
    }
    memcpy(damaged, list, sizeof list); /* a tensor too many */
    damaged[count] = damaged[0];
    damaged[count].name = (char *)"model.layers.0.self_attn.q_proj.bias";
    open_damaged(damaged, count + 1, "'model.layers.0.self_attn.q_proj.bias' is not part of this model");
    memcpy(damaged, list, sizeof list); /* one expert in another type than the rest */
    int at = index_of(list, count, "model.layers.2.block_sparse_moe.experts.7.w2.weight");
    damaged[at].dtype = KL_BF16;
    open_damaged(damaged, count, "experts.7.w2");
    kl_tensors_close(t);
}

static void sixteen_bit_gates_become_float(void **state)
{
    (void)state;
    kl_config c = load_config("tests/golden/models/tiny");
    kl_tensor list[400];
    int count;
    kl_tensors *t = tiny_tensors(list, &count);
    int at = index_of(list, count, "model.layers.0.self_attn.A_log");
    uint16_t values[4];
    kl_from_f32(values, KL_BF16, list[at].data, 4);
    list[at].data = values;
    list[at].dtype = KL_BF16;
    assert_ok(kl_make_dir(in_scratch("mixed")));
    assert_ok(kl_tensors_save(in_scratch("mixed/model.safetensors"), list, count, NULL));
    kl_weights w;
    assert_ok(kl_weights_open(&w, &c, in_scratch("mixed")));
    assert_int_equal(w.layers[0].A_log.dtype, KL_F32);
    for (int i = 0; i < 4; i++)
        assert_true(((float *)w.layers[0].A_log.data)[i] == kl_bf16_to_f32(values[i]));
    kl_weights_free(&w);
    kl_tensors_close(t);
}

/* ---- memory ---- */

static int64_t resident_bytes(void)
{
    long size, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%ld %ld", &size, &resident), 2);
    fclose(file);
    return (int64_t)resident * sysconf(_SC_PAGESIZE);
}

/* 60 MB of weights cost next to nothing until they are used. */
static void opening_maps_and_does_not_copy(void **state)
{
    (void)state;
    kl_config c = preset("60m");
    assert_ok(kl_config_set(&c, "layers=4"));
    kl_weights made, w;
    assert_ok(kl_weights_zeros(&made, &c));
    assert_ok(kl_weights_save(&made, &c, KL_BF16, in_scratch("large")));
    kl_weights_free(&made);
    c.dtype = KL_BF16;
    int64_t before = resident_bytes();
    assert_ok(kl_weights_open(&w, &c, in_scratch("large")));
    int64_t grown = resident_bytes() - before;
    assert_true(kl_tensors_file_bytes(w.mapping) > 50000000);
    print_message("%zu bytes of file, %lld bytes resident\n", kl_tensors_file_bytes(w.mapping), (long long)grown);
    assert_true(grown < 8 << 20);
    kl_weights_free(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_released_inventory),
        cmocka_unit_test(variants_have_their_own_inventory),
        cmocka_unit_test(a_visit_stops_at_the_first_failure),
        cmocka_unit_test(initial_weights_depend_on_the_seed_alone),
        cmocka_unit_test(zeros_and_ties),
        cmocka_unit_test(golden_models_open),
        cmocka_unit_test(save_and_open),
        cmocka_unit_test(native_names_give_the_same_model),
        cmocka_unit_test(misfits_are_refused_by_name),
        cmocka_unit_test(sixteen_bit_gates_become_float),
        cmocka_unit_test(opening_maps_and_does_not_copy),
    };
    return cmocka_run_group_tests_name("weights", tests, make_scratch, remove_scratch);
}
