/* Random problems that walk through the contract's cases; a case is a function of the seed and its number alone. */
#include <string.h>

#include "common/rng.h"
#include "harness/verify.h"

static const int64_t token_counts[] = {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000};
static const int64_t dimensions[] = {1, 8, 24, 60, 64, 100, 128, 256};
enum { TOKEN_COUNTS = 14, DIMENSIONS = 8 };

static int64_t pick(kl_rng *r, const int64_t *from, int count) { return from[kl_rng_below(r, (uint64_t)count)]; }
#define PICK(r, ...) pick((r), (const int64_t[]){__VA_ARGS__}, sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))
static bool one_in(kl_rng *r, uint64_t n) { return kl_rng_below(r, n) == 0; }

/* On a device more is drawn, from a stream of its own: where the tensors lie and in which types, gates at their limits, states on the way. */
static void draw_device(kl_rng *r, kl_kda_spec *s, kl_placement *at)
{
    at->dtype = one_in(r, 4) ? KL_F32 : KL_BF16;
    at->state_dtype = one_in(r, 6) ? KL_BF16 : KL_F32;
    at->gap = PICK(r, 0, 0, 8, 5);
    at->pool = one_in(r, 3);
    at->in_place = one_in(r, 4);
    s->chunk_states = one_in(r, 3);
    s->token_states = s->T <= 129 && one_in(r, 4);
    s->backward = !s->token_states && !at->in_place;
    if (s->gate == KDA_GATE_LOG && s->G > 0 && s->K > 1 && one_in(r, 2))
        s->regime = KL_REGIME_ZERO + (kl_regime)kl_rng_below(r, KL_REGIMES - KL_REGIME_ZERO);
}

static kl_status random_kda(kl_case *c, kl_rng *r, int64_t i, kl_device device)
{
    int64_t lengths[6] = {0, 1, 15, 0, 0, 40};
    kl_kda_spec s = {.T = token_counts[i % TOKEN_COUNTS], .regime = (kl_regime)(i % 3), .backward = true, .seed = r->seed + (uint64_t)i};
    /* Long sequences meet small heads: the reference keeps every state. */
    int dims = s.T > 200 ? 4 : DIMENSIONS;
    s.K = pick(r, dimensions, dims);
    s.V = one_in(r, 2) ? s.K : pick(r, dimensions, dims);
    s.H = PICK(r, 1, 2, 3);
    s.HV = s.H * PICK(r, 1, 1, 2, 3);
    s.G = one_in(r, 2) ? s.K : PICK(r, 1, -1, s.K % 4 == 0 ? s.K / 4 : s.K, s.K % 2 == 0 ? s.K / 2 : 1);
    s.chunk = PICK(r, 0, 16, 32, 64, 128);
    /* With a single channel that decays slowly the gate's gradients are small differences of large terms, whatever computes them. */
    if (s.K == 1)
        s.regime = KL_REGIME_STRONG;
    s.gate = s.G < 0 || s.K == 1 ? KDA_GATE_LOG : (kda_gate)kl_rng_below(r, 3);
    s.beta_kind = (kda_beta)kl_rng_below(r, 3);
    s.state_layout = (kda_state_layout)kl_rng_below(r, 2);
    s.qk_l2norm = s.K > 1 && one_in(r, 2); /* a norm over one channel leaves only its sign: the gradient is all rounding */
    s.no_delta = one_in(r, 6);
    s.state = !one_in(r, 4);
    if (one_in(r, 3)) {
        lengths[4] = s.T;
        s.lengths = lengths;
        s.sequences = 6;
    } else {
        s.B = PICK(r, 1, 1, 2);
    }
    if (device == KL_CPU)
        return kl_case_kda(c, &s);
    kl_placement at;
    draw_device(&(kl_rng){.seed = r->seed, .stream = r->stream + (UINT64_C(1) << 32)}, &s, &at);
    KL_TRY(kl_case_kda(c, &s));
    return kl_case_place(c, &at, NULL);
}

/* The released sizes more often than others, which a device may leave to the cpu. */
static void draw_mla_on_device(kl_rng *r, kl_mla_spec *s, kl_placement *at)
{
    *at = (kl_placement){.dtype = KL_BF16, .gap = PICK(r, 0, 0, 8)};
    s->latent_dtype = s->weight_dtype = KL_BF16;
    s->H = PICK(r, 1, 2, 3, 5);
    if (one_in(r, 6))
        return;
    s->R = 512;
    s->Dn = s->Dv = 128;
    s->Dr = 64;
    s->Tq = PICK(r, 0, 1, 1, 2, 5, 8);
}

