#include "harness/verify.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/gpu.h"
#include "common/timer.h"
#include "harness/reference_variants.h"

static void print_row(const kl_check *c, bool holds)
{
    char err[16], blocks[16] = "", limit[16];
    kl_format_error(c->err, err, sizeof err);
    kl_format_error(c->limit, limit, sizeof limit);
    if (!isnan(c->blocks))
        kl_format_error(c->blocks, blocks, sizeof blocks);
    printf("%-4s  %-36s  %-10s  %-22s  %10s  %10s  %8s%s%s\n", holds ? "ok" : "FAIL", c->subject, c->variant, c->tensor, err, blocks, limit,
           c->note ? "  " : "", c->note ? c->note : "");
}

static void add_number(cJSON *o, const char *name, double x)
{
    cJSON_AddItemToObject(o, name, isfinite(x) ? cJSON_CreateNumber(x) : cJSON_CreateNull());
}

static void print_json(const kl_verifier *v, cJSON *row)
{
    kl_provenance_add(row, &v->provenance);
    char *text = cJSON_PrintUnformatted(row);
    puts(text ? text : "{}");
    cJSON_free(text);
    cJSON_Delete(row);
}

void kl_verify_row(kl_verifier *v, const kl_check *c)
{
    bool holds = kl_within(c->err, c->limit);
    if (!v->json && v->rows == 0)
        printf("      %-36s  %-10s  %-22s  %10s  %10s  %8s\n", "case", "variant", "tensor", "error", "worst part", "limit");
    v->rows++;
    v->failed += !holds;
    if (!v->json) {
        print_row(c, holds);
        return;
    }
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "case", c->subject);
    cJSON_AddStringToObject(row, "variant", c->variant);
    cJSON_AddStringToObject(row, "tensor", c->tensor);
    add_number(row, "err", c->err);
    if (!isnan(c->blocks))
        add_number(row, "err_worst_part", c->blocks);
    add_number(row, "err_limit", c->limit);
    cJSON_AddBoolToObject(row, "ok", holds);
    if (c->note)
        cJSON_AddStringToObject(row, "note", c->note);
    print_json(v, row);
}

void kl_verify_fact(kl_verifier *v, const char *subject, const char *variant, const char *what, bool holds, const char *note)
{
    kl_verify_row(v, &(kl_check){subject, variant, what, holds ? 0.0 : 1.0, NAN, 0.0, note});
}

void kl_verify_unsupported(kl_verifier *v, const char *subject, const char *variant, const char *why)
{
    v->unsupported++;
    if (!v->json) {
        printf("%-4s  %-36s  %-10s  %s\n", "--", subject, variant, why);
        return;
    }
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "case", subject);
    cJSON_AddStringToObject(row, "variant", variant);
    cJSON_AddStringToObject(row, "unsupported", why);
    print_json(v, row);
}

kl_status kl_verify_finish(kl_verifier *v)
{
    if (!v->json) {
        printf("\n%d checks, %d failed", v->rows, v->failed);
        printf(v->unsupported ? ", %d not offered\n" : "\n", v->unsupported);
    }
    kl_scratch_free(&v->scratch);
    if (v->rows == 0)
        return kl_error(KL_EINVAL, "verify: nothing was checked");
    if (v->failed)
        return kl_error(KL_EINVAL, "verify: %d of %d checks failed", v->failed, v->rows);
    return kl_ok();
}

/* The tensors that the pass has just written. */
static void score_pass(kl_verifier *v, const kl_case *c, const kl_variant *variant, kl_pass pass)
{
    double limit = pass == KL_BACKWARD ? c->tolerance.gradient : c->tolerance.forward;
    const char *worst_tensor = NULL;
    if (v->brief && !v->json)
        kl_case_worst(c, pass, &worst_tensor);
    for (int i = 0; i < c->count; i++) {
        const kl_case_tensor *t = &c->tensor[i];
        if (t->gradient != (pass == KL_BACKWARD) || (worst_tensor && *worst_tensor && strcmp(worst_tensor, t->name) != 0))
            continue;
        char label[64];
        snprintf(label, sizeof label, "%s%s", worst_tensor ? (pass == KL_BACKWARD ? "gradients: " : "outputs: ") : "", t->name);
        kl_verify_row(v, &(kl_check){c->name, variant->name, label, kl_case_error(t), kl_case_error_blocks(t), limit, NULL});
        if (worst_tensor)
            return;
    }
}

