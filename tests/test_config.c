/* Configurations: both spellings, what is refused and how it is named, presets, variants, saving. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "harness/config.h"
#include "harness/file.h"
#include "tests/expect.h"
#include "tests/scratch.h"

static kl_config preset(const char *name)
{
    kl_config c;
    assert_ok(kl_config_preset(&c, name));
    return c;
}

/* The released file, as published, less what describes the repository. */
static const char released[] =
    "{\"architectures\": [\"KimiLinearForCausalLM\"], \"bos_token_id\": 163584, \"dtype\": \"bfloat16\", \"eos_token_id\": 163586, \"first_k_dense_replace\": 1,"
    "\"head_dim\": 72, \"hidden_act\": \"silu\", \"hidden_size\": 2304, \"initializer_range\": 0.02, \"intermediate_size\": 9216, \"kv_lora_rank\": 512,"
    "\"linear_attn_config\": {\"full_attn_layers\": [4, 8, 12, 16, 20, 24, 27], \"head_dim\": 128,"
    "\"kda_layers\": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26], \"num_heads\": 32, \"short_conv_kernel_size\": 4},"
    "\"mla_use_nope\": true, \"model_max_length\": 1048576, \"model_type\": \"kimi_linear\", \"moe_intermediate_size\": 1024, \"moe_layer_freq\": 1,"
    "\"moe_renormalize\": true, \"moe_router_activation_func\": \"sigmoid\", \"num_attention_heads\": 32, \"num_expert_group\": 1, \"num_experts\": 256,"
    "\"num_experts_per_token\": 8, \"num_hidden_layers\": 27, \"num_key_value_heads\": 32, \"num_nextn_predict_layers\": 0, \"num_shared_experts\": 1,"
    "\"pad_token_id\": 163839, \"q_lora_rank\": null, \"qk_nope_head_dim\": 128, \"qk_rope_head_dim\": 64, \"rms_norm_eps\": 1e-05, \"rope_scaling\": null,"
    "\"rope_theta\": 10000.0, \"routed_scaling_factor\": 2.446, \"tie_word_embeddings\": false, \"topk_group\": 1, \"use_cache\": true, \"use_grouped_topk\": true,"
    "\"v_head_dim\": 128, \"vocab_size\": 163840}";

static void released_spelling_is_the_48b_preset(void **state)
{
    (void)state;
    kl_config c, p = preset("48b");
    assert_ok(kl_config_parse(&c, released, strlen(released)));
    assert_memory_equal(&c, &p, sizeof c);
    assert_int_equal(c.max_length, 1048576);
    for (int i = 0; i < 27; i++)
        assert_int_equal(c.mixer[i], (i + 1) % 4 == 0 || i == 26 ? KL_MIX_MLA : KL_MIX_KDA);
    assert_int_equal(c.sparse[0], 0);
    assert_int_equal(c.sparse[1], 1);
    assert_true(c.kv_a_norm_eps == 1e-6f);
}

static void released_parameter_count(void **state)
{
    (void)state;
    kl_config c = preset("48b");
    kl_param_count n = kl_config_params(&c);
    assert_int_equal(n.total, 49122681728);
    assert_in_range(n.active, 3050000000, 3150000000);
    c = preset("demo");
    assert_in_range(kl_config_params(&c).total, 1, 2000000);
    c = preset("60m");
    assert_in_range(kl_config_params(&c).total, 55000000, 65000000);
}

/* The same model in the words of transformers. */
static const char native[] =
    "{\"model_type\": \"kimi_linear\", \"dtype\": \"float32\", \"vocab_size\": 512, \"hidden_size\": 96, \"num_hidden_layers\": 6, \"intermediate_size\": 160,"
    "\"layer_types\": [\"linear_attention\", \"linear_attention\", \"linear_attention\", \"full_attention\", \"linear_attention\", \"full_attention\"],"
    "\"mlp_layer_types\": [\"dense\", \"sparse\", \"sparse\", \"sparse\", \"sparse\", \"sparse\"], \"linear_num_heads\": 4, \"linear_head_dim\": 24,"
    "\"linear_conv_kernel_dim\": 4, \"num_attention_heads\": 4, \"kv_lora_rank\": 32, \"qk_nope_head_dim\": 24, \"qk_rope_head_dim\": 8, \"v_head_dim\": 24,"
    "\"num_local_experts\": 8, \"num_experts_per_tok\": 2, \"n_shared_experts\": 1, \"n_group\": 1, \"topk_group\": 1, \"moe_intermediate_size\": 48,"
    "\"routed_scaling_factor\": 2.446, \"max_position_embeddings\": 4096, \"bos_token_id\": 1, \"eos_token_id\": 2, \"pad_token_id\": 0,"
    "\"rope_parameters\": {\"rope_theta\": 10000.0, \"rope_type\": \"default\"}}";

