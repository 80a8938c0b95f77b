/* A guard on what kernels cost, without a GPU: registers, spills and stack as the compiler reports them (where nvcc built
 * the library), shared memory as the launches ask for it (on an emulated device), against tests/kernel_budget.txt. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fnmatch.h>
#include <glob.h>
#include <stdlib.h>

#include "common/gpu.h"
#include "harness/layers_case.h"
#include "harness/problem.h"
#include "kda/internal.h"
#include "tests/expect.h"
#include "tests/shell.h"

typedef struct budget {
    char kind[16], file[64], name[128]; /* "kernel" or "launch" */
    long most, spilt;                   /* registers, or bytes of shared memory; bytes of stack, of spilt stores, of spilt loads */
    int met;
} budget;

enum { BUDGETS = 256 };
static budget budgets[BUDGETS];
static int budget_count;

static int read_budgets(void **state)
{
    (void)state;
    FILE *file = fopen("tests/kernel_budget.txt", "r");
    char line[512];
    while (file && fgets(line, sizeof line, file)) {
        budget *b = &budgets[budget_count];
        *b = (budget){0};
        if (*line == '#' || *line == '\n')
            continue;
        bool kernel = sscanf(line, "%15s %ld %ld %63s %127[^\n]", b->kind, &b->most, &b->spilt, b->file, b->name) == 5 && strcmp(b->kind, "kernel") == 0;
        bool launch = !kernel && sscanf(line, "%15s %ld %127[^\n]", b->kind, &b->most, b->name) == 3 && strcmp(b->kind, "launch") == 0;
        if (launch)
            b->file[0] = '\0';
        if (!kernel && !launch)
            fail_msg("kernel_budget.txt: not understood: %s", line);
        assert_true(++budget_count < BUDGETS);
    }
    return file ? fclose(file) : 1;
}

static budget *find(const char *kind, const char *file, const char *name)
{
    for (int i = 0; i < budget_count; i++)
        if (!strcmp(budgets[i].kind, kind) && !strcmp(budgets[i].file, file) && fnmatch(budgets[i].name, name, 0) == 0)
            return &budgets[i];
    return NULL;
}

static void everything_listed_was_met(const char *kind)
{
    for (int i = 0; i < budget_count; i++)
        if (!strcmp(budgets[i].kind, kind) && !budgets[i].met)
            fail_msg("kernel_budget.txt lists %s %s %s, which is not there", kind, budgets[i].file, budgets[i].name);
}

/* ---- registers and spills ---- */

/* "void (anonymous namespace)::walk<128, 2>((anonymous namespace)::view)" -> "walk<128, 2>" */
static void plain_name(char *name)
{
    static const char *const noise[] = {"(anonymous namespace)::", "void "};
    for (int i = 0; i < 2; i++)
        for (char *at; (at = strstr(name, noise[i]));)
            memmove(at, at + strlen(noise[i]), strlen(at + strlen(noise[i])) + 1);
    char *end = strrchr(name, ')');
    int depth = 0;
    for (char *at = end; at && at >= name; at--) {
        depth += (*at == ')') - (*at == '(');
        if (depth == 0) {
            *at = '\0';
            return;
        }
    }
}

static int checked, wrong;

static void check_kernel(const char *file, const char *name, long registers, long spilt)
{
    budget *b = find("kernel", file, name);
    checked++;
    if (!b) {
        print_error("%s: kernel %s is not in kernel_budget.txt (%ld registers)\n", file, name, registers);
        wrong++;
        return;
    }
    b->met = 1;
    if (registers > b->most || spilt > b->spilt) {
        print_error("%s: %s: %ld registers of %ld, %ld bytes of stack or spills of %ld\n", file, name, registers, b->most, spilt, b->spilt);
        wrong++;
    }
}

static long larger(long a, long b) { return a > b ? a : b; }

