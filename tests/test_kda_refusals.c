/* Bad input on a device: refused by name before anything is launched or written; a device too old or too full says so. On
 * an emulated device, so that it needs no GPU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>

#include "harness/problem.h"
#include "tests/device.h"
#include "tests/expect.h"

static kl_case base;
static void *workspace;
static size_t room;

static int open_device(void **state)
{
    (void)state;
    if (open_ctx() || !ctx)
        return ctx == NULL && kl_gpu_count() > 0;
    assert_ok(kl_case_kda(&base, &(kl_kda_spec){.lengths = (const int64_t[]){30, 10}, .sequences = 2, .H = 2, .HV = 4, .K = 32, .V = 16, .G = 8,
                                                .gate = KDA_GATE_BOUNDED, .state = true, .backward = true, .seed = 1}));
    assert_ok(kl_case_place(&base, &(kl_placement){.dtype = KL_BF16}, NULL));
    assert_ok(kl_case_upload(ctx, &base));
    const kda_problem *p = kl_case_problem(&base, KL_CUDA);
    for (kl_pass pass = KL_FORWARD; pass <= KL_BACKWARD; pass++) {
        size_t bytes = kda_workspace(ctx, p, pass);
        room = bytes > room ? bytes : room;
    }
    return kl_failed(kl_gpu_alloc(ctx, &workspace, room));
}

static int close_device(void **state)
{
    (void)state;
    if (workspace)
        kl_gpu_free(ctx, workspace);
    kl_case_free(&base);
    return close_ctx();
}

static kda_problem good(void) { return *(const kda_problem *)kl_case_problem(&base, KL_CUDA); }

/* o as the poison that kl_case_upload left there. */
static bool untouched(const kda_problem *p)
{
    enum { BYTES = 40 * 64 * 2 };
    unsigned char o[BYTES];
    assert_ok(kl_gpu_sync(ctx));
    if (!p->o)
        return true;
    assert_ok(kl_gpu_copy(ctx, o, p->o, BYTES));
    for (int i = 0; i < BYTES; i++)
        if (o[i] != 0xff)
            return false;
    return true;
}

/* The call that dispatches, and every variant by itself. */
static void refused(const kda_problem *p, kl_code code, const char *part)
{
    int count;
    const kl_variant *v = kda_variants(&count);
    expect_error(kda_forward(ctx, p, workspace, room), code, part);
    for (int i = 0; i < count; i++)
        if (v[i].device == KL_CUDA)
            expect_error(v[i].forward(ctx, p, workspace, room), code, part);
    assert_true(untouched(p));
}

/* ---- arguments ---- */

static void wrong_types(void **state)
{
    NEEDS_DEVICE();
    static const kl_dtype wrong[] = {KL_F16, KL_F64, KL_I32, (kl_dtype)99};
    for (int i = 0; i < 4; i++) {
        kda_problem p = good();
        p.dtype = wrong[i];
        refused(&p, KL_EINVAL, "kda: dtype: expected float32 or bfloat16");
        p = good();
        p.state_dtype = wrong[i];
        refused(&p, KL_EINVAL, "kda: state_dtype: expected float32 or bfloat16");
    }
}

static void wrong_layouts_and_strides(void **state)
{
    NEEDS_DEVICE();
    kda_problem p = good();
    p.state_layout = (kda_state_layout)2;
    refused(&p, KL_EINVAL, "kda: state_layout: expected");
    p = good();
    struct { int64_t *stride, width; const char *name; } all[] = {{&p.q_stride, 64, "q_stride"}, {&p.k_stride, 64, "k_stride"}, {&p.v_stride, 64, "v_stride"},
                                                                  {&p.g_stride, 32, "g_stride"}, {&p.beta_stride, 4, "beta_stride"}, {&p.o_stride, 64, "o_stride"}};
    for (int i = 0; i < 6; i++) {
        *all[i].stride = all[i].width - 1;
        refused(&p, KL_EINVAL, all[i].name);
        *all[i].stride = 0;
    }
}

