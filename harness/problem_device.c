/* A case in the memory of a device: its tensors in the types and places that were asked for, each an allocation of its
 * own, and the way back. Whatever a variant had no business writing must come back as it was. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "harness/problem_build.h"

typedef enum part_kind { ACTIVATION, STATE, PLAIN } part_kind;

/* One tensor [rows,width], on the host float and dense. */
typedef struct part {
    const char *name;
    part_kind kind;
    const float *in;       /* what the variant reads; NULL: nothing */
    float *out;            /* what it writes */
    bool gradient, accumulates;
    const void *field[2];  /* where the problem points to it */
    int64_t *stride;       /* the problem's stride, where it has one */
    int64_t rows, width;
    kl_dtype dtype;
    int64_t pitch;         /* elements from row to row */
    size_t bytes;
    unsigned char *before; /* its bytes on the device before a run */
    void *memory;
} part;

enum { PARTS = 24 };

typedef struct kl_image {
    const kl_ctx *ctx;
    kl_case on;            /* the case with the device's pointers */
    int count;
    part part[PARTS];
    int64_t *slot;         /* [N] where sequence n's state lies in the pool; NULL: n */
    void *slots;           /* the same on the device */
} kl_image;

const kl_case *kl_image_case(const kl_image *image) { return &image->on; }

/* Slots of the pool are taken from the last on, leaving every other one to nobody. */
static int64_t pool_slots(int64_t N) { return 2 * N + 1; }
static int64_t pool_slot(int64_t N, int64_t n) { return 2 * (N - n) - 1; }

/* An empty tensor may have the address of the next one. */
static const kl_case_tensor *tensor_of(const kl_case *c, const float *out)
{
    for (int i = 0; i < c->count; i++)
        if (c->tensor[i].out == out && c->tensor[i].T * c->tensor[i].H * c->tensor[i].D > 0)
            return &c->tensor[i];
    return NULL;
}

static part *add(kl_image *im, const kl_case *c, const char *name, part_kind kind, const void *in, void *out, const void *field, int64_t *stride,
                 int64_t rows, int64_t width)
{
    if (!in && !out)
        return NULL;
    const kl_placement *at = &c->place;
    part *p = &im->part[im->count++];
    const kl_case_tensor *t = out ? tensor_of(c, out) : NULL;
    *p = (part){.name = name, .kind = kind, .in = in, .out = out, .gradient = t && t->gradient, .accumulates = t && t->accumulates,
                .field = {field}, .stride = stride, .rows = rows, .width = width,
                .dtype = kind == ACTIVATION ? at->dtype : kind == STATE ? at->state_dtype : KL_F32,
                .pitch = width + (stride ? at->gap : 0)};
    int64_t held = kind == STATE && at->pool ? pool_slots(rows) : rows;
    p->bytes = held ? (size_t)(held * p->pitch - (p->pitch - width)) * kl_dtype_size(p->dtype) : 0;
    return p;
}

static void list_kda(kl_image *im, const kl_case *c)
{
    const kda_problem *h = &c->problem.kda;
    kda_problem *p = &im->on.problem.kda;
    const kda_grads *hg = &c->grads.kda;
    kda_grads *g = &im->on.grads.kda;
    int64_t tokens = h->B * h->T, keys = h->H * h->K, values = h->HV * h->V, gates = h->HV * h->G, state = h->HV * h->K * h->V;
    p->dtype = c->place.dtype;
    p->state_dtype = c->place.state_dtype;
    add(im, c, "q", ACTIVATION, h->q, NULL, &p->q, &p->q_stride, tokens, keys);
    add(im, c, "k", ACTIVATION, h->k, NULL, &p->k, &p->k_stride, tokens, keys);
    add(im, c, "v", ACTIVATION, h->v, NULL, &p->v, &p->v_stride, tokens, values);
    add(im, c, "g", ACTIVATION, h->g, NULL, &p->g, &p->g_stride, tokens, gates);
    add(im, c, "beta", ACTIVATION, h->beta, NULL, &p->beta, &p->beta_stride, tokens, h->HV);
    add(im, c, "A_log", PLAIN, h->A_log, NULL, &p->A_log, NULL, 1, h->HV);
    add(im, c, "dt_bias", PLAIN, h->dt_bias, NULL, &p->dt_bias, NULL, 1, gates);
    if (c->place.in_place && h->h0 && h->ht && !c->backward) {
        part *both = add(im, c, "ht", STATE, h->h0, h->ht, &p->h0, NULL, h->N, state);
        both->field[1] = &p->ht;
    } else {
        add(im, c, "h0", STATE, h->h0, NULL, &p->h0, NULL, h->N, state);
        add(im, c, "ht", STATE, NULL, h->ht, &p->ht, NULL, h->N, state);
    }
    add(im, c, "o", ACTIVATION, NULL, h->o, &p->o, &p->o_stride, tokens, values);
    add(im, c, "chunk_states", PLAIN, NULL, h->chunk_states, &p->chunk_states, NULL, kda_chunk_count(h), state);
    add(im, c, "token_states", PLAIN, NULL, h->token_states, &p->token_states, NULL, tokens, state);
    add(im, c, "do", ACTIVATION, hg->d_o, NULL, &g->d_o, &p->o_stride, tokens, values);
    add(im, c, "dht", PLAIN, hg->dht, NULL, &g->dht, NULL, h->N, state);
    add(im, c, "dq", ACTIVATION, NULL, hg->dq, &g->dq, &p->q_stride, tokens, keys);
    add(im, c, "dk", ACTIVATION, NULL, hg->dk, &g->dk, &p->k_stride, tokens, keys);
    add(im, c, "dv", ACTIVATION, NULL, hg->dv, &g->dv, &p->v_stride, tokens, values);
    add(im, c, "dg", ACTIVATION, NULL, hg->dg, &g->dg, &p->g_stride, tokens, gates);
    add(im, c, "dbeta", ACTIVATION, NULL, hg->dbeta, &g->dbeta, &p->beta_stride, tokens, h->HV);
    add(im, c, "dA_log", PLAIN, NULL, hg->dA_log, &g->dA_log, NULL, 1, h->HV);
    add(im, c, "ddt_bias", PLAIN, NULL, hg->ddt_bias, &g->ddt_bias, NULL, 1, gates);
    add(im, c, "dh0", PLAIN, NULL, hg->dh0, &g->dh0, NULL, h->N, state);
}

