#include <stddef.h>
#include <string.h>

#include "harness/bench.h"
#include "harness/cli.h"

/* The shapes that a device is measured at. */
static const kl_shape_list lists[] = {
    {"kda", "ten", "T=2048,H=12;T=2048,H=16;T=4096,H=8;T=4096,H=12;T=8192,N=4,H=12;T=8192,H=16;T=1024,H=4;T=3072,H=10;T=8192,H=24;T=16384,N=8,H=16",
     "the ten shapes", {[KL_BENCH_FWD] = true}},
    {"kda", "heads32", "T=8192,H=32;T=32768;T=131072", "the released model's heads", {[KL_BENCH_FWD] = true}},
    {"kda", "heads96", "T=8192,H=64;T=8192,H=96;lengths=1300+547+2048+963+271+3063;T=8192,N=8", "many heads, one sequence and several", {[KL_BENCH_FWD] = true}},
    {"kda", "train", "T=8192,H=32,raw=1", "forward and backward with gate, norms and sigmoid inside", {[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true, [KL_BENCH_FWDBWD] = true}},
    {"kda", "decode", "T=1,H=32,B=8;B=32;B=64;B=128;B=256;B=8,value_first=1;B=32;B=64;B=128;B=256", "one token for each of B sequences, the state [K,V] and [V,K]", {[KL_BENCH_DECODE] = true}},
    {"kda", "fig2", "T=2048,H=16,dplr=1;T=4096;T=8192;T=16384;T=32768;T=65536;T=2048,G=8,dplr=0;T=4096;T=8192;T=16384;T=32768;T=65536;"
     "T=2048,G=1;T=4096;T=8192;T=16384;T=32768;T=65536", "KDA and general DPLR, gates a block of 16, gates a head", {[KL_BENCH_FWD] = true}},
    {"kda", "gates", "T=8192,H=32;G=32;G=8;G=1;G=0", "gates a channel, a block, a head, and none", {[KL_BENCH_FWD] = true}},
    {"mla", "prefill", "T=8192,H=32;T=16384;T=32768", "the released model's heads, all keys from the queries' own tokens", {[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true}},
    {"mla", "again", "T=8192,H=32,again=1;T=16384", "backward passes that are not given the results of the forward pass", {[KL_BENCH_BWD] = true}},
    {"mla", "alone", "T=8192,H=32,R=64;T=16384", "hardly any expansion: as near as it gets to attention alone", {[KL_BENCH_FWD] = true, [KL_BENCH_BWD] = true}},
    {"mla", "few", "T=32768,H=32,Tq=32;Tq=64;Tq=128;Tq=256;T=131072,Tq=32;Tq=64;Tq=128;Tq=256", "some queries at the end of a long latent cache", {[KL_BENCH_FWD] = true}},
    {"mla", "late", "T=32768,Tq=2048,H=32;T=131072", "2048 queries at the end of a long latent cache", {[KL_BENCH_FWD] = true}},
    {"moe", "tokens", "T=32768,D=2304,E=256,I=1024,top_k=8,Is=0;T=8192;T=2048;T=512;T=64;T=8;T=1", "the released model's routed experts", {[KL_BENCH_FWD] = true}},
    {"moe", "train", "T=32768,D=2304,E=256,I=1024,top_k=8,Is=0;T=8192", "the same, backward", {[KL_BENCH_BWD] = true}},
    {"mla", "decode", "T=1048576,N=1,H=32;T=131072,N=8;T=4096,N=128", "one token for each of N sequences", {[KL_BENCH_DECODE] = true}},
};

const kl_shape_list *kl_shape_lists(int *count)
{
    *count = (int)(sizeof lists / sizeof *lists);
    return lists;
}

/* N sequences of about T / N tokens. */
static kl_status pack(kl_shape *s)
{
    KL_REQUIRE(s->N <= KL_SHAPE_LENGTHS && s->N <= s->T, "--shapes: N: expected at most %d sequences and T tokens, got %lld", KL_SHAPE_LENGTHS, (long long)s->N);
    s->length_count = s->N;
    for (int64_t n = 0; n < s->N; n++)
        s->lengths[n] = s->T * (n + 1) / s->N - s->T * n / s->N;
    return kl_ok();
}

/* Which key sets which field, for which families. */
static const struct shape_key {
    const char *name, *families;
    size_t offset;
    int64_t low, high;
} keys[] = {
    {"B", "kda layers model", offsetof(kl_shape, B), 1, 1 << 24},
    {"T", "kda mla moe layers model", offsetof(kl_shape, T), 0, INT64_C(1) << 36},
    {"H", "kda mla", offsetof(kl_shape, H), 1, 4096},
    {"HV", "kda", offsetof(kl_shape, HV), 1, 65536},
    {"K", "kda", offsetof(kl_shape, K), 1, KDA_MAX_DIM},
    {"K", "layers", offsetof(kl_shape, K), 1, 1 << 20},
    {"V", "kda", offsetof(kl_shape, V), 1, KDA_MAX_DIM},
    {"V", "layers", offsetof(kl_shape, V), 1, 1 << 24},
    {"G", "kda", offsetof(kl_shape, G), 0, KDA_MAX_DIM},
    {"C", "kda model", offsetof(kl_shape, C), 1, 1 << 24},
    {"C", "layers", offsetof(kl_shape, C), 1, INT64_C(1) << 36},
    {"raw", "kda", offsetof(kl_shape, raw), 0, 1},
    {"dplr", "kda", offsetof(kl_shape, dplr), 0, 1},
    {"value_first", "kda", offsetof(kl_shape, value_first), 0, 1},
    {"N", "kda mla layers", offsetof(kl_shape, N), 1, 1 << 24},
    {"Tq", "mla", offsetof(kl_shape, Tq), 0, INT64_C(1) << 36},
    {"again", "mla", offsetof(kl_shape, again), 0, 1},
    {"R", "mla", offsetof(kl_shape, R), 1, 4096},
    {"Dn", "mla", offsetof(kl_shape, Dn), 0, 4096},
    {"Dr", "mla", offsetof(kl_shape, Dr), 0, 4096},
    {"Dv", "mla", offsetof(kl_shape, Dv), 1, 4096},
    {"D", "moe layers", offsetof(kl_shape, D), 1, 1 << 20},
    {"E", "moe", offsetof(kl_shape, E), 0, 65536},
    {"I", "moe layers", offsetof(kl_shape, I), 0, 1 << 20},
    {"Is", "moe", offsetof(kl_shape, Is), 0, 1 << 20},
    {"top_k", "moe", offsetof(kl_shape, top_k), 1, 65536},
    {"new", "model", offsetof(kl_shape, new_tokens), 1, 1 << 24},
};
enum { KEYS = sizeof keys / sizeof *keys };

static bool has_word(const char *list, const char *word)
{
    size_t n = strlen(word);
    for (const char *at = list; (at = strstr(at, word)); at += n)
        if ((at == list || at[-1] == ' ') && (at[n] == ' ' || !at[n]))
            return true;
    return false;
}

static kl_status unknown_key(const char *family, const char *name)
{
    char known[256] = "";
    for (int i = 0; i < KEYS; i++) {
        size_t used = strlen(known);
        if (has_word(keys[i].families, family))
            snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", keys[i].name);
    }
    const char *more = strcmp(family, "kda") == 0 ? ", lengths" : strcmp(family, "mla") == 0 ? ", lengths, latent, weight"
                     : strcmp(family, "moe") == 0 ? ", weight" : "";
    return kl_error(KL_EINVAL, "--shapes: %s has no key '%s'; it has %s%s", family, name, known, more);
}

static kl_status parse_dtype(const char *name, const char *text, bool half, kl_dtype *out)
{
    *out = strcmp(text, "bf16") == 0 ? KL_BF16 : strcmp(text, "f16") == 0 && half ? KL_F16 : KL_F32;
    KL_REQUIRE(*out != KL_F32 || strcmp(text, "f32") == 0, "--shapes: %s: expected f32%s or bf16, got '%s'", name, half ? ", f16" : "", text);
    return kl_ok();
}

static kl_status parse_lengths(char *text, kl_shape *s)
{
    char *item;
    s->length_count = s->N = 0;
    while ((item = strsep(&text, "+"))) {
        KL_REQUIRE(s->length_count < KL_SHAPE_LENGTHS, "--shapes: lengths: expected at most %d", KL_SHAPE_LENGTHS);
        KL_TRY(cli_tokens("--shapes: lengths", item, &s->lengths[s->length_count++]));
    }
    return kl_ok();
}

static kl_status set_key(const char *family, const char *name, char *value, kl_shape *s)
{
    bool packed = strcmp(family, "kda") == 0 || strcmp(family, "mla") == 0;
    if (strcmp(name, "lengths") == 0 && packed)
        return parse_lengths(value, s);
    if (strcmp(name, "latent") == 0 && strcmp(family, "mla") == 0)
        return parse_dtype(name, value, false, &s->latent);
    if (strcmp(name, "weight") == 0 && (strcmp(family, "mla") == 0 || strcmp(family, "moe") == 0))
        return parse_dtype(name, value, true, &s->weight);
    for (int i = 0; i < KEYS; i++) {
        if (strcmp(name, keys[i].name) != 0 || !has_word(keys[i].families, family))
            continue;
        int64_t n;
        char label[48];
        snprintf(label, sizeof label, "--shapes: %s", name);
        KL_TRY(cli_tokens(label, value, &n));
        KL_REQUIRE(n >= keys[i].low && n <= keys[i].high, "%s: expected %lld to %lld, got %s", label, (long long)keys[i].low,
                   (long long)keys[i].high, value);
        memcpy((char *)s + keys[i].offset, &n, sizeof n);
        if (strcmp(name, "T") == 0)
            s->length_count = s->N = 0;
        if (strcmp(name, "G") == 0 && n == 0)
            s->G = -1;
        return kl_ok();
    }
    return unknown_key(family, name);
}

kl_status kl_shapes_parse(const char *family, const char *text, const kl_shape *first, kl_shape *shapes, int *count)
{
    char copy[4096], *rest = copy, *one;
    KL_REQUIRE(strlen(text) < sizeof copy, "--shapes: expected at most %zu characters", sizeof copy - 1);
    strcpy(copy, text);
    kl_shape s = *first;
    *count = 0;
    while ((one = strsep(&rest, ";"))) {
        char *pair;
        KL_REQUIRE(*count < KL_SHAPES, "--shapes: expected at most %d cases", KL_SHAPES);
        while ((pair = strsep(&one, ","))) {
            char *value = strchr(pair, '=');
            KL_REQUIRE(value && value != pair && value[1], "--shapes: expected KEY=VALUE, got '%s'", pair);
            *value = '\0';
            KL_TRY(set_key(family, pair, value + 1, &s));
        }
        if (strcmp(family, "kda") == 0 && s.N > 1)
            KL_TRY(pack(&s));
        shapes[(*count)++] = s;
    }
    return kl_ok();
}
