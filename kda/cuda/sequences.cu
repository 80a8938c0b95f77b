/* The table of packed sequences, made on the host and sent through kernel parameters. */
#include "kda/cuda/sequences.cuh"

#include <algorithm>

void kda_sequences_order(const kda_problem *p, int64_t *order)
{
    const int64_t *cu = p->cu_seqlens;
    for (int64_t n = 0; n < p->N; n++)
        order[n] = n;
    std::sort(order, order + p->N, [cu](int64_t a, int64_t b) {
        int64_t la = cu[a + 1] - cu[a], lb = cu[b + 1] - cu[b];
        return la != lb ? la > lb : a < b;
    });
}

kda_sequences kda_sequences_of(const kda_problem *p, const void *table)
{
    kda_sequences s = {};
    s.row = p->cu_seqlens ? (const kda_sequence_row *)table : nullptr;
    s.N = p->N;
    s.T = p->T;
    s.tile = kda_tile_tokens(p);
    s.chunk = (int)kda_chunk_tokens(p);
    return s;
}

/* Longest first where they are few, as they come otherwise. */
kl_status kda_sequences_upload(const kl_ctx *ctx, const kda_problem *p, void *table)
{
    if (!p->cu_seqlens)
        return kl_ok();
    const int64_t *cu = p->cu_seqlens;
    int tile = kda_tile_tokens(p);
    int64_t chunk = kda_chunk_tokens(p);
    enum { ROWS = KDA_ORDERED_SEQUENCES + 1 }; /* of one upload */
    kda_sequence_row row[ROWS], next = {};
    for (int64_t first = 0; first <= p->N; first += ROWS) {
        int count = (int)std::min<int64_t>(ROWS, p->N + 1 - first);
        for (int i = 0; i < count; i++) {
            int64_t n = first + i;
            row[i] = next;
            row[i].order = n;
            if (n == p->N)
                break;
            int64_t length = cu[n + 1] - cu[n];
            next.begin += length;
            next.tile += kda_ceil(length, tile);
            next.chunk += kda_ceil(length, chunk);
        }
        if (p->N <= KDA_ORDERED_SEQUENCES) {
            int64_t order[KDA_ORDERED_SEQUENCES];
            kda_sequences_order(p, order);
            for (int64_t n = 0; n < p->N; n++)
                row[n].order = order[n];
        }
        KL_TRY(kl_upload(ctx, (kda_sequence_row *)table + first, row, (size_t)count * sizeof *row));
    }
    return kl_ok();
}