static void native_spelling_is_the_tiny_preset(void **state)
{
    (void)state;
    kl_config c, p = preset("tiny");
    assert_ok(kl_config_parse(&c, native, strlen(native)));
    assert_memory_equal(&c, &p, sizeof c);
}

static void golden_files(void **state)
{
    (void)state;
    kl_config c, p = preset("tiny");
    assert_ok(kl_config_load(&c, "tests/golden/models/tiny/config.json"));
    p.max_length = 1048576;
    assert_memory_equal(&c, &p, sizeof c);
    assert_ok(kl_config_load(&c, "tests/golden/models/d128/config.json"));
    assert_int_equal(c.kda_head_dim, 128);
    assert_int_equal(c.kv_lora_rank, 512);
}

/* released with one piece of its text exchanged */
static kl_status parse_changed(const char *text, const char *from, const char *to)
{
    char changed[4096];
    const char *at = strstr(text, from);
    if (!at)
        fail_msg("'%s' is not there", from);
    snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    kl_config c, before;
    memset(&c, 0x5a, sizeof c);
    before = c;
    kl_status s = kl_config_parse(&c, changed, strlen(changed));
    if (kl_failed(s))
        assert_memory_equal(&c, &before, sizeof c);
    return s;
}

static void each_refusal_names_its_key(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *part;
        kl_code code;
    } cases[] = {
        {"25, 26]", "25, 26, 27]", "layer 27 is in both", KL_EFORMAT},
        {"25, 26]", "25]", "layer 26 is in neither", KL_EFORMAT},
        {"[4, 8,", "[0, 8,", "layer 0", KL_EFORMAT},
        {"24, 27]", "24, 28]", "layer 28", KL_EFORMAT},
        {"[4, 8,", "[8, 8,", "layer 8 stands twice", KL_EFORMAT},
        {"[4, 8,", "[4.5, 8,", "4.5", KL_EFORMAT},
        {"[4, 8,", "[\"4\", 8,", "\"4\"", KL_EFORMAT},
        {"\"full_attn_layers\": [4, 8, 12, 16, 20, 24, 27]", "\"full_attn_layers\": 4", "full_attn_layers", KL_EFORMAT},
        {"\"vocab_size\": 163840", "\"vocab_size\": -1", "vocab_size", KL_EINVAL},
        {"\"vocab_size\": 163840", "\"vocab_size\": 1e300", "vocab_size", KL_EFORMAT},
        {"\"vocab_size\": 163840", "\"vocab_size\": 1e12", "vocab_size", KL_EINVAL},
        {"\"vocab_size\": 163840", "\"vocab_size\": 100", "bos_token_id", KL_EINVAL},
        {", \"vocab_size\": 163840", "", "vocab_size", KL_EFORMAT},
        {"\"hidden_size\": 2304", "\"hidden_size\": 0", "hidden_size", KL_EINVAL},
        {"\"hidden_size\": 2304", "\"hidden_size\": 2304.5", "hidden_size", KL_EFORMAT},
        {"\"num_hidden_layers\": 27", "\"num_hidden_layers\": 100000", "num_hidden_layers", KL_EFORMAT},
        {"\"num_hidden_layers\": 27", "\"num_hidden_layers\": -3", "num_hidden_layers", KL_EFORMAT},
        {"\"head_dim\": 128", "\"head_dim\": 257", "linear_attn_config.head_dim", KL_EINVAL},
        {"\"head_dim\": 128", "\"head_dim\": -128", "linear_attn_config.head_dim", KL_EINVAL},
        {"\"num_heads\": 32", "\"num_heads\": null", "linear_attn_config.num_heads", KL_EINVAL},
        {"\"kv_lora_rank\": 512", "\"kv_lora_rank\": 0", "kv_lora_rank", KL_EINVAL},
        {"\"num_key_value_heads\": 32", "\"num_key_value_heads\": 8", "num_key_value_heads", KL_EUNSUPPORTED},
        {"\"num_experts\": 256", "\"num_experts\": 1000000000", "num_experts", KL_EINVAL},
        {"\"num_experts_per_token\": 8", "\"num_experts_per_token\": 257", "num_experts_per_token", KL_EINVAL},
        {"\"num_expert_group\": 1", "\"num_expert_group\": 3", "num_expert_group", KL_EINVAL},
        {"\"topk_group\": 1", "\"topk_group\": 2", "topk_group", KL_EINVAL},
        {"\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 0", "rms_norm_eps", KL_EINVAL},
        {"\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e999", "rms_norm_eps", KL_EFORMAT},
        {"\"q_lora_rank\": null", "\"q_lora_rank\": 1536", "q_lora_rank", KL_EUNSUPPORTED},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"yarn\"}", "rope_scaling", KL_EUNSUPPORTED},
        {"\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act", KL_EUNSUPPORTED},
        {"\"model_type\": \"kimi_linear\"", "\"model_type\": \"llama\"", "model_type", KL_EUNSUPPORTED},
        {"\"model_type\": \"kimi_linear\",", "", "model_type", KL_EFORMAT},
        {"\"num_nextn_predict_layers\": 0", "\"num_nextn_predict_layers\": 1", "num_nextn_predict_layers", KL_EUNSUPPORTED},
        {"\"use_cache\": true", "\"use_full_rank_gate\": true", "use_full_rank_gate", KL_EUNSUPPORTED},
        {"\"use_cache\": true", "\"attention_bias\": true", "attention_bias", KL_EUNSUPPORTED},
        {"\"use_cache\": true", "\"quantization_config\": {}", "quantization_config", KL_EUNSUPPORTED},
        {"\"use_cache\": true", "\"gate_lower_bound\": -6", "gate_lower_bound", KL_EINVAL},
        {"\"use_cache\": true", "\"gate_lower_bound\": 0", "gate_lower_bound", KL_EINVAL},
        {"\"use_cache\": true", "\"kl_gate_valeus\": 1", "kl_gate_valeus", KL_EUNSUPPORTED},
        {"\"use_cache\": true", "\"kl_gate_values\": 3", "kl_gate_values", KL_EINVAL},
        {"\"use_cache\": true", "\"kl_output_gate\": \"relu\"", "kl_output_gate", KL_EUNSUPPORTED},
        {"\"use_cache\": true", "\"num_local_experts\": 8", "disagree", KL_EFORMAT},
        {"\"use_cache\": true", "\"linear_num_heads\": 8", "disagree", KL_EFORMAT},
        {"\"use_cache\": true", "\"layer_types\": [\"full_attention\"]", "layer_types", KL_EFORMAT},
        {"\"use_cache\": true", "\"hidden_size\": 1", "stands twice", KL_EFORMAT},
        {"\"moe_router_activation_func\": \"sigmoid\"", "\"moe_router_activation_func\": 3", "moe_router_activation_func", KL_EUNSUPPORTED},
        {"\"dtype\": \"bfloat16\"", "\"dtype\": \"float8\"", "dtype", KL_EUNSUPPORTED},
        {"\"tie_word_embeddings\": false", "\"tie_word_embeddings\": 0", "tie_word_embeddings", KL_EFORMAT},
        {"\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": -1", "first_k_dense_replace", KL_EFORMAT},
        {"\"moe_layer_freq\": 1", "\"moe_layer_freq\": 0", "moe_layer_freq", KL_EFORMAT},
        {"{\"full_attn_layers\"", "[{\"full_attn_layers\"", "config.json", KL_EFORMAT},
        {"\"vocab_size\": 163840}", "\"vocab_size\": 163840} x", "more text", KL_EFORMAT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kl_status s = parse_changed(released, cases[i].from, cases[i].to);
        if (s.code != cases[i].code || !strstr(s.message, cases[i].part) || strchr(s.message, '\n'))
            fail_msg("%s: expected %s naming '%s', got %s: %s", cases[i].to, kl_code_name(cases[i].code), cases[i].part, kl_code_name(s.code), s.message);
    }
}

