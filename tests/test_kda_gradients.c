/* Gradients: any branch missing or unwanted, sums that accumulate, strong decay, long sequences; and what either pass refuses. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "tests/kda_check.h"

static void missing_gradient_branches(void **state)
{
    (void)state;
    for (int bits = 0; bits < 8; bits++)
        check_both((case_options){.B = 1, .T = 50, .H = 1, .HV = 2, .K = 16, .V = 12, .G = 16, .gate = KDA_GATE_SOFTPLUS,
                                  .no_h0 = bits & 1, .no_dht = bits & 2, .no_d_o = bits & 4, .decay = DECAY_SLOW, .seed = 1});
}

static void an_unwanted_gradient_changes_no_other(void **state)
{
    (void)state;
    const case_options opt = {.B = 2, .T = 40, .H = 1, .HV = 2, .K = 16, .V = 12, .G = 4, .gate = KDA_GATE_BOUNDED, .l2norm = true, .seed = 1};
    kda_case *all = ran(opt, "chunk", KL_BACKWARD, 1);
    float *const results[] = {all->g.dq, all->g.dk, all->g.dv, all->g.dg, all->g.dbeta, all->g.dA_log, all->g.ddt_bias, all->g.dh0};
    const int64_t sizes[] = {80 * 16, 80 * 16, 80 * 24, 80 * 8, 160, 2, 8, 2 * 2 * 16 * 12};
    for (int missing = 0; missing < 8; missing++) {
        kda_case *c = case_new(opt);
        void *kept[] = {c->g.dq, c->g.dk, c->g.dv, c->g.dg, c->g.dbeta, c->g.dA_log, c->g.ddt_bias, c->g.dh0};
        switch (missing) {
        case 0: c->g.dq = NULL; break;
        case 1: c->g.dk = NULL; break;
        case 2: c->g.dv = NULL; break;
        case 3: c->g.dg = NULL; break;
        case 4: c->g.dbeta = NULL; break;
        case 5: c->g.dA_log = NULL; break;
        case 6: c->g.ddt_bias = NULL; break;
        case 7: c->g.dh0 = NULL; break;
        }
        assert_ok(case_run(c, "chunk", KL_BACKWARD, 1));
        for (int i = 0; i < 8; i++)
            if (i != missing)
                assert_true(same_bits(kept[i], results[i], sizes[i]));
        case_free(c);
    }
    case_free(all);
}

static void parameter_gradients_accumulate_and_activations_overwrite(void **state)
{
    (void)state;
    kda_case *c = ran((case_options){.B = 1, .T = 30, .H = 1, .K = 8, .V = 8, .G = 8, .gate = KDA_GATE_SOFTPLUS, .seed = 1}, "chunk", KL_BACKWARD, 1);
    float dA = c->g.dA_log[0], dbias = c->g.ddt_bias[3], dq = ((float *)c->g.dq)[5];
    assert_ok(case_run(c, "chunk", KL_BACKWARD, 1));
    assert_true(fabsf(c->g.dA_log[0] - 2.0f * dA) <= 1e-5f * fabsf(dA));
    assert_true(fabsf(c->g.ddt_bias[3] - 2.0f * dbias) <= 1e-5f * fabsf(dbias));
    assert_true(((float *)c->g.dq)[5] == dq);
    case_free(c);
}

/* At -5 a token nearly all of dg is what the pairs i = j would add and take away again: each head and each stretch of
 * time is scored by itself. */
static void decay_gradient_at_strong_decay_per_head_and_window(void **state)
{
    (void)state;
    kda_case *c = ran((case_options){.B = 1, .T = 192, .H = 2, .K = 64, .V = 64, .G = 64, .decay = DECAY_FIVE, .seed = 1}, "chunk", KL_BACKWARD, 2);
    case_reference(c, true);
    assert_true(kl_within(kl_rel_err_blocks(c->g.dg, c->dg, 192, 2, 64, 16), kl_tol_kda_f32.gradient));
    case_free(c);
}