static void wrong_dimensions(void **state)
{
    NEEDS_DEVICE();
    kda_problem p = good();
    struct { int64_t *size, value; const char *part; } all[] = {
        {&p.K, 257, "kda: K: expected 1..256, got 257"}, {&p.K, 0, "kda: K:"}, {&p.V, 257, "kda: V: expected 1..256, got 257"}, {&p.H, 0, "kda: H:"},
        {&p.HV, 3, "kda: HV: expected a multiple of H = 2, got 3"}, {&p.G, 5, "kda: G:"}, {&p.T, -1, "kda: T:"}, {&p.T, 41, "kda: cu_seqlens[N]"},
        {&p.B, 2, "kda: B: expected 1 with cu_seqlens"}, {&p.chunk, 48, "kda: chunk:"}, {&p.state_pool, -1, "kda: state_pool:"}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        int64_t kept = *all[i].size;
        *all[i].size = all[i].value;
        refused(&p, KL_EINVAL, all[i].part);
        *all[i].size = kept;
    }
}

static void wrong_options_and_missing_tensors(void **state)
{
    NEEDS_DEVICE();
    kda_problem p = good();
    p.lower_bound = -7.0f;
    refused(&p, KL_EINVAL, "kda: lower_bound:");
    p = good();
    p.gate = (kda_gate)7;
    refused(&p, KL_EINVAL, "kda: gate:");
    p = good();
    p.A_log = NULL;
    refused(&p, KL_EINVAL, "kda: A_log:");
    p = good();
    p.o = (void *)p.v;
    expect_error(kda_forward(ctx, &p, workspace, room), KL_EINVAL, "kda: o:");
    p = good();
    const void **tensor[] = {&p.q, &p.k, &p.v, &p.g, &p.beta};
    static const char *const name[] = {"kda: q:", "kda: k:", "kda: v:", "kda: g:", "kda: beta:"};
    for (int i = 0; i < 5; i++) {
        const void *kept = *tensor[i];
        *tensor[i] = NULL;
        refused(&p, KL_EINVAL, name[i]);
        *tensor[i] = kept;
    }
}

static void a_workspace_that_is_missing_or_too_small(void **state)
{
    NEEDS_DEVICE();
    kda_problem p = good();
    const kda_grads *g = &base.grads.kda; /* never reached */
    int count;
    const kl_variant *v = kda_variants(&count);
    for (int i = 0; i < count; i++)
        for (kl_pass pass = KL_FORWARD; pass <= KL_BACKWARD; pass++) {
            if (v[i].device != KL_CUDA || (pass == KL_BACKWARD && !v[i].backward) || kl_failed(v[i].check(&p, pass)))
                continue;
            size_t need = v[i].workspace(ctx, &p, pass);
            if (need == 0)
                continue;
            for (int given = 0; given < 2; given++) {
                void *memory = given ? workspace : NULL;
                size_t bytes = given ? need - 1 : 0;
                kl_status s = pass == KL_FORWARD ? v[i].forward(ctx, &p, memory, bytes) : v[i].backward(ctx, &p, g, memory, bytes);
                expect_error(s, KL_EINVAL, "workspace: expected");
            }
        }
    assert_true(untouched(&p));
}

/* A variant that says in check() that it does not offer a problem says the same when it is called with it. */
static void what_is_not_offered_is_refused_when_called(void **state)
{
    NEEDS_DEVICE();
    int count;
    const kl_variant *v = kda_variants(&count);
    for (int change = 0; change < 5; change++) {
        kda_problem p = good();
        switch (change) {
        case 0: p.dtype = KL_F32; break;
        case 1: p.state_dtype = KL_BF16; break;
        case 2: p.token_states = p.ht; break;
        case 3: p.q_stride = 65; break;
        case 4: p.k = (const char *)p.k + 2; break;
        }
        for (int i = 0; i < count; i++)
            for (kl_pass pass = KL_FORWARD; pass <= KL_BACKWARD; pass++) {
                if (v[i].device != KL_CUDA || (pass == KL_BACKWARD && !v[i].backward))
                    continue;
                kl_status said = v[i].check(&p, pass);
                if (!kl_failed(said))
                    continue;
                assert_int_equal(said.code, KL_EUNSUPPORTED);
                kl_status s = pass == KL_FORWARD ? v[i].forward(ctx, &p, workspace, room) : v[i].backward(ctx, &p, &base.grads.kda, workspace, room);
                expect_error(s, KL_EUNSUPPORTED, said.message);
            }
        assert_true(untouched(&p));
    }
}

