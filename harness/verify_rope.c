/* Rotary embedding at random sizes, strides and positions, there and back, in every type that the device takes, against double precision. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/gpu.h"
#include "common/rng.h"
#include "harness/verify.h"

typedef struct rotation {
    int64_t rows, heads, Dr, head_stride, row_stride, size;
    float theta;
    bool inverse;
    int64_t *position; /* [rows] */
    float *x, *out;    /* [size]: heads in the middle of wider rows; what lies between them must stay */
    double *want;
} rotation;

static void draw(rotation *r, kl_rng *from, int64_t i)
{
    static const int64_t rows[] = {1, 2, 33, 129, 500}, heads[] = {1, 2, 5}, dims[] = {2, 16, 64, 100};
    *r = (rotation){.rows = rows[i % 5], .heads = heads[kl_rng_below(from, 3)], .Dr = dims[kl_rng_below(from, 4)], .inverse = kl_rng_below(from, 2),
                    .theta = kl_rng_below(from, 2) ? 10000.0f : 5e5f};
    r->head_stride = r->Dr + (int64_t)kl_rng_below(from, 20);
    r->row_stride = r->heads * r->head_stride + (int64_t)kl_rng_below(from, 9);
    r->size = r->rows * r->row_stride;
}

static kl_status fill(rotation *r, kl_rng *from)
{
    r->position = malloc((size_t)r->rows * sizeof *r->position);
    r->x = malloc(2 * (size_t)r->size * sizeof *r->x);
    r->want = malloc((size_t)r->size * sizeof *r->want);
    if (!r->position || !r->x || !r->want)
        return kl_error(KL_ENOMEM, "rope: out of memory");
    r->out = r->x + r->size;
    kl_fill_normal(from, r->x, (size_t)r->size, 0.0f, 1.0f);
    for (int64_t t = 0; t < r->rows; t++)
        r->position[t] = (int64_t)kl_rng_below(from, 1 << 20);
    for (int64_t j = 0; j < r->size; j++)
        r->want[j] = r->x[j] = kl_bf16_to_f32(kl_f32_to_bf16(r->x[j]));
    for (int64_t t = 0; t < r->rows; t++)
        for (int64_t i = 0; i < r->Dr / 2; i++) {
            double angle = (double)r->position[t] * pow((double)r->theta, -2.0 * (double)i / (double)r->Dr) * (r->inverse ? -1.0 : 1.0);
            for (int64_t h = 0; h < r->heads; h++) {
                double *a = r->want + t * r->row_stride + h * r->head_stride + i, *b = a + r->Dr / 2, a0 = *a, b0 = *b;
                *a = a0 * cos(angle) - b0 * sin(angle);
                *b = b0 * cos(angle) + a0 * sin(angle);
            }
        }
    return kl_ok();
}

static kl_status rotate(kl_ctx *ctx, const rotation *r, kl_dtype dtype, void *x, const int64_t *position)
{
    return dtype == KL_BF16 ? mla_rope_bf16(ctx, x, r->rows, r->heads, r->Dr, r->row_stride, r->head_stride, position, r->theta, r->inverse)
                            : mla_rope(ctx, x, r->rows, r->heads, r->Dr, r->row_stride, r->head_stride, position, r->theta, r->inverse);
}

/* x and positions over, the result in `x` again. */
static kl_status rotate_there(kl_ctx *ctx, const rotation *r, kl_dtype dtype, void *x)
{
    size_t bytes = (size_t)r->size * kl_dtype_size(dtype), before = (bytes + 255) / 256 * 256, positions = (size_t)r->rows * sizeof *r->position;
    void *memory;
    KL_TRY(kl_gpu_alloc(ctx, &memory, before + positions));
    int64_t *position = (int64_t *)((char *)memory + before);
    kl_status s = kl_gpu_copy(ctx, memory, x, bytes);
    s = kl_failed(s) ? s : kl_gpu_copy(ctx, position, r->position, positions);
    s = kl_failed(s) ? s : rotate(ctx, r, dtype, memory, position);
    s = kl_failed(s) ? s : kl_gpu_sync(ctx);
    s = kl_failed(s) ? s : kl_gpu_copy(ctx, x, memory, bytes);
    kl_gpu_free(ctx, memory);
    return s;
}

static kl_status check(kl_verifier *v, const rotation *r, int64_t i, kl_dtype dtype)
{
    bool device = v->ctx->device == KL_CUDA;
    void *x = malloc((size_t)r->size * sizeof(float));
    if (!x)
        return kl_error(KL_ENOMEM, "rope: out of memory");
    kl_from_f32(x, dtype, r->x, (size_t)r->size);
    kl_status s = device ? rotate_there(v->ctx, r, dtype, x) : rotate(v->ctx, r, dtype, x, r->position);
    kl_to_f32(r->out, x, dtype, (size_t)r->size);
    free(x);
    KL_TRY(s);
    char name[96];
    snprintf(name, sizeof name, "%lld: rows %lld H%lld Dr%lld theta %g%s", (long long)i, (long long)r->rows, (long long)r->heads, (long long)r->Dr, (double)r->theta,
             r->inverse ? " inverse" : "");
    kl_verify_row(v, &(kl_check){.subject = name, .variant = "rope", .tensor = kl_dtype_name(dtype), .err = kl_rel_err(r->out, r->want, (size_t)r->size), .blocks = NAN,
                                 .limit = dtype == KL_BF16 ? kl_tol_mla_bf16.forward : kl_tol_mla_f32.forward});
    return kl_ok();
}

kl_status kl_verify_rope(kl_verifier *v, uint64_t seed, int64_t i)
{
    kl_rng from = kl_rng_make(seed, (UINT64_C(1) << 33) + (uint64_t)i);
    rotation r;
    draw(&r, &from, i);
    kl_status s = fill(&r, &from);
    for (int type = 0; type < (v->ctx->device == KL_CUDA ? 2 : 1) && !kl_failed(s); type++)
        s = check(v, &r, i, type ? KL_BF16 : KL_F32);
    free(r.position);
    free(r.x);
    free(r.want);
    return s;
}
