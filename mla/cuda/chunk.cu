/* Host side of the chunk kernels: batches, their tables, expanded keys and values. */
#include "mla/cuda/chunk.cuh"

#include <algorithm>
#include <climits>

/* Bytes of expanded keys and latents that the second cache is trusted to hold. */
static const int64_t cached = (int64_t)24 << 20;

kl_status mla_check_chunk(const mla_problem *p)
{
    KL_TRY(mla_check_bf16(p, "chunk"));
    const struct { const char *name; int64_t value, most; } dim[] = {{"Dn", p->Dn, MLA_DN}, {"Dr", p->Dr, MLA_DR}, {"Dv", p->Dv, MLA_DV}};
    for (auto &d : dim)
        if (d.value > d.most)
            return kl_error(KL_EUNSUPPORTED, "%s: mla chunk on cuda offers at most %lld, got %lld", d.name, (long long)d.most, (long long)d.value);
    if (p->N > 0 && p->cu_q && p->cu_q[p->N] > INT_MAX)
        return kl_error(KL_EUNSUPPORTED, "cu_q: mla chunk on cuda offers at most %d queries, got %lld", INT_MAX, (long long)p->cu_q[p->N]);
    if (p->scale < 0.0f)
        return kl_error(KL_EUNSUPPORTED, "scale: mla chunk on cuda offers positive ones, got %g", (double)p->scale);
    return kl_ok();
}

static int64_t keys_of(const mla_problem *p, int64_t n) { return mla_queries(p, n) ? p->kv_len[n] : 0; }

mla_batch mla_next_batch(const mla_problem *p, int64_t n0, size_t bytes, size_t budget)
{
    int64_t fits = (int64_t)(budget / bytes);
    mla_batch b = {n0, n0, 0, p->H};
    while (b.n1 < p->N && (b.rows == 0 || b.rows + keys_of(p, b.n1) <= fits))
        b.rows += keys_of(p, b.n1++);
    b.heads = b.rows ? std::min(p->H, std::max(fits / b.rows, (int64_t)1)) : p->H;
    return b;
}

size_t mla_most_rows(const mla_problem *p, size_t bytes, size_t budget)
{
    int64_t most = 0;
    for (int64_t n = 0; n < p->N;) {
        mla_batch b = mla_next_batch(p, n, bytes, budget);
        most = std::max(most, b.rows * b.heads);
        n = b.n1;
    }
    return (size_t)most;
}

/* The sequences of the batch that have queries, longest keys first where there are few; returns how many. */
static int64_t order_of(const mla_problem *p, const mla_batch &b, int64_t order[MLA_ORDERED_SEQUENCES])
{
    int64_t count = 0;
    for (int64_t n = b.n0; n < b.n1; n++)
        if (mla_queries(p, n) && count++ < MLA_ORDERED_SEQUENCES)
            order[count - 1] = n;
    if (count <= MLA_ORDERED_SEQUENCES)
        std::sort(order, order + count, [p](int64_t x, int64_t y) { return p->kv_len[x] != p->kv_len[y] ? p->kv_len[x] > p->kv_len[y] : x < y; });
    return count;
}

static int gathered(const mla_problem *p, int64_t n, int64_t heads)
{
    int64_t bytes = p->kv_len[n] * (p->Dn + p->Dr + p->Dv) * 2;
    return (int)std::min(heads, std::max(cached / std::max(bytes, (int64_t)1), (int64_t)1));
}

kl_status mla_upload_sequences(const kl_ctx *ctx, const mla_problem *p, const mla_batch &b, bool pe_copied, mla_sequence *table,
                               mla_sequences *out)
{
    int64_t order[MLA_ORDERED_SEQUENCES], count = order_of(p, b, order), blocks = 0, key_blocks = 0, key_row = 0, done = 0, n = b.n0;
    mla_sequence row[MLA_ORDERED_SEQUENCES];
    while (done < count) {
        int filled = 0;
        for (; filled < MLA_ORDERED_SEQUENCES && done + filled < count; filled++) {
            if (count <= MLA_ORDERED_SEQUENCES) {
                n = order[filled];
                key_row = 0;
                for (int64_t m = b.n0; m < n; m++)
                    key_row += keys_of(p, m);
            } else {
                while (!mla_queries(p, n))
                    n++;
            }
            row[filled] = {p->cu_q[n], key_row, p->kv_start[n], pe_copied ? key_row : p->kv_start[n], (int)mla_queries(p, n), (int)p->kv_len[n],
                           (int)blocks, (int)key_blocks, gathered(p, n, b.heads)};
            blocks += (mla_queries(p, n) + MLA_BLOCK - 1) / MLA_BLOCK;
            key_blocks += (p->kv_len[n] + MLA_BLOCK - 1) / MLA_BLOCK;
            key_row += keys_of(p, n++);
        }
        KL_TRY(kl_upload(ctx, table + done, row, (size_t)filled * sizeof *row));
        done += filled;
    }
    *out = {table, (int)count, (int)b.heads, (int)blocks, (int)key_blocks};
    return kl_ok();
}