/* ---- dispatch and sizes ---- */

static void dispatch_picks_what_offers_the_problem(void **state)
{
    NEEDS_DEVICE();
    kda_problem p = good();
    assert_string_equal(kda_pick(KL_CUDA, NULL, &(kda_problem){.B = 4, .T = 1, .N = 4, .H = 1, .HV = 1, .K = 8, .V = 8, .dtype = KL_BF16}, KL_FORWARD)->name, "recurrent");
    p.dtype = KL_F32;
    const kl_variant *v = kda_pick(KL_CUDA, NULL, &p, KL_FORWARD);
    assert_non_null(v);
    assert_int_equal(v->device, KL_CUDA);
    assert_ok(v->check(&p, KL_FORWARD));
    assert_null(kda_pick(KL_CUDA, "none", &p, KL_FORWARD));
}

static void workspaces_of_long_problems_are_counted_not_wrapped(void **state)
{
    NEEDS_DEVICE();
    int count;
    const kl_variant *v = kda_variants(&count);
    kda_problem p = {.B = 1, .T = INT64_C(1) << 20, .N = 1, .H = 32, .HV = 32, .K = 128, .V = 128, .G = 128, .dtype = KL_BF16};
    for (int i = 0; i < count; i++)
        if (v[i].device == KL_CUDA && !kl_failed(v[i].check(&p, KL_FORWARD))) {
            size_t half = v[i].workspace(ctx, &(kda_problem){.B = 1, .T = INT64_C(1) << 19, .N = 1, .H = 32, .HV = 32, .K = 128, .V = 128, .G = 128, .dtype = KL_BF16}, KL_FORWARD);
            size_t whole = v[i].workspace(ctx, &p, KL_FORWARD);
            assert_true(whole >= half && whole < (size_t)1 << 44);
        }
    p.K = 999;
    assert_int_equal(kda_workspace(ctx, &p, KL_FORWARD), 0);
}

/* ---- devices ---- */

static void a_device_that_is_too_old_is_named_and_the_cpu_offered(void **state)
{
    NEEDS_DEVICE();
    kl_ctx *old;
    const int archs[] = {800, 900};
    bool hopper;
    expect_error(kl_gpu_check_capability(0, 75, archs, 2, &hopper), KL_EDEVICE, "expected compute capability 8.0 or newer, got 7.5 of cuda:0; use --device cpu");
    expect_error(kl_gpu_check_capability(0, 75, archs + 1, 1, &hopper), KL_EDEVICE, "expected compute capability 8.0 or newer, got 7.5 of cuda:0; use --device cpu");
    expect_error(kl_gpu_check_capability(0, 100, archs + 1, 1, &hopper), KL_EDEVICE, "expected compute capability 9.0, all that this build has code for");
    const int capabilities[] = {80, 86, 90, 100, 120};
    for (int i = 0; i < 5; i++) {
        assert_ok(kl_gpu_check_capability(0, capabilities[i], archs, 2, &hopper));
        assert_int_equal(hopper, capabilities[i] == 90);
    }
    assert_ok(kl_gpu_check_capability(0, 90, archs, 1, &hopper));
    assert_false(hopper);
    expect_error(kl_ctx_create(&old, &(kl_ctx_options){.device = KL_CUDA, .device_index = 999}), KL_EDEVICE, "cuda:999");
    if (!kl_gpu_emulated())
        return;
    kl_gpu_emulate(75, (size_t)4 << 30, true);
    expect_error(kl_ctx_create(&old, &(kl_ctx_options){.device = KL_CUDA}), KL_EDEVICE, "use --device cpu");
    assert_null(old);
    kl_gpu_emulate(90, (size_t)4 << 30, true);
}