static kl_status random_mla(kl_case *c, kl_rng *r, int64_t i, kl_device device)
{
    int64_t lengths[3] = {token_counts[i % (TOKEN_COUNTS - 1)], 1, 70};
    kl_mla_spec s = {.N = PICK(r, 1, 2), .T = lengths[0], .backward = true, .seed = r->seed + (uint64_t)i};
    s.Tq = PICK(r, 0, 0, 1, 5, 40);
    s.H = PICK(r, 1, 2, 3, 4);
    s.R = PICK(r, 8, 24, 60, 128, 512);
    s.Dn = PICK(r, 8, 24, 60, 128);
    s.Dr = PICK(r, 8, 16, 64);
    s.Dv = PICK(r, 8, 24, 100, 128);
    s.latent_dtype = one_in(r, 2) ? KL_F32 : KL_BF16;
    s.weight_dtype = (kl_dtype)PICK(r, KL_F32, KL_BF16, KL_F16);
    if (one_in(r, 3)) {
        s.lengths = lengths;
        s.N = 3;
    }
    s.given = i % 2;
    if (device == KL_CPU)
        return kl_case_mla(c, &s);
    kl_placement at;
    draw_mla_on_device(&(kl_rng){.seed = r->seed, .stream = r->stream + (UINT64_C(1) << 32)}, &s, &at);
    KL_TRY(kl_case_mla(c, &s));
    return kl_case_place(c, &at, NULL);
}

/* Widths in eights more often than others, which a device may leave to the cpu. */
static void draw_moe_on_device(kl_rng *r, kl_moe_spec *s)
{
    s->weight_dtype = KL_BF16;
    if (one_in(r, 6))
        return;
    s->D = PICK(r, 8, 24, 96, 128, 200);
    s->I = PICK(r, 8, 24, 72, 136);
    s->Is = s->E == 0 ? s->I : PICK(r, 0, 24, 104);
}

static kl_status random_moe(kl_case *c, kl_rng *r, int64_t i, kl_device device)
{
    kl_moe_spec s = {.T = token_counts[i % (TOKEN_COUNTS - 1)], .backward = true, .seed = r->seed + (uint64_t)i};
    s.D = PICK(r, 8, 24, 60, 100, 128);
    s.E = PICK(r, 0, 1, 4, 8, 16, 64);
    s.I = PICK(r, 8, 24, 60, 128);
    s.Is = s.E == 0 ? s.I : PICK(r, 0, 24, 100);
    s.top_k = s.E ? 1 + (int64_t)kl_rng_below(r, (uint64_t)(s.E < 8 ? s.E : 8)) : 0;
    if (s.E >= 8 && one_in(r, 3)) {
        s.n_group = 4;
        s.topk_group = 2;
        s.top_k = s.top_k < s.E / 2 ? s.top_k : s.E / 2;
    }
    s.router_kind = one_in(r, 3) ? MOE_SOFTMAX : MOE_SIGMOID;
    s.renormalize = s.top_k > 1 && !one_in(r, 3); /* the one weight of top 1 is 1 whatever the router says: its gradient is all rounding */
    s.biased_weights = 2 * s.top_k <= s.E && one_in(r, 4);
    s.scale = one_in(r, 2) ? 2.446f : 0.0f;
    s.weight_dtype = (kl_dtype)PICK(r, KL_F32, KL_BF16, KL_F16);
    if (device == KL_CPU)
        return kl_case_moe(c, &s);
    draw_moe_on_device(&(kl_rng){.seed = r->seed, .stream = r->stream + (UINT64_C(1) << 32)}, &s);
    KL_TRY(kl_case_moe(c, &s));
    return kl_case_place(c, &(kl_placement){.dtype = KL_BF16}, NULL);
}

/* On a device the same problem as a general one too, where it can be put so. Not with a single channel: what one token writes the next
 * erases, and rounding the factors of either by themselves leaves the difference uncertain. */
static kl_status verify_general(kl_verifier *v, const kl_case *kda)
{
    const kda_problem *p = &kda->problem.kda;
    if (kda->family != KL_FAMILY_KDA || v->ctx->device == KL_CPU || p->gate != KDA_GATE_LOG || p->beta_kind != KDA_BETA_PLAIN || p->qk_l2norm ||
        p->no_delta || p->state_layout != KDA_STATE_KV || p->K == 1)
        return kl_ok();
    kl_case c;
    KL_TRY(kl_case_dplr(&c, kda));
    char name[sizeof c.name];
    snprintf(name, sizeof name, "%.160s as DPLR", kda->name);
    memcpy(c.name, name, sizeof name);
    kl_status s = kl_case_place(&c, &(kl_placement){.dtype = KL_BF16}, NULL);
    if (!kl_failed(s))
        s = kl_verify_case(v, &c, false);
    kl_case_free(&c);
    return s;
}

kl_status kl_verify_random(kl_verifier *v, kl_family family, uint64_t seed, int64_t cases)
{
    for (int64_t i = 0; i < cases; i++) {
        kl_rng r = kl_rng_make(seed, (uint64_t)i);
        kl_case c;
        kl_status s = family == KL_FAMILY_MLA ? random_mla(&c, &r, i, v->ctx->device) : family == KL_FAMILY_MOE ? random_moe(&c, &r, i, v->ctx->device) : random_kda(&c, &r, i, v->ctx->device);
        KL_TRY(kl_error_in(s, "random case %lld of seed %llu", (long long)i, (unsigned long long)seed));
        char name[sizeof c.name];
        snprintf(name, sizeof name, "%lld: %.160s", (long long)i, c.name);
        memcpy(c.name, name, sizeof name);
        s = kl_verify_case(v, &c, false);
        if (!kl_failed(s))
            s = verify_general(v, &c);
        if (!kl_failed(s) && family == KL_FAMILY_MLA && !v->only)
            s = kl_verify_rope(v, seed, i);
        kl_case_free(&c);
        KL_TRY(s);
    }
    return kl_ok();
}
