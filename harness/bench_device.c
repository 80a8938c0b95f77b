/* The device's variants at one shape. Inputs are made on the device; a sample of what comes out is scored. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/bench_device.h"

/* Sets take turns until together they are larger than any cache. */
enum { COLD_BYTES = 192 << 20 };

/* ---- tensors ---- */

static kl_status make_tensors(kl_workload *w)
{
    kl_arena a = kl_arena_count();
    kl_tensors size = {0};
    w->ops->lay_out(w, &size, &a);
    KL_REQUIRE(!a.overflow, "bench: the tensors do not fit size_t");
    w->sets = (int)((COLD_BYTES + a.used - 1) / a.used);
    w->sets = kl_gpu_emulated() && w->sets > 2 ? 2 : w->sets > KL_MOST_SETS ? KL_MOST_SETS : w->sets;
    for (int i = 0; i < w->sets; i++) {
        kl_tensors *t = &w->set[i];
        KL_TRY(kl_gpu_alloc(w->b->ctx, &t->memory, a.used));
        kl_arena over = kl_arena_over(t->memory, a.used);
        w->ops->lay_out(w, t, &over);
        t->bytes = a.used;
        KL_TRY(w->ops->fill(w, t, (uint64_t)i + 1));
    }
    return kl_ok();
}

static void finish(kl_workload *w)
{
    for (int i = 0; i < w->sets; i++)
        if (w->set[i].memory)
            kl_gpu_free(w->b->ctx, w->set[i].memory);
    if (w->device_table)
        kl_gpu_free(w->b->ctx, w->device_table);
    if (w->slice)
        kl_gpu_free(w->b->ctx, w->slice);
    if (w->workspace)
        kl_gpu_free(w->b->ctx, w->workspace);
    kl_case_free(&w->sample);
    kl_scratch_free(&w->scratch);
    free(w->host_table);
    free(w->own);
}

/* ---- running ---- */

static const void *problem(const kl_workload *w, int set)
{
    return w->family == KL_FAMILY_DPLR ? (const void *)&w->set[set].general : &w->set[set].problem;
}

/* Has the call to find what a forward pass has left? */
static bool comes_after(const kl_workload *w) { return !w->forward && w->ops->before; }

static kl_status launch(void *user, int set)
{
    const kl_workload *w = user;
    if (w->forward)
        KL_TRY(w->variant->forward(w->b->ctx, problem(w, set), w->workspace, w->workspace_bytes));
    return w->backward ? w->variant->backward(w->b->ctx, problem(w, set), &w->set[set].grads, w->workspace, w->workspace_bytes) : kl_ok();
}

/* Runs once on fresh inputs and poisoned outputs and workspace, and scores the sample. */
static kl_status score(kl_workload *w, kl_bench_row *row)
{
    const kl_tensors *t = &w->set[0];
    const kl_ctx *ctx = w->b->ctx;
    KL_TRY(w->ops->fill(w, t, 1));
    KL_TRY(kl_gpu_fill(ctx, (char *)t->memory + t->outputs_at, 0xff, t->bytes - t->outputs_at));
    KL_TRY(kl_gpu_fill(ctx, w->workspace, 0xff, w->workspace_bytes));
    for (int i = 0; i < t->cleared_count; i++)
        KL_TRY(kl_gpu_fill(ctx, t->cleared[i].at, 0, t->cleared[i].bytes));
    for (int i = 0; i < w->sets && comes_after(w); i++)
        KL_TRY(w->ops->before(w, i));
    KL_TRY(launch(w, 0));
    KL_TRY(kl_gpu_sync(ctx));
    for (kl_pass pass = kl_first_pass(w); pass <= kl_last_pass(w); pass++) {
        const kl_tolerance *limit = &w->sample.tolerance;
        KL_TRY(w->ops->fetch(w, pass));
        double err = kl_case_worst(&w->sample, pass, NULL), most = pass == KL_BACKWARD ? limit->gradient : limit->forward;
        for (int i = 0; i < w->sample.count; i++)
            if (w->sample.tensor[i].gradient == (pass == KL_BACKWARD))
                row->err_part = fmax(row->err_part, kl_case_error_blocks(&w->sample.tensor[i]));
        /* Of two passes the one that is closer to its limit. */
        if (row->err_limit == 0.0 || !(err / most <= row->err / row->err_limit)) {
            row->err = err;
            row->err_limit = most;
        }
    }
    return kl_ok();
}

static kl_status offers(const kl_workload *w)
{
    KL_TRY(w->forward ? w->variant->check(problem(w, 0), KL_FORWARD) : kl_ok());
    if (w->backward && !w->variant->backward)
        return kl_error(KL_EUNSUPPORTED, "it has no backward pass");
    return w->backward ? w->variant->check(problem(w, 0), KL_BACKWARD) : kl_ok();
}

