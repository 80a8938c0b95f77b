/* A case in the memory of a device: its tensors in the types and places that were asked for, each an allocation of its
 * own, and the way back. Whatever a variant had no business writing must come back as it was. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/problem_device.h"

const kl_case *kl_image_case(const kl_image *image) { return &image->on; }
const kl_ctx *kl_image_context(const kl_image *image) { return image->ctx; }

/* Row r of the part on the device. */
static size_t row_at(const kl_image *im, const kl_part *p, int64_t r)
{
    int64_t row = p->kind == KL_PART_STATE && im->slot ? im->slot[r] : r;
    return (size_t)(row * p->pitch) * kl_dtype_size(p->dtype);
}

/* ---- rounding ---- */

static bool round_to(float *x, kl_dtype type, int64_t count)
{
    bool changed = false;
    for (int64_t i = 0; type == KL_BF16 && i < count; i++) {
        float rounded = kl_bf16_to_f32(kl_f32_to_bf16(x[i]));
        changed |= rounded != x[i];
        x[i] = rounded;
    }
    return changed;
}

static kl_tolerance tolerance_of(const kl_case *c)
{
    bool coarse = c->place.dtype == KL_BF16 || c->place.state_dtype == KL_BF16;
    if (c->family == KL_FAMILY_MLA)
        return coarse ? kl_tol_mla_bf16 : kl_tol_mla_f32;
    if (c->family == KL_FAMILY_MOE)
        return coarse ? kl_tol_moe_bf16 : kl_tol_moe_f32;
    return !coarse ? kl_tol_kda_f32 : c->correlated ? kl_tol_kda_bf16_corr : kl_tol_kda_bf16;
}

kl_status kl_case_place(kl_case *c, const kl_placement *place, bool *changed)
{
    kl_image im = {0};
    bool any = false;
    c->place = *place;
    KL_TRY(kl_parts_list(&im, c));
    for (int i = 0; i < im.count; i++)
        if (im.part[i].in && im.part[i].kind != KL_PART_STORED)
            any |= round_to((float *)im.part[i].in, im.part[i].dtype, im.part[i].rows * im.part[i].width);
    if (any)
        kl_case_forget(c);
    c->tolerance = tolerance_of(c);
    size_t used = strlen(c->name);
    snprintf(c->name + used, sizeof c->name - used, " %s%s%s%s%s", place->dtype == KL_BF16 ? "bf16" : "f32",
             place->state_dtype == KL_BF16 ? " bf16-state" : "", place->gap ? " strided" : "", place->pool ? " pool" : "",
             place->in_place ? " in-place" : "");
    if (changed)
        *changed = any;
    return kl_ok();
}

/* ---- to the device ---- */

/* What the problem's field shall point to: the tensor, or a table of its rows. */
static kl_status address(const kl_image *im, kl_part *p, void **at)
{
    *at = p->memory;
    if (!p->tabled)
        return kl_ok();
    p->table = malloc((size_t)(p->rows + 1) * sizeof *p->table);
    if (!p->table)
        return kl_error(KL_ENOMEM, "%s: out of memory for its table", p->name);
    for (int64_t r = 0; r < p->rows; r++)
        p->table[r] = (char *)p->memory + row_at(im, p, r);
    *at = p->table;
    return kl_ok();
}

static kl_status place_part(kl_image *im, kl_part *p)
{
    void *at;
    p->before = malloc(p->bytes + 1);
    if (!p->before)
        return kl_error(KL_ENOMEM, "%s: out of memory for its image", p->name);
    memset(p->before, p->accumulates ? 0 : 0xff, p->bytes);
    if (p->in && p->kind == KL_PART_STORED)
        memcpy(p->before, p->in, p->bytes);
    else
        for (int64_t r = 0; p->in && r < p->rows; r++)
            kl_from_f32(p->before + row_at(im, p, r), p->dtype, (const float *)p->in + r * p->width, (size_t)p->width);
    KL_TRY(kl_gpu_alloc(im->ctx, &p->memory, p->bytes));
    KL_TRY(address(im, p, &at));
    for (int i = 0; i < 2; i++)
        if (p->field[i])
            memcpy((void *)p->field[i], &at, sizeof at);
    if (p->stride)
        *p->stride = p->pitch == p->width ? 0 : p->pitch;
    return kl_ok();
}