/* Longer than the segment of states that backward keeps: it goes by checkpoints. */
static void backward_of_a_long_sequence(void **state)
{
    (void)state;
    check_both((case_options){.B = 1, .T = 16 * 64 * 3 + 21, .H = 1, .K = 8, .V = 4, .G = 8, .decay = DECAY_SLOW, .chunk = 16, .seed = 1});
}

/* ---- refusals and dispatch ---- */

static void refused(kda_case *c, kda_problem p, const char *variant, kl_pass pass, kl_code code, const char *name)
{
    kda_problem good = c->p;
    c->p = p;
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 1}));
    const kl_variant *v = kda_pick(KL_CPU, variant, &good, pass);
    static _Alignas(64) char workspace[1 << 22];
    kl_status s = pass == KL_FORWARD ? v->forward(ctx, &p, workspace, sizeof workspace) : v->backward(ctx, &p, &c->g, workspace, sizeof workspace);
    kl_ctx_destroy(ctx);
    c->p = good;
    if (s.code != code || !strstr(s.message, name))
        fail_msg("expected a refusal of %s, got %s \"%s\"", name, kl_code_name(s.code), s.message);
}

static void wrong_and_unsupported_options_are_refused_by_name(void **state)
{
    (void)state;
    const int64_t lengths[] = {3, 4}, down[] = {0, 5, 3}, late[] = {1, 3, 7}, twice[] = {1, 1}, beyond[] = {0, 2};
    kda_case *c = case_new((case_options){.B = 2, .lengths = lengths, .H = 2, .HV = 4, .K = 8, .V = 8, .G = 8, .gate = KDA_GATE_SOFTPLUS, .seed = 1});
    float somewhere[7 * 4 * 64];
#define REFUSED(change, code, name)                         \
    do {                                                    \
        kda_problem p = c->p;                               \
        change;                                             \
        refused(c, p, "chunk", KL_FORWARD, code, name);     \
    } while (0)
    REFUSED(p.dtype = KL_BF16, KL_EUNSUPPORTED, "dtype");
    REFUSED(p.dtype = KL_I32, KL_EINVAL, "dtype");
    REFUSED(p.state_dtype = KL_BF16, KL_EUNSUPPORTED, "state_dtype");
    REFUSED(p.state_dtype = KL_F16, KL_EINVAL, "state_dtype");
    REFUSED(p.state_layout = (kda_state_layout)2, KL_EINVAL, "state_layout");
    REFUSED(p.H = 0, KL_EINVAL, "H:");
    REFUSED(p.HV = 3, KL_EINVAL, "HV:");
    REFUSED(p.K = 257, KL_EINVAL, "K:");
    REFUSED(p.V = 0, KL_EINVAL, "V:");
    REFUSED(p.G = 3, KL_EINVAL, "G:");
    REFUSED(p.B = 2, KL_EINVAL, "B:");
    REFUSED(p.T = 6, KL_EINVAL, "cu_seqlens");
    REFUSED(p.T = -1, KL_EINVAL, "T:");
    REFUSED(p.N = -1, KL_EINVAL, "N:");
    REFUSED(p.cu_seqlens = down, KL_EINVAL, "cu_seqlens");
    REFUSED(p.cu_seqlens = late, KL_EINVAL, "cu_seqlens");
    REFUSED(p.cu_seqlens = NULL, KL_EINVAL, "N:");
    REFUSED(p.state_index = twice, KL_EINVAL, "state_index");
    REFUSED(p.state_index = beyond, KL_EINVAL, "state_index");
    REFUSED(p.state_pool = 1, KL_EINVAL, "state_pool");
    REFUSED(p.scale = NAN, KL_EINVAL, "scale");
    REFUSED(p.gate = (kda_gate)3, KL_EINVAL, "gate");
    REFUSED(p.lower_bound = -5.0f, KL_EINVAL, "lower_bound");
    REFUSED((p.gate = KDA_GATE_BOUNDED, p.lower_bound = -6.0f), KL_EINVAL, "lower_bound");
    REFUSED(p.gate = KDA_GATE_BOUNDED, KL_EINVAL, "lower_bound");
    REFUSED(p.beta_kind = (kda_beta)9, KL_EINVAL, "beta_kind");
    REFUSED(p.chunk = 48, KL_EINVAL, "chunk");
    REFUSED(p.q = NULL, KL_EINVAL, "q:");
    REFUSED(p.g = NULL, KL_EINVAL, "g:");
    REFUSED(p.o = NULL, KL_EINVAL, "o:");
    REFUSED(p.o = (void *)p.v, KL_EINVAL, "o:");
    REFUSED(p.A_log = NULL, KL_EINVAL, "A_log");
    REFUSED(p.gate = KDA_GATE_LOG, KL_EINVAL, "A_log");
    REFUSED((p.G = 0, p.g = NULL), KL_EINVAL, "gate");
    REFUSED(p.token_states = somewhere, KL_EUNSUPPORTED, "token_states");
    kda_problem p = c->p;
    p.ht = (void *)p.h0;
    refused(c, p, "chunk", KL_BACKWARD, KL_EINVAL, "ht:");
    p = c->p;
    p.dt_bias = NULL;
    refused(c, p, "chunk", KL_BACKWARD, KL_EINVAL, "ddt_bias");
    case_free(c);
}