static kl_status verify_pass(kl_verifier *v, kl_case *c, const kl_variant *variant, kl_pass pass)
{
    if (pass == KL_BACKWARD && !variant->backward)
        return kl_ok();
    kl_status s = variant->check(kl_case_problem(c, variant->device), pass);
    if (s.code == KL_EUNSUPPORTED) {
        kl_verify_unsupported(v, c->name, variant->name, s.message);
        return kl_ok();
    }
    if (!kl_failed(s))
        s = kl_case_run(v->ctx, c, variant, pass, &v->scratch);
    if (s.code == KL_EUNSUPPORTED) { /* by this device */
        kl_verify_unsupported(v, c->name, variant->name, s.message);
        return kl_ok();
    }
    if (kl_failed(s)) {
        kl_verify_fact(v, c->name, variant->name, pass == KL_BACKWARD ? "gradients" : "outputs", false, s.message);
        return kl_ok();
    }
    score_pass(v, c, variant, pass);
    return kl_ok();
}

static bool offered_on(kl_family family, kl_device device)
{
    int count;
    const kl_variant *variant = kl_family_variants(family, &count);
    for (int i = 0; i < count; i++)
        if (variant[i].device == device)
            return true;
    return false;
}

kl_status kl_verify_case(kl_verifier *v, kl_case *c, bool golden)
{
    const kl_variant *reference = kl_reference_variant(c->family);
    if (v->ctx->device == KL_CUDA && offered_on(c->family, KL_CUDA))
        KL_TRY(kl_case_upload(v->ctx, c));
    for (kl_pass pass = KL_FORWARD; pass <= (c->backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        if (golden) {
            if (!v->only || strcmp(v->only, reference->name) == 0)
                KL_TRY(verify_pass(v, c, reference, pass));
        } else {
            KL_TRY(kl_error_in(kl_case_run(v->ctx, c, reference, pass, &v->scratch), "%s: reference", c->name));
            KL_TRY(kl_case_keep(c, pass));
        }
        if (pass == KL_FORWARD)
            KL_TRY(kl_case_give(c));
        int count;
        const kl_variant *variant = kl_family_variants(c->family, &count);
        for (int i = 0; i < count; i++)
            if (variant[i].device == v->ctx->device && (!v->only || strcmp(v->only, variant[i].name) == 0))
                KL_TRY(verify_pass(v, c, &variant[i], pass));
    }
    return kl_ok();
}

/* The case and its DPLR form, placed as the device wants it. */
static kl_status verify_golden_case(kl_verifier *v, kl_case *c, const kl_placement *place)
{
    bool changed = false;
    kl_case general;
    KL_TRY(kl_case_dplr(&general, c));
    char name[sizeof general.name];
    snprintf(name, sizeof name, "%.160s as DPLR", c->name);
    memcpy(general.name, name, sizeof name);
    kl_status s = place ? kl_case_place(c, place, &changed) : kl_ok();
    if (!kl_failed(s))
        s = kl_verify_case(v, c, !changed);
    changed = false;
    if (!kl_failed(s) && place)
        s = kl_case_place(&general, place, &changed);
    if (!kl_failed(s) && offered_on(KL_FAMILY_DPLR, v->ctx->device))
        s = kl_verify_case(v, &general, !changed);
    kl_case_free(&general);
    return s;
}

static kl_status verify_golden_file(kl_verifier *v, const char *path)
{
    static const kl_placement places[] = {{.dtype = KL_BF16}, {.dtype = KL_F32}, {.dtype = KL_BF16, .state_dtype = KL_BF16, .gap = 8, .pool = true}};
    bool device = v->ctx->device == KL_CUDA;
    for (int i = 0; i < (device ? 3 : 1); i++) {
        kl_case c;
        KL_TRY(kl_case_kda_golden(&c, path));
        kl_status s = verify_golden_case(v, &c, device ? &places[i] : NULL);
        kl_case_free(&c);
        KL_TRY(s);
    }
    return kl_ok();
}

static int is_safetensors(const struct dirent *e)
{
    size_t n = strlen(e->d_name);
    return n > 12 && strcmp(e->d_name + n - 12, ".safetensors") == 0;
}

kl_status kl_verify_kda_golden(kl_verifier *v, const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0)
        return kl_error_errno("%s", path);
    if (!S_ISDIR(info.st_mode))
        return verify_golden_file(v, path);
    struct dirent **entry;
    int n = scandir(path, &entry, is_safetensors, alphasort);
    if (n < 0)
        return kl_error_errno("%s", path);
    kl_status s = n ? kl_ok() : kl_error(KL_EFORMAT, "%s: no .safetensors file is there", path);
    for (int i = 0; i < n; i++) {
        char file[4096];
        if (!kl_failed(s))
            s = snprintf(file, sizeof file, "%s/%s", path, entry[i]->d_name) < (int)sizeof file
                    ? verify_golden_file(v, file) : kl_error(KL_EINVAL, "%s: path too long", path);
        free(entry[i]);
    }
    free(entry);
    return s;
}

/* ---- the short table ---- */