static void lists_and_types_must_agree(void **state)
{
    (void)state;
    expect_error(parse_changed(native, "\"linear_num_heads\"",
                               "\"linear_attn_config\": {\"kda_layers\": [1,2,3,4,5], \"full_attn_layers\": [6]}, \"linear_num_heads\""),
                 KL_EFORMAT, "layer_types: layer 4");
    expect_error(parse_changed(native, "\"linear_num_heads\"", "\"first_k_dense_replace\": 2, \"linear_num_heads\""), KL_EFORMAT, "mlp_layer_types: layer 2");
    expect_error(parse_changed(native, "\"layer_types\"", "\"no_types\""), KL_EFORMAT, "linear_attn_config");
    expect_error(parse_changed(native, "\"full_attention\"", "\"sliding_attention\""), KL_EUNSUPPORTED, "sliding_attention");
}

static void broken_json(void **state)
{
    (void)state;
    kl_config c;
    for (size_t n = 0; n < strlen(released); n += 7) /* every truncation */
        expect_error(kl_config_parse(&c, released, n), KL_EFORMAT, "config.json");
    static const char *const bad[] = {"", "null", "[]", "\"x\"", "{", "{\"a\": 1,}", "{\"a\" 1}", "{'a': 1}", "{\"a\": \"\\u0000\"}", "{\"a\": \"\xff\"}", "{\"a\": 1}\0"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        expect_error(kl_config_parse(&c, bad[i], strlen(bad[i])), KL_EFORMAT, "config.json");
    expect_error(kl_config_parse(&c, "{\"a\": 1}\0", 9), KL_EFORMAT, "byte 8");
    char deep[200];
    memset(deep, '[', sizeof deep);
    expect_error(kl_config_parse(&c, deep, sizeof deep), KL_EFORMAT, "nested");
}

static void files_that_are_none(void **state)
{
    (void)state;
    kl_config c;
    expect_error(kl_config_load(&c, "/no/such/config.json"), KL_EIO, "/no/such/config.json");
    expect_error(kl_config_load(&c, "tests"), KL_EINVAL, "regular file");
    expect_error(kl_config_load(&c, "/dev/zero"), KL_EINVAL, "regular file");
    expect_error(kl_config_load(&c, "tests/golden/models/tiny/model.safetensors"), KL_EFORMAT, "at most 1048576 bytes");
}

static void presets_are_valid_and_survive_saving(void **state)
{
    (void)state;
    const char *path = in_scratch("config.json");
    for (int i = 0; kl_config_preset_name(i); i++) {
        kl_config c = preset(kl_config_preset_name(i)), back;
        assert_ok(kl_config_validate(&c));
        assert_ok(kl_config_save(&c, path));
        assert_ok(kl_config_load(&back, path));
        assert_memory_equal(&c, &back, sizeof c);
    }
    kl_config c;
    expect_error(kl_config_preset(&c, "49b"), KL_EINVAL, "49b");
}

/* Every variant goes through a file unchanged. */
static void variants_survive_saving(void **state)
{
    (void)state;
    static const char *const changes[] = {"hybrid=7:1", "hybrid=0:1", "hybrid=n:0", "gate=head", "gate=none", "gate=block:8", "gate_kind=bounded:-5", "rope=1",
                                          "output_gate=swish", "output_gate=none", "conv=0", "beta=sigmoid2", "router=softmax", "biased_weights=1", "tied=1",
                                          "first_dense=0", "kv_a_norm_eps=1e-5", "dtype=f16", "renormalize=0", "experts=0", "eos=-1", "norm_eps=0.3"};
    const char *path = in_scratch("config.json");
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        kl_config c = preset("tiny"), plain = c, back;
        assert_ok(kl_config_set(&c, changes[i]));
        assert_ok(kl_config_validate(&c));
        assert_memory_not_equal(&c, &plain, sizeof c);
        assert_ok(kl_config_save(&c, path));
        assert_ok(kl_config_load(&back, path));
        if (memcmp(&c, &back, sizeof c) != 0)
            fail_msg("%s is lost in the file", changes[i]);
    }
    kl_config c = preset("tiny"), back; /* dense between sparse layers: only the list of words can say it */
    c.sparse[3] = 0;
    assert_ok(kl_config_save(&c, path));
    assert_ok(kl_config_load(&back, path));
    assert_memory_equal(&c, &back, sizeof c);
}