static void too_small_a_workspace_is_refused(void **state)
{
    (void)state;
    kda_case *c = case_new((case_options){.B = 1, .T = 20, .H = 1, .K = 16, .V = 16, .G = 16, .seed = 1});
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.threads = 1}));
    for (int v = 0; v < 3; v++) {
        kl_pass pass = v == 2 ? KL_BACKWARD : KL_FORWARD;
        const kl_variant *variant = kda_pick(KL_CPU, cpu_variants[v ? 1 : 0], &c->p, pass);
        size_t bytes = variant->workspace(ctx, &c->p, pass) - 1;
        void *workspace = aligned_alloc(64, (bytes + 64) / 64 * 64);
        kl_status s = pass == KL_FORWARD ? variant->forward(ctx, &c->p, workspace, bytes) : variant->backward(ctx, &c->p, &c->g, workspace, bytes);
        assert_int_equal(s.code, KL_EINVAL);
        assert_non_null(strstr(s.message, "workspace"));
        free(workspace);
    }
    kl_ctx_destroy(ctx);
    case_free(c);
}

static void dispatch_picks_by_shape_and_by_name(void **state)
{
    (void)state;
    kda_case *c = case_new((case_options){.B = 3, .T = 1, .H = 1, .K = 8, .V = 8, .G = 8, .seed = 1});
    assert_string_equal(kda_pick(KL_CPU, NULL, &c->p, KL_FORWARD)->name, "recurrent");
    c->p.T = 4096;
    assert_string_equal(kda_pick(KL_CPU, NULL, &c->p, KL_FORWARD)->name, "chunk");
    assert_string_equal(kda_pick(KL_CPU, NULL, &c->p, KL_BACKWARD)->name, "chunk");
    assert_string_equal(kda_pick(KL_CPU, "recurrent", &c->p, KL_FORWARD)->name, "recurrent");
    assert_null(kda_pick(KL_CPU, "recurent", &c->p, KL_FORWARD));
    case_free(c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(missing_gradient_branches),
        cmocka_unit_test(an_unwanted_gradient_changes_no_other),
        cmocka_unit_test(parameter_gradients_accumulate_and_activations_overwrite),
        cmocka_unit_test(decay_gradient_at_strong_decay_per_head_and_window),
        cmocka_unit_test(backward_of_a_long_sequence),
        cmocka_unit_test(wrong_and_unsupported_options_are_refused_by_name),
        cmocka_unit_test(too_small_a_workspace_is_refused),
        cmocka_unit_test(dispatch_picks_by_shape_and_by_name),
    };
    return cmocka_run_group_tests_name("kda_gradients", tests, NULL, NULL);
}