/* The three lines that ptxas prints of an entry function. */
static void check_report(const char *path)
{
    char file[64], name[512] = "";
    long stack = 0, stores = 0, loads = 0, registers = 0;
    const char *base = strrchr(path, '/') + 1;
    snprintf(file, sizeof file, "%.*s", (int)(strstr(base, ".cu") - base), base);
    shell_result *r = shell("c++filt <'%s'", path);
    for (char *line = strtok(r->text, "\n"); line; line = strtok(NULL, "\n")) {
        char *at;
        if ((at = strstr(line, "Compiling entry function '")))
            snprintf(name, sizeof name, "%.*s", (int)(strrchr(at, '\'') - at - 26), at + 26), plain_name(name);
        else if (sscanf(line, " %ld bytes stack frame, %ld bytes spill stores, %ld bytes spill loads", &stack, &stores, &loads) == 3)
            continue;
        else if ((at = strstr(line, "Used ")) && *name && sscanf(at, "Used %ld registers", &registers) == 1) {
            check_kernel(file, name, registers, larger(stack, larger(stores, loads)));
            *name = '\0';
        }
    }
    free(r);
}

static void kernels_keep_to_their_registers(void **state)
{
    (void)state;
    char pattern[256];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/obj/{common,{kda,mla,moe,harness}/cuda}/*.report", shell_build());
    if (!kl_gpu_compiled() || kl_gpu_emulated())
        skip();
    assert_int_equal(glob(pattern, GLOB_BRACE, NULL, &found), 0);
    for (size_t i = 0; i < found.gl_pathc; i++)
        check_report(found.gl_pathv[i]);
    globfree(&found);
    assert_true(checked > 0);
    assert_int_equal(wrong, 0);
    everything_listed_was_met("kernel");
}

/* ---- shared memory ---- */

/* Every variant and both passes at the fast path's dimensions and at the largest. */
static void run_variants(kl_ctx *ctx, kl_case *c, kl_scratch *scratch)
{
    int count;
    const kl_variant *v = kl_family_variants(c->family, &count);
    assert_ok(kl_case_place(c, &(kl_placement){.dtype = KL_BF16}, NULL));
    assert_ok(kl_case_upload(ctx, c));
    for (int i = 0; i < count; i++)
        for (kl_pass pass = KL_FORWARD; pass <= (c->backward && v[i].backward ? KL_BACKWARD : KL_FORWARD); pass++)
            if (v[i].device == KL_CUDA && !kl_failed(v[i].check(kl_case_problem(c, KL_CUDA), pass)))
                assert_ok(kl_case_run(ctx, c, &v[i], pass, scratch));
}

static void run_everything(kl_ctx *ctx)
{
    kl_scratch scratch = {0};
    for (int64_t K = 64; K <= 256; K *= 2) {
        kl_case kda, general;
        assert_ok(kl_case_kda(&kda, &(kl_kda_spec){.lengths = (const int64_t[]){35, 5}, .sequences = 2, .H = 1, .K = K, .regime = KL_REGIME_MIXED, .state = true, .backward = true, .seed = 1}));
        assert_ok(kl_case_dplr(&general, &kda));
        run_variants(ctx, &kda, &scratch);
        run_variants(ctx, &general, &scratch);
        kl_case_free(&general);
        kl_case_free(&kda);
    }
    kl_case moe[2];
    assert_ok(kl_case_moe(&moe[0], &(kl_moe_spec){.T = 300, .D = 72, .E = 2, .I = 40, .top_k = 1, .weight_dtype = KL_BF16, .backward = true, .seed = 1}));
    assert_ok(kl_case_moe(&moe[1], &(kl_moe_spec){.T = 1, .D = 72, .E = 256, .I = 40, .top_k = 8, .weight_dtype = KL_BF16, .seed = 1}));
    for (int i = 0; i < 2; i++) {
        run_variants(ctx, &moe[i], &scratch);
        kl_case_free(&moe[i]);
    }
    kl_case mla;
    assert_ok(kl_case_mla(&mla, &(kl_mla_spec){.N = 2, .T = 130, .Tq = 2, .H = 1, .R = 512, .Dn = 128, .Dr = 64, .Dv = 128, .latent_dtype = KL_BF16,
                                               .weight_dtype = KL_BF16, .backward = true, .seed = 1}));
    run_variants(ctx, &mla, &scratch);
    kl_case_free(&mla);
    kl_scratch_free(&scratch);
}

/* KDA in parts, as no problem of this size would be cut by itself. */
static void run_scan(kl_ctx *ctx)
{
#ifdef KL_HAVE_CUDA
    for (int64_t K = 64; K <= 128; K *= 2) {
        kl_case c;
        const int *start;
        void *workspace;
        assert_ok(kl_case_kda(&c, &(kl_kda_spec){.T = 70, .H = 1, .K = K, .regime = KL_REGIME_SLOW, .state = true, .seed = 1}));
        assert_ok(kl_case_place(&c, &(kl_placement){.dtype = KL_BF16}, NULL));
        assert_ok(kl_case_upload(ctx, &c));
        const kda_problem *p = kl_case_problem(&c, KL_CUDA);
        size_t bytes = kda_cuda_scan_cut_workspace(p, 1, 1);
        assert_ok(kl_gpu_alloc(ctx, &workspace, bytes));
        assert_ok(kda_cuda_scan_cut(ctx, p, 1, 1, workspace, bytes, &start));
        kl_gpu_free(ctx, workspace);
        bytes = kda_cuda_follow_cut_workspace(p, 1, 1);
        assert_ok(kl_gpu_alloc(ctx, &workspace, bytes));
        assert_ok(kda_cuda_follow_cut(ctx, p, 1, 1, workspace, bytes));
        kl_gpu_free(ctx, workspace);
        kl_case_free(&c);
    }
#else
    (void)ctx;
#endif
}

/* Every operation of the layers, the norm at the width that asks for most. */
static void run_layers(kl_ctx *ctx)
{
    const layers_spec specs[] = {
        {.p = {.op = LAYERS_RMSNORM, .rmsnorm = {.T = 5, .D = 2304}}, .g.rmsnorm = {.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED}},
        {.p = {.op = LAYERS_EMBED, .embed = {.T = 9, .D = 8, .vocab = 3}}},
        {.p = {.op = LAYERS_SWIGLU, .swiglu = {.T = 2, .I = 8, .y = LAYERS_WANTED}}},
        {.p = {.op = LAYERS_LINEAR, .linear = {.T = 2, .N = 8, .K = 8}}, .g.linear = {.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED}},
        {.p = {.op = LAYERS_MLP, .mlp = {.T = 2, .D = 8, .I = 8}}, .g.mlp = {.dx = LAYERS_WANTED}},
        {.p = {.op = LAYERS_HEAD_LOSS, .head_loss = {.T = 1, .D = 8, .vocab = 8, .sum = LAYERS_WANTED}}, .g.head_loss = {.dx = LAYERS_WANTED, .dweight = LAYERS_WANTED}},
        {.p = {.op = LAYERS_ADAMW, .adamw = {.n = 8, .step = 1, .eps = 1e-8}}},
        {.p = {.op = LAYERS_MUON, .muon = {.rows = 2, .columns = 4}}},
        {.p = {.op = LAYERS_SUMSQ, .sumsq = {.n = 8}}}};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        layers_spec spec = specs[i];
        layers_case c;
        spec.backward = layers_has_backward(spec.p.op);
        assert_ok(layers_case_create(&c, ctx, &spec));
        for (kl_pass pass = KL_FORWARD; pass <= (spec.backward ? KL_BACKWARD : KL_FORWARD); pass++)
            assert_ok(layers_case_run(&c, layers_pick(KL_CUDA, spec.p.op), pass));
        layers_case_free(&c);
    }
}

static void launches_keep_to_their_shared_memory(void **state)
{
    (void)state;
    if (!kl_gpu_emulated())
        skip();
    kl_ctx *ctx;
    assert_ok(kl_ctx_create(&ctx, &(kl_ctx_options){.device = KL_CUDA}));
    run_everything(ctx);
    run_scan(ctx);
    run_layers(ctx);
    kl_ctx_destroy(ctx);
    const char *name;
    size_t shared;
    for (int i = 0; kl_gpu_launched(i, &name, &shared); i++) {
        budget *b = find("launch", "", name);
        if (b)
            b->met = 1;
        if (!b || (long)shared > b->most) {
            print_error("launch %s: %zu bytes of shared memory, %ld allowed\n", name, shared, b ? b->most : -1L);
            wrong++;
        }
    }
    assert_int_equal(wrong, 0);
    everything_listed_was_met("launch");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kernels_keep_to_their_registers),
        cmocka_unit_test(launches_keep_to_their_shared_memory),
    };
    return cmocka_run_group_tests(tests, read_budgets, NULL);
}
