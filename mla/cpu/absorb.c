/* The two ends of the absorbed form: queries into the latent space, the weighted latent out of it. Each weight is read
 * once for all tokens of a round; a row's bits do not depend on the other rows. */
#include "mla/cpu/recurrent.h"

enum { COLUMNS = 4 * KL_LANES, OUTPUTS = 16 };

int64_t mla_absorb_scratch(const mla_problem *p)
{
    return p->weight_dtype == KL_F32 ? 0 : mla_max(p->Dn * COLUMNS, p->R * OUTPUTS);
}

/* out[0..columns) = scale sum_d q[d] w[d][0..columns) */
static void vector_matrix(const float *q, int64_t Dn, const float *w, int64_t ldw, int64_t columns, float scale, float *out)
{
    if (columns == COLUMNS) {
        kl_v sum[4] = {{0}};
        for (int64_t d = 0; d < Dn; d++)
            for (int v = 0; v < 4; v++)
                sum[v] += q[d] * kl_vload(w + d * ldw + v * KL_LANES);
        for (int v = 0; v < 4; v++)
            kl_vstore(out + v * KL_LANES, sum[v] * scale);
        return;
    }
    for (int64_t c = 0; c < columns; c += KL_LANES) {
        int64_t size = mla_min(KL_LANES, columns - c);
        kl_v sum = {0};
        for (int64_t d = 0; d < Dn; d++)
            sum += q[d] * kl_vload_as(w + d * ldw, KL_F32, c, size);
        kl_vstore_up_to(out + c, sum * scale, size);
    }
}

static const float *query_at(const mla_problem *p, const mla_job *job, int64_t token, int64_t h)
{
    return (const float *)p->q + (size_t)(p->cu_q[job->n] + job->i0 + token) * (size_t)mla_q_stride(p) + (size_t)(h * (p->Dn + p->Dr));
}

void mla_absorb(const mla_problem *p, const mla_job *jobs, int64_t count, float *scratch, float *rows)
{
    int64_t width = p->R + p->Dr;
    float scale = mla_scale(p);
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < p->H; h++) {
        for (int64_t c = 0; c < p->R; c += COLUMNS) {
            int64_t columns = mla_min(COLUMNS, p->R - c), ldw;
            const float *w = mla_float_tile(mla_weight_at(p, h, 0, c), p->weight_dtype, p->R, p->Dn, columns, scratch, &ldw);
            for (const mla_job *job = jobs; job < jobs + count; job++) {
                for (int64_t t = 0; t < job->tokens; t++) {
                    const float *q = query_at(p, job, t, h);
                    float *row = rows + (size_t)(job->row + t * p->H + h) * (size_t)width;
                    vector_matrix(q, p->Dn, w, ldw, columns, scale, row + c);
                    for (int64_t e = 0; e < p->Dr && c == 0; e++)
                        row[p->R + e] = scale * q[p->Dn + e];
                }
            }
        }
    }
    /* The rows that fill up the last group of a job. */
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        size_t used = (size_t)(jobs[i].tokens * p->H), all = (size_t)(jobs[i].groups * MLA_GROUP);
        memset(rows + ((size_t)jobs[i].row + used) * (size_t)width, 0, (all - used) * (size_t)width * sizeof(float));
    }
}

static float dot(const float *a, const float *b, int64_t n)
{
    kl_v even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * KL_LANES <= n; i += 2 * KL_LANES) {
        even += kl_vload(a + i) * kl_vload(b + i);
        odd += kl_vload(a + i + KL_LANES) * kl_vload(b + i + KL_LANES);
    }
    for (; i < n; i += KL_LANES) {
        int64_t size = mla_min(KL_LANES, n - i);
        even += kl_vload_as(a, KL_F32, i, size) * kl_vload_as(b, KL_F32, i, size);
    }
    return kl_vsum(even + odd);
}

void mla_project(const mla_problem *p, const mla_job *jobs, int64_t count, float *scratch, const float *rows)
{
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < p->H; h++) {
        for (int64_t e0 = 0; e0 < p->Dv; e0 += OUTPUTS) {
            int64_t outputs = mla_min(OUTPUTS, p->Dv - e0), ldw;
            const float *w = mla_float_tile(mla_weight_at(p, h, p->Dn + e0, 0), p->weight_dtype, p->R, outputs, p->R, scratch, &ldw);
            for (const mla_job *job = jobs; job < jobs + count; job++) {
                for (int64_t t = 0; t < job->tokens; t++) {
                    const float *row = rows + (size_t)(job->row + t * p->H + h) * (size_t)(p->R + p->Dr);
                    float *o = (float *)p->o + ((size_t)(p->cu_q[job->n] + job->i0 + t) * (size_t)p->H + (size_t)h) * (size_t)p->Dv;
                    for (int64_t e = 0; e < outputs; e++)
                        o[e0 + e] = dot(w + e * ldw, row, p->R);
                }
            }
        }
    }
}