static const kl_variant *on_cuda(const char *name)
{
    int count;
    const kl_variant *v = kda_variants(&count);
    for (int i = 0; i < count; i++)
        if (v[i].device == KL_CUDA && strcmp(v[i].name, name) == 0)
            return &v[i];
    fail_msg("no variant %s", name);
    return NULL;
}

/* Where shared memory is short the dispatch takes the recurrence; what nothing else can do is refused, as are Hopper's own forms. */
static void a_device_without_hoppers_means_gets_what_fits(void **state)
{
    NEEDS_DEVICE();
    if (!kl_gpu_emulated())
        skip();
    const struct device { int capability; int64_t widest; } devices[] = {{80, 128}, {86, 64}, {100, 256}};
    kda_problem p = good();
    for (int i = 0; i < 3; i++) {
        kl_ctx *other;
        kl_gpu_emulate(devices[i].capability, (size_t)4 << 30, true);
        assert_ok(kl_ctx_create(&other, &(kl_ctx_options){.device = KL_CUDA}));
        for (int64_t K = 64; K <= 256; K *= 2) {
            p.K = p.V = p.G = K;
            const kl_variant *v = on_cuda(K <= devices[i].widest ? "chunk" : "recurrent");
            assert_int_equal(kda_workspace(other, &p, KL_FORWARD), v->workspace(other, &p, KL_FORWARD));
        }
        p = good();
        expect_error(on_cuda("chunk_persistent")->forward(other, &p, workspace, room), KL_EUNSUPPORTED, "chunk_persistent: device: expected compute capability 9.0");
        kl_ctx_destroy(other);
    }
    kl_gpu_emulate(90, (size_t)4 << 30, true);
}

static void a_full_device_says_so_and_keeps_nothing(void **state)
{
    NEEDS_DEVICE();
    if (!kl_gpu_emulated())
        skip();
    kl_case c;
    size_t before, after, total;
    assert_ok(kl_case_kda(&c, &(kl_kda_spec){.T = 64, .H = 1, .K = 64, .state = true, .seed = 1}));
    kl_gpu_emulate(90, (size_t)1 << 20, true);
    assert_ok(kl_gpu_memory(ctx, &before, &total));
    for (size_t memory = total - before; memory < total; memory += 8192) {
        kl_gpu_emulate(90, memory, true);
        kl_status s = kl_case_upload(ctx, &c);
        if (!kl_failed(s))
            break;
        expect_error(s, KL_ENOMEM, "device memory: expected room for");
        kl_gpu_emulate(90, total, true);
        assert_ok(kl_gpu_memory(ctx, &after, &total));
        assert_int_equal(after, before);
    }
    kl_case_free(&c);
    kl_gpu_emulate(90, (size_t)4 << 30, true);
    assert_ok(kl_gpu_memory(ctx, &after, &total));
    assert_int_equal(total - after, ((size_t)1 << 20) - before);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wrong_types),
        cmocka_unit_test(wrong_layouts_and_strides),
        cmocka_unit_test(wrong_dimensions),
        cmocka_unit_test(wrong_options_and_missing_tensors),
        cmocka_unit_test(a_workspace_that_is_missing_or_too_small),
        cmocka_unit_test(what_is_not_offered_is_refused_when_called),
        cmocka_unit_test(dispatch_picks_what_offers_the_problem),
        cmocka_unit_test(workspaces_of_long_problems_are_counted_not_wrapped),
        cmocka_unit_test(a_device_that_is_too_old_is_named_and_the_cpu_offered),
        cmocka_unit_test(a_device_without_hoppers_means_gets_what_fits),
        cmocka_unit_test(a_full_device_says_so_and_keeps_nothing),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}