static void list_dplr(kl_image *im, const kl_case *c)
{
    const dplr_problem *h = &c->problem.dplr;
    dplr_problem *p = &im->on.problem.dplr;
    p->dtype = c->place.dtype;
    int64_t tokens = h->B * h->T, keys = h->H * h->K, values = h->H * h->V, state = keys * h->V;
    add(im, c, "q", ACTIVATION, h->q, NULL, &p->q, NULL, tokens, keys);
    add(im, c, "k", ACTIVATION, h->k, NULL, &p->k, NULL, tokens, keys);
    add(im, c, "a", ACTIVATION, h->a, NULL, &p->a, NULL, tokens, keys);
    add(im, c, "b", ACTIVATION, h->b, NULL, &p->b, NULL, tokens, keys);
    add(im, c, "g", ACTIVATION, h->g, NULL, &p->g, NULL, tokens, keys);
    add(im, c, "v", ACTIVATION, h->v, NULL, &p->v, NULL, tokens, values);
    add(im, c, "h0", PLAIN, h->h0, NULL, &p->h0, NULL, h->N, state);
    add(im, c, "ht", PLAIN, NULL, h->ht, &p->ht, NULL, h->N, state);
    add(im, c, "o", ACTIVATION, NULL, h->o, &p->o, NULL, tokens, values);
}

/* The parts of the case, without memory. */
static kl_status list(kl_image *im, const kl_case *c)
{
    KL_REQUIRE(c->family == KL_FAMILY_KDA || c->family == KL_FAMILY_DPLR, "%s: has no place on a device yet", kl_family_name(c->family));
    im->on = *c;
    if (c->family == KL_FAMILY_KDA)
        list_kda(im, c);
    else
        list_dplr(im, c);
    return kl_ok();
}

/* Row r of the part on the device. */
static size_t row_at(const kl_image *im, const part *p, int64_t r)
{
    int64_t row = p->kind == STATE && im->slot ? im->slot[r] : r;
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

kl_status kl_case_place(kl_case *c, const kl_placement *place, bool *changed)
{
    kl_image im = {0};
    bool any = false;
    c->place = *place;
    KL_TRY(list(&im, c));
    for (int i = 0; i < im.count; i++)
        if (im.part[i].in)
            any |= round_to((float *)im.part[i].in, im.part[i].dtype, im.part[i].rows * im.part[i].width);
    for (int i = 0; any && i < c->count; i++) {
        free(c->tensor[i].want);
        c->tensor[i].want = NULL;
    }
    bool coarse = place->dtype == KL_BF16 || place->state_dtype == KL_BF16;
    c->tolerance = !coarse ? kl_tol_kda_f32 : c->correlated ? kl_tol_kda_bf16_corr : kl_tol_kda_bf16;
    size_t used = strlen(c->name);
    snprintf(c->name + used, sizeof c->name - used, " %s%s%s%s%s", place->dtype == KL_BF16 ? "bf16" : "f32",
             place->state_dtype == KL_BF16 ? " bf16-state" : "", place->gap ? " strided" : "", place->pool ? " pool" : "",
             place->in_place ? " in-place" : "");
    if (changed)
        *changed = any;
    return kl_ok();
}

/* ---- to the device ---- */

static kl_status place_part(kl_image *im, part *p)
{
    p->before = malloc(p->bytes + 1);
    if (!p->before)
        return kl_error(KL_ENOMEM, "%s: out of memory for its image", p->name);
    memset(p->before, p->accumulates ? 0 : 0xff, p->bytes);
    for (int64_t r = 0; p->in && r < p->rows; r++)
        kl_from_f32(p->before + row_at(im, p, r), p->dtype, p->in + r * p->width, (size_t)p->width);
    KL_TRY(kl_gpu_alloc(im->ctx, &p->memory, p->bytes));
    for (int i = 0; i < 2; i++)
        if (p->field[i])
            memcpy((void *)p->field[i], &p->memory, sizeof p->memory);
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
        im->slot[n] = pool_slot(N, n);
    KL_TRY(kl_gpu_alloc(im->ctx, &im->slots, (size_t)N * sizeof *im->slot));
    KL_TRY(kl_gpu_copy(im->ctx, im->slots, im->slot, (size_t)N * sizeof *im->slot));
    p->state_index = im->slots;
    p->state_pool = pool_slots(N);
    return kl_ok();
}

static kl_status place_all(kl_image *im, const kl_case *c)
{
    KL_TRY(list(im, c));
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
static kl_status take(const kl_image *im, const part *p, unsigned char *after, kl_pass pass)
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
        const part *p = &im->part[i];
        unsigned char *after = malloc(p->bytes + 1);
        kl_status s = after ? take(im, p, after, pass) : kl_error(KL_ENOMEM, "%s: out of memory", p->name);
        free(after);
        KL_TRY(s);
    }
    return kl_ok();
}