static kl_status place_pool(kl_image *im, int64_t N)
{
    kda_problem *p = &im->on.problem.kda;
    im->slot = malloc((size_t)(N + 1) * sizeof *im->slot);
    if (!im->slot)
        return kl_error(KL_ENOMEM, "state_index: out of memory");
    for (int64_t n = 0; n < N; n++)
        im->slot[n] = kl_pool_slot(N, n);
    KL_TRY(kl_gpu_alloc(im->ctx, &im->slots, (size_t)N * sizeof *im->slot));
    KL_TRY(kl_gpu_copy(im->ctx, im->slots, im->slot, (size_t)N * sizeof *im->slot));
    p->state_index = im->slots;
    p->state_pool = kl_pool_slots(N);
    return kl_ok();
}

static kl_status place_all(kl_image *im, const kl_case *c)
{
    KL_TRY(kl_parts_list(im, c));
    if (c->place.pool && c->family == KL_FAMILY_KDA)
        KL_TRY(place_pool(im, c->problem.kda.N));
    for (int i = 0; i < im->count; i++)
        KL_TRY(place_part(im, &im->part[i]));
    return kl_ok();
}

void kl_image_free(kl_image *im)
{
    for (int i = 0; im && i < im->count; i++) {
        free(im->part[i].before);
        free(im->part[i].table);
        if (im->part[i].memory)
            kl_gpu_free(im->ctx, im->part[i].memory);
    }
    if (im && im->slots)
        kl_gpu_free(im->ctx, im->slots);
    free(im ? im->slot : NULL);
    free(im);
}

kl_status kl_case_upload(const kl_ctx *ctx, kl_case *c)
{
    kl_image *im = calloc(1, sizeof *im);
    if (!im)
        return kl_error(KL_ENOMEM, "%s: out of memory", c->name);
    im->ctx = ctx;
    kl_status s = place_all(im, c);
    if (kl_failed(s)) {
        kl_image_free(im);
        return s;
    }
    kl_image_free(c->image);
    c->image = im;
    return kl_image_send(im);
}

kl_status kl_image_send(const kl_image *im)
{
    for (int i = 0; i < im->count; i++)
        KL_TRY(kl_gpu_copy(im->ctx, im->part[i].memory, im->part[i].before, im->part[i].bytes));
    return kl_ok();
}

/* ---- and back ---- */

/* Takes the part's results out of its bytes; what remains must be as it was. */
static kl_status take(const kl_image *im, const kl_part *p, unsigned char *after, kl_pass pass)
{
    KL_TRY(kl_gpu_copy(im->ctx, after, p->memory, p->bytes));
    bool written = p->out && p->gradient == (pass == KL_BACKWARD);
    for (int64_t r = 0; written && r < p->rows; r++) {
        size_t at = row_at(im, p, r);
        kl_to_f32(p->out + r * p->width, after + at, p->dtype, (size_t)p->width);
        memcpy(after + at, p->before + at, (size_t)p->width * kl_dtype_size(p->dtype));
    }
    KL_REQUIRE(memcmp(after, p->before, p->bytes) == 0, written ? "%s: was written between its rows" : "%s: was written", p->name);
    return kl_ok();
}

kl_status kl_image_fetch(const kl_image *im, kl_pass pass)
{
    for (int i = 0; i < im->count; i++) {
        const kl_part *p = &im->part[i];
        unsigned char *after = malloc(p->bytes + 1);
        kl_status s = after ? take(im, p, after, pass) : kl_error(KL_ENOMEM, "%s: out of memory", p->name);
        free(after);
        KL_TRY(s);
    }
    return kl_ok();
}