static int mla_layers(const kl_config *c)
{
    int n = 0;
    for (int64_t i = 0; i < c->num_layers; i++)
        n += c->mixer[i] == KL_MIX_MLA;
    return n;
}

static void hybrid_ratios(void **state)
{
    (void)state;
    static const struct {
        const char *set;
        int mla;
    } cases[] = {{"hybrid=0:1", 27}, {"hybrid=1:1", 14}, {"hybrid=3:1", 7}, {"hybrid=7:1", 4}, {"hybrid=15:1", 2}, {"hybrid=n:0", 0}, {"hybrid=5:0", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kl_config c = preset("48b");
        assert_ok(kl_config_set(&c, cases[i].set));
        assert_ok(kl_config_validate(&c));
        assert_int_equal(mla_layers(&c), cases[i].mla);
        if (cases[i].mla)
            assert_int_equal(c.mixer[26], KL_MIX_MLA);
    }
}

static void gates_follow_the_head_size(void **state)
{
    (void)state;
    kl_config c = preset("tiny");
    assert_ok(kl_config_set(&c, "gate=block:8"));
    assert_int_equal(c.gate_values, 3);
    assert_ok(kl_config_set(&c, "head_dim=64"));
    assert_int_equal(c.gate_values, 8);
    assert_ok(kl_config_set(&c, "gate=channel"));
    assert_ok(kl_config_set(&c, "head_dim=32"));
    assert_int_equal(c.gate_values, 32);
    assert_ok(kl_config_set(&c, "gate=head"));
    assert_ok(kl_config_set(&c, "head_dim=64"));
    assert_int_equal(c.gate_values, 1);
    assert_ok(kl_config_set(&c, "layers=9"));
    assert_int_equal(mla_layers(&c), 3);
    assert_ok(kl_config_validate(&c));
}

static void unknown_options_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *set, *part;
    } cases[] = {{"hybird=3:1", "hybird"},  {"hybrid", "key=value"},      {"=3", "key=value"},        {"hybrid=3", "hybrid"},      {"hybrid=0:0", "hybrid"},
                 {"hybrid=-1:1", "hybrid"}, {"hybrid=n:1", "hybrid"},     {"gate=blok", "gate"},      {"gate=block:5", "24"},      {"gate=block:0", "gate"},
                 {"gate_kind=log", "gate_kind"}, {"gate_kind=bounded:x", "gate_kind"}, {"rope=2", "rope"}, {"conv=99", "conv"}, {"conv=4x", "conv"},
                 {"layers=0", "layers"},    {"layers=513", "layers"},     {"vocab=99999999999999999999", "vocab"}, {"dtype=int8", "dtype"},
                 {"output_gate=relu", "output_gate"}, {"beta=3", "beta"}, {"norm_eps=nan", "norm_eps"}, {"scaling=1e99", "scaling"}, {"top_k=", "top_k"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kl_config c = preset("tiny"), before = c;
        expect_error(kl_config_set(&c, cases[i].set), KL_EINVAL, cases[i].part);
        assert_memory_equal(&c, &before, sizeof c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(released_spelling_is_the_48b_preset),
        cmocka_unit_test(released_parameter_count),
        cmocka_unit_test(native_spelling_is_the_tiny_preset),
        cmocka_unit_test(golden_files),
        cmocka_unit_test(each_refusal_names_its_key),
        cmocka_unit_test(lists_and_types_must_agree),
        cmocka_unit_test(broken_json),
        cmocka_unit_test(files_that_are_none),
        cmocka_unit_test(presets_are_valid_and_survive_saving),
        cmocka_unit_test(variants_survive_saving),
        cmocka_unit_test(hybrid_ratios),
        cmocka_unit_test(gates_follow_the_head_size),
        cmocka_unit_test(unknown_options_are_refused),
    };
    return cmocka_run_group_tests_name("config", tests, make_scratch, remove_scratch);
}
