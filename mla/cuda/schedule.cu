#include "mla/cuda/schedule.h"

#include <algorithm>

namespace {

/* A part may grow by one in so many to end with a tile. */
enum { SLACK = 16 };

int queries(const mla_problem *p, int64_t n) { return (int)mla_queries(p, n); }

int tile_blocks(const mla_problem *p, int n, int tile) { return mla_blocks(mla_tile_keys((int)p->kv_len[n], queries(p, n), (int)p->H, tile)); }

int64_t all_blocks(const mla_problem *p)
{
    int64_t sum = 0;
    for (int n = 0; n < (int)p->N; n++)
        for (int tile = 0; tile < mla_tiles(queries(p, n), (int)p->H); tile++)
            sum += tile_blocks(p, n, tile);
    return sum;
}

/* Numbers for the table; what does not fit is launched on its way to device memory. */
struct writer {
    const kl_ctx *ctx;
    mla_table *table;
    int *dst; /* NULL: they stay */
    int held = 0;

    kl_status flush()
    {
        if (dst)
            KL_TRY(kl_upload(ctx, dst, table->number, (size_t)held * sizeof *dst));
        dst = dst ? dst + held : dst;
        held = 0;
        return kl_ok();
    }
    kl_status put(const int *x, int count)
    {
        for (int i = 0; i < count; i++) {
            if (held == MLA_TABLE_INTS)
                KL_TRY(flush());
            table->number[held++] = x[i];
        }
        return kl_ok();
    }
};

} // namespace

void mla_cut_up(const mla_problem *p, int multiprocessors, mla_schedule *s)
{
    int64_t all = all_blocks(p), most = std::min<int64_t>(std::min(multiprocessors, (int)MLA_MOST_PARTS), all);
    int64_t load = most ? (all + most - 1) / most : 0, slack = load / SLACK, room = load;
    s->parts = s->joins = 0;
    int base = p->N ? (int)p->cu_q[0] : 0;
    for (int n = 0; n < (int)p->N; n++)
        for (int tile = 0; tile < mla_tiles(queries(p, n), (int)p->H); tile++) {
            int blocks = tile_blocks(p, n, tile), first = -1;
            for (int block = 0; block < blocks;) {
                if (room == load)
                    s->cut[s->parts++] = {n, tile, block};
                first = first < 0 ? s->parts - 1 : first;
                int64_t take = blocks - block <= room + slack ? blocks - block : room;
                block += (int)take;
                room = take < room ? room - take : load;
            }
            if (first < s->parts - 1) {
                int rows = queries(p, n) * (int)p->H - tile * MLA_TILE_ROWS;
                int row = ((int)p->cu_q[n] - base) * (int)p->H + tile * MLA_TILE_ROWS;
                s->join[s->joins++] = {row, std::min(rows, (int)MLA_TILE_ROWS), first, s->parts - first};
            }
        }
    s->cut[s->parts] = {(int)p->N, 0, 0};
}

size_t mla_table_bytes(const mla_problem *p)
{
    return sizeof(mla_cut) * (MLA_MOST_PARTS + 1) + sizeof(mla_join) * MLA_MOST_PARTS + sizeof(mla_sequence) * (size_t)(p->N + 1);
}

kl_status mla_make_table(const kl_ctx *ctx, const mla_problem *p, const mla_schedule *s, void *memory, mla_table *table)
{
    int64_t ints = 3 * (s->parts + 1) + 4 * s->joins + 3 * (p->N + 1);
    table->N = (int)p->N;
    table->H = (int)p->H;
    table->parts = s->parts;
    table->joins = s->joins;
    table->memory = ints > MLA_TABLE_INTS ? (const int *)memory : nullptr;
    writer w = {ctx, table, (int *)table->memory};
    KL_TRY(w.put((const int *)s->cut, 3 * (s->parts + 1)));
    KL_TRY(w.put((const int *)s->join, 4 * s->joins));
    for (int n = 0; n <= (int)p->N; n++) {
        bool last = n == (int)p->N;
        mla_sequence q = {(int)(p->cu_q[n] - p->cu_q[0]), last ? 0 : (int)p->kv_start[n], last ? 0 : (int)p->kv_len[n]};
        KL_TRY(w.put((const int *)&q, 3));
    }
    return w.flush();
}