mla_run mla_next_run(const mla_problem *p, const mla_batch &b, const mla_run &last)
{
    mla_run r = {last.next, last.next, last.row + last.rows, 0, 0};
    while (r.n < b.n1 && !keys_of(p, r.n))
        r.n++;
    for (r.next = r.n; r.next < b.n1 && keys_of(p, r.next) && (!r.rows || p->kv_start[r.next] == r.latent_row + r.rows); r.next++) {
        r.latent_row = r.rows ? r.latent_row : p->kv_start[r.next];
        r.rows += keys_of(p, r.next);
    }
    return r;
}

mla_run mla_first_run(const mla_problem *p, const mla_batch &b) { return mla_next_run(p, b, {b.n0, b.n0, 0, 0, 0}); }

kl_status mla_expand_rows(kl_ctx *ctx, const mla_problem *p, const mla_batch &b, int64_t head0, int64_t heads, void *expanded, void *workspace)
{
    kl_range range("mla expand");
    kl_product shape = {};
    shape.N = heads * (p->Dn + p->Dv), shape.K = p->R;
    shape.a_stride = p->R + p->Dr, shape.b_stride = p->R, shape.y_stride = shape.N;
    shape.b_transposed = true;
    shape.y_dtype = KL_BF16;
    for (mla_run r = mla_first_run(p, b); r.rows; r = mla_next_run(p, b, r)) {
        uint16_t *y = (uint16_t *)expanded + (size_t)r.row * (size_t)shape.y_stride;
        shape.M = r.rows;
        KL_TRY(kl_gpu_product(ctx, &shape, 1.0f, mla_latent_at(p, r.latent_row, 0), mla_weight_at(p, head0, 0, 0), 0.0f, y, y, workspace,
                              KL_PRODUCT_WORKSPACE));
    }
    return kl_ok();
}

kl_status mla_map_heads(kl_tensor_map *map, const char *name, const void *base, int64_t rows, int64_t row_stride, int64_t heads, int64_t head_stride,
                        int64_t column, int64_t columns, int box)
{
    kl_tensor_shape s;
    s.dims = 3;
    s.size[0] = columns ? columns : 8, s.size[1] = heads, s.size[2] = rows;
    s.stride[1] = head_stride, s.stride[2] = row_stride;
    s.box[0] = 64, s.box[1] = 1, s.box[2] = box;
    return kl_tensor_describe(map, name, (const uint16_t *)base + (columns ? column : 0), s);
}

mla_piece mla_piece_of(const mla_problem *p, const mla_batch &b, const mla_sequences &s, int64_t head0, const uint16_t *expanded)
{
    mla_piece x = {s, b.rows, head0, mla_min(b.heads, p->H - head0), expanded, (const uint16_t *)p->latent, p->latent_rows, p->R + p->Dr};
    x.sequences.heads = (int)x.heads;
    x.pe += p->R;
    return x;
}

kl_status mla_describe(mla_reads *r, const mla_problem *p, const mla_piece &x, int queries, int keys)
{
    int64_t tokens = p->cu_q[p->N], head = p->Dn + p->Dr, expanded = p->Dn + p->Dv, stride = mla_q_stride(p);
    KL_TRY(mla_map_heads(&r->q, "q", p->q, tokens, stride, p->H, head, 0, p->Dn, queries));
    KL_TRY(mla_map_heads(&r->q_pe, "q", p->q, tokens, stride, p->H, head, p->Dn, p->Dr, queries));
    KL_TRY(mla_map_heads(&r->k, "workspace", x.expanded, x.rows, x.heads * expanded, x.heads, expanded, 0, p->Dn, keys));
    KL_TRY(mla_map_heads(&r->v, "workspace", x.expanded, x.rows, x.heads * expanded, x.heads, expanded, p->Dn, p->Dv, keys));
    KL_TRY(mla_map_heads(&r->pe, "latent", x.pe, x.pe_rows, x.pe_stride, 1, x.pe_stride, 0, p->Dr, keys));
    r->q_pe_column = r->pe_column = p->Dr ? 0 : 64;
    r->head0 = (int)x.head0;
    r->Dn = (int)p->Dn;
    r->Dr = (int)p->Dr;
    r->Dv = (int)p->Dv;
    r->sequences = x.sequences;
    r->scale = mla_scale(p);
    r->scale_log2 = r->scale * 1.44269504f;
    return kl_ok();
}
