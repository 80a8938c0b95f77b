/* Keys and values of one head from the latent rows, and how heads are grouped so that their expanded rows fit. */
#include "common/blas.h"
#include "mla/cpu/internal.h"

/* Weight rows converted at a time, when they are not float. */
enum { WEIGHT_TILE = 64 };

int64_t mla_sum_keys(const mla_problem *p, int64_t *key_sum)
{
    int64_t most = 0;
    key_sum[0] = 0;
    for (int64_t n = 0; n < p->N; n++) {
        key_sum[n + 1] = key_sum[n] + p->kv_len[n];
        most = mla_max(most, p->kv_len[n]);
    }
    return most;
}

int64_t mla_group_end(const mla_problem *p, const int64_t *key_sum, int64_t u, int64_t rows)
{
    int64_t first = mla_unit_row(p, key_sum, u), end = u + 1;
    while (end < p->N * p->H && mla_unit_row(p, key_sum, end + 1) - first <= rows)
        end++;
    return end;
}

int64_t mla_expand_scratch(const mla_problem *p)
{
    return ((p->latent_dtype == KL_F32 ? 0 : MLA_KEY_TILE) + (p->weight_dtype == KL_F32 ? 0 : WEIGHT_TILE)) * p->R;
}

/* out[rows,count] = c [rows,R] W_h[first .. first+count-1, R]^T */
static void product(const mla_problem *p, const float *c, int64_t ldc, int64_t h, int64_t first, int64_t count, int64_t rows,
                    float *scratch, float *out)
{
    int64_t step = p->weight_dtype == KL_F32 ? count : WEIGHT_TILE;
    for (int64_t i = 0; i < count; i += step) {
        int64_t size = mla_min(step, count - i), ldw;
        const float *w = mla_float_tile(mla_weight_at(p, h, first + i, 0), p->weight_dtype, p->R, size, p->R, scratch, &ldw);
        kl_gemm_serial(KL_N, KL_T, rows, size, p->R, 1.0f, c, ldc, w, ldw, 0.0f, out + i, mla_row(p));
    }
}

void mla_expand(const mla_problem *p, int64_t u, int64_t j0, int64_t rows, float *scratch, float *out)
{
    int64_t n = u / p->H, h = u % p->H, first = p->kv_start[n] + j0, ldc;
    const float *c = mla_float_tile(mla_latent_at(p, first, 0), p->latent_dtype, p->R + p->Dr, rows, p->R, scratch, &ldc);
    float *weights = p->latent_dtype == KL_F32 ? scratch : scratch + MLA_KEY_TILE * p->R;
    /* k_j = [Wk_h c_j | pe_j],  v_j = Wv_h c_j */
    product(p, c, ldc, h, 0, p->Dn, rows, weights, out);
    product(p, c, ldc, h, p->Dn, p->Dv, rows, weights, out + p->Dn + p->Dr);
    for (int64_t j = 0; j < rows; j++)
        kl_to_f32(out + j * mla_row(p) + p->Dn, mla_latent_at(p, first + j, p->R), p->latent_dtype, (size_t)p->Dr);
}