static double best_time(kl_verifier *v, const kl_case *c, const kl_variant *variant, kl_pass pass)
{
    double best = INFINITY, spent = 0.0;
    for (int i = 0; i < 3 && (i == 0 || spent < 0.5); i++) {
        double start = kl_now();
        if (kl_failed(kl_case_call(v->ctx, c, variant, pass, &v->scratch)) ||
            (variant->device == KL_CUDA && kl_failed(kl_gpu_sync(v->ctx))))
            return NAN;
        double took = kl_now() - start;
        best = took < best ? took : best;
        spent += took;
    }
    return best;
}

static kl_status summary_row(kl_verifier *v, kl_case *c, const kl_variant *variant, kl_pass pass, kl_table *t)
{
    KL_TRY(kl_scratch_for(&v->scratch, v->ctx, variant, c, pass));
    double seconds = best_time(v, c, variant, pass);
    KL_TRY(kl_case_run(v->ctx, c, variant, pass, &v->scratch));
    bool reference = strcmp(variant->name, "reference") == 0;
    if (reference)
        KL_TRY(kl_case_keep(c, pass));
    const char *tensor;
    double err = kl_case_worst(c, pass, &tensor), limit = pass == KL_BACKWARD ? c->tolerance.gradient : c->tolerance.forward;
    bool holds = kl_within(err, limit);
    v->rows++;
    v->failed += !holds;
    char error[16], most[16], time[24];
    kl_format_error(err, error, sizeof error);
    kl_format_error(limit, most, sizeof most);
    snprintf(time, sizeof time, "%.2f", 1e3 * seconds);
    return kl_table_row(t, (const char *[]){kl_family_name(c->family), pass == KL_BACKWARD ? "backward" : "forward", variant->name,
                                            reference ? "" : error, reference ? "" : most, time, reference ? "(double precision)" : holds ? "ok" : "FAIL"}, 7);
}

static kl_status summary_case(kl_verifier *v, kl_case *c, kl_table *t)
{
    if (v->ctx->device == KL_CUDA && offered_on(c->family, KL_CUDA)) {
        KL_TRY(kl_case_place(c, &(kl_placement){.dtype = KL_BF16}, NULL));
        KL_TRY(kl_case_upload(v->ctx, c));
    }
    for (kl_pass pass = KL_FORWARD; pass <= (c->backward ? KL_BACKWARD : KL_FORWARD); pass++) {
        KL_TRY(summary_row(v, c, kl_reference_variant(c->family), pass, t));
        int count;
        const kl_variant *variant = kl_family_variants(c->family, &count);
        for (int i = 0; i < count; i++) {
            if (variant[i].device != v->ctx->device || (pass == KL_BACKWARD && !variant[i].backward))
                continue;
            if (kl_failed(variant[i].check(kl_case_problem(c, variant[i].device), pass)))
                continue;
            KL_TRY(summary_row(v, c, &variant[i], pass, t));
        }
    }
    return kl_ok();
}

kl_status kl_verify_summary(kl_verifier *v)
{
    kl_table t;
    kl_case c;
    kl_table_start(&t, 7, (const char *[]){"family", "pass", "variant", "error", "limit", "ms", ""});
    kl_status s = kl_case_kda(&c, &(kl_kda_spec){.T = 512, .H = 4, .K = 128, .regime = KL_REGIME_MIXED, .state = true, .backward = true, .seed = 1});
    for (int family = 0; !kl_failed(s) && family < 4; family++) {
        if (family == KL_FAMILY_DPLR) {
            kl_case kda;
            s = kl_case_kda(&kda, &(kl_kda_spec){.T = 512, .H = 4, .K = 128, .regime = KL_REGIME_MIXED, .state = true, .seed = 1});
            if (!kl_failed(s))
                s = kl_case_dplr(&c, &kda);
            kl_case_free(&kda);
        } else if (family == KL_FAMILY_MLA) {
            kl_dtype stored = v->ctx->device == KL_CUDA ? KL_BF16 : KL_F32;
            s = kl_case_mla(&c, &(kl_mla_spec){.latent_dtype = stored, .weight_dtype = stored, .T = 256, .H = 4, .R = 512, .Dn = 128, .Dr = 64, .Dv = 128, .backward = true, .seed = 1});
        } else if (family == KL_FAMILY_MOE) {
            s = kl_case_moe(&c, &(kl_moe_spec){.T = 128, .D = 256, .E = 16, .I = 128, .top_k = 4, .Is = 128, .renormalize = true,
                                               .scale = 2.446f, .backward = true, .seed = 1});
        }
        if (!kl_failed(s)) {
            s = summary_case(v, &c, &t);
            kl_case_free(&c);
        }
    }
    kl_table_print(&t, stdout);
    kl_table_free(&t);
    return s;
}