static kl_status make_workspace(kl_workload *w)
{
    size_t need = 0;
    for (kl_pass pass = w->forward || comes_after(w) ? KL_FORWARD : KL_BACKWARD; w->variant->workspace && pass <= kl_last_pass(w); pass++) {
        size_t bytes = w->variant->workspace(w->b->ctx, problem(w, 0), pass);
        need = bytes > need ? bytes : need;
    }
    if (w->workspace)
        kl_gpu_free(w->b->ctx, w->workspace);
    w->workspace = NULL;
    w->workspace_bytes = need;
    return kl_gpu_alloc(w->b->ctx, &w->workspace, need);
}

static kl_status bench_variant(kl_workload *w, kl_bench_pass pass, double *seconds)
{
    kl_device_times times;
    const kl_variant *v = w->variant;
    kl_bench_row row = {.family = v->family, .variant = v->name, .gate = w->ops == &kl_bench_kda ? kl_regime_name(w->b->regime) : NULL, .pass = pass, .shape = &w->shape,
                        .device = &times, .memory_gbps = w->b->ceilings.copy_gbps, .memory_name = "copy"};
    KL_TRY(make_workspace(w));
    KL_TRY(score(w, &row));
    KL_TRY(kl_bench_time_device(w->b, launch, w, w->sets, &times));
    row.seconds = times.graph.runs ? times.graph : times.pipelined;
    if (strcmp(v->name, "chunk") == 0)
        *seconds = row.seconds.median;
    for (kl_pass half = kl_first_pass(w); half <= kl_last_pass(w); half++) {
        kl_cost cost = v->cost(problem(w, 0), half);
        row.cost.flops += cost.flops - w->spared[half].flops;
        row.cost.bytes += cost.bytes - w->spared[half].bytes;
    }
    row.err_rows = w->rows;
    if (w->heads && w->heads < w->shape.H) {
        row.err_head_count = w->heads;
        memcpy(row.err_heads, w->head, sizeof row.err_heads);
    }
    row.workspace_bytes = w->workspace_bytes;
    row.peak_bytes = w->set[0].bytes + w->workspace_bytes;
    return kl_bench_emit(w->b, &row);
}

static void not_offered(const kl_workload *w, kl_bench_pass pass, kl_status why)
{
    if (!w->b->quiet)
        printf("%-6s %-7s %-11s not offered: %s\n", w->variant->family, kl_bench_pass_name(pass), w->variant->name, why.message);
}

static kl_status bench_all(kl_workload *w, kl_bench_pass pass, double *seconds)
{
    int count, offered = 0;
    const kl_variant *list = kl_family_variants(w->family, &count);
    bool prepared = false;
    for (int i = 0; i < count; i++) {
        if (list[i].device != KL_CUDA || (w->b->variant && strcmp(w->b->variant, list[i].name) != 0))
            continue;
        if (!prepared) {
            KL_TRY(w->ops->tables ? w->ops->tables(w) : kl_ok());
            KL_TRY(make_tensors(w));
            prepared = true;
        }
        w->variant = &list[i];
        kl_status s = offers(w);
        if (s.code == KL_EUNSUPPORTED) {
            not_offered(w, pass, s);
            continue;
        }
        KL_TRY(s);
        if (!offered++)
            KL_TRY(w->ops->expect(w));
        s = bench_variant(w, pass, seconds);
        if (s.code == KL_EUNSUPPORTED) { /* by this device */
            not_offered(w, pass, s);
            continue;
        }
        KL_TRY(kl_error_in(s, "%s %s", list[i].family, list[i].name));
    }
    return kl_ok();
}

kl_status kl_bench_device(kl_bench *b, kl_family family, const kl_shape *s, kl_bench_pass pass, double *seconds)
{
    static const kl_bench_ops *const ops[] = {&kl_bench_kda, &kl_bench_kda, &kl_bench_mla, &kl_bench_moe};
    *seconds = 0.0;
    kl_workload *w = calloc(1, sizeof *w);
    if (!w)
        return kl_error(KL_ENOMEM, "bench: out of memory");
    *w = (kl_workload){.b = b, .family = family, .ops = ops[family], .shape = *s, .decode = pass == KL_BENCH_DECODE, .forward = pass != KL_BENCH_BWD,
                       .backward = pass == KL_BENCH_BWD || pass == KL_BENCH_FWDBWD};
    kl_status status = w->ops->complete(w);
    if (!kl_failed(status))
        status = bench_all(w, pass, seconds);
    finish(w);
    free(w);
    return status;
}
