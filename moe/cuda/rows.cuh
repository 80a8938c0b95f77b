/* Rows of weights on their way to a warp, through a ring of its own in shared memory: nobody else is asked, and what is multiplied now
 * says nothing of what comes next. */
#ifndef KL_MOE_CUDA_ROWS_CUH
#define KL_MOE_CUDA_ROWS_CUH

#include "moe/cuda/moe_cuda.cuh"

/* A place of a ring holds a piece of a row, or of two rows half of it each, or up to MOE_TOGETHER whole rows that follow one another. */
enum { MOE_PLACE_BYTES = 9216, MOE_TOGETHER = 4, MOE_MOST_PLACES = 2 };

/* The rows of some slots, `rows` each, `together` an item: item i has rows from i % items together on of slot i / items. Each warp has the items from
 * first + warp apart, by `step`. */
struct moe_rows {
    const uint16_t *a, *b; /* of expert 0; b NULL: one row at a time */
    int64_t stride;        /* elements from expert to expert */
    int columns, rows, together, items;
    const int *id;         /* a slot's expert; NULL: 0 */
    int first, apart, step, end;

    __device__ __forceinline__ int from(int warp) const { return first + warp * apart; }
    __device__ __forceinline__ int wide() const { return MOE_PLACE_BYTES / (b ? 4 : 2); }
    /* Sixteen bytes of a row from that column on that lie in one place. */
    __device__ __forceinline__ int pieces(int column) const { return min(wide(), columns - column) / 8; }
    /* Rows of item number `at` of a slot. */
    __device__ __forceinline__ int count(int at) const { return min(rows - at * together, together); }
};

/* All lanes of the warp have the same copy but for what they hold: lane n the item in place n and its list. */
struct moe_ring {
    unsigned char *place; /* [depth][MOE_PLACE_BYTES] */
    uint64_t *full;       /* [depth] */
    const moe_rows *list;
    int depth, warp, lists; /* lists: those before it may be fetched */
    int fetched, used, slot_in, slot_out, turn; /* pieces; the places of the next; parity */
    int at, item, column; /* what is fetched next */
    int held_item, held_list;

    /* To the next item that there is, if any list has one. */
    __device__ __forceinline__ void settle()
    {
        while (at < lists && item >= list[at].end) {
            at++;
            item = at < lists ? list[at].from(warp) : -1;
        }
    }
    __device__ __forceinline__ void fetch()
    {
        const moe_rows &l = list[at];
        int slot = item / l.items, at = item - slot * l.items, n = 16 * l.pieces(column) * l.count(at);
        int64_t from = (l.id ? l.id[slot] : 0) * l.stride + (int64_t)(at * l.together) * l.columns + column;
        if (kl_lane() == 0) {
            unsigned char *to = place + slot_in * MOE_PLACE_BYTES;
            kl_mbar_expect(&full[slot_in], l.b ? 2 * n : n);
            kl_bulk_load_once(to, l.a + from, n, &full[slot_in]);
            if (l.b)
                kl_bulk_load_once(to + MOE_PLACE_BYTES / 2, l.b + from, n, &full[slot_in]);
        }
        if (kl_lane() == slot_in) {
            held_item = item;
            held_list = this->at;
        }
        slot_in = slot_in + 1 == depth ? 0 : slot_in + 1;
        fetched++;
        column += l.wide();
        if (column >= l.columns) {
            column = 0;
            item += l.step;
            settle();
        }
    }
    __device__ __forceinline__ void fetch_all()
    {
        while (at < lists && fetched - used < depth)
            fetch();
    }
    /* From now on the lists before `limit` may be fetched: as many pieces as there is room for. */
    __device__ __forceinline__ void fill(int limit)
    {
        lists = limit;
        if (item < 0)
            item = list[at].from(warp);
        settle();
        fetch_all();
    }
    /* Does the next piece belong to that list, and to which item? */
    __device__ __forceinline__ bool has(int which) const { return fetched > used && __shfl_sync(0xffffffffu, held_list, slot_out) == which; }
    __device__ __forceinline__ int next_item() const { return __shfl_sync(0xffffffffu, held_item, slot_out); }
    /* The next piece in the order of fetching. */
    __device__ __forceinline__ const unsigned char *wait()
    {
        kl_mbar_wait(&full[slot_out], turn);
        return place + slot_out * MOE_PLACE_BYTES;
    }
    /* It has been read: its place is for another. */
    __device__ __forceinline__ void next()
    {
        __syncwarp();
        used++;
        if (++slot_out == depth) {
            slot_out = 0;
            turn ^= 1;
        }
        fetch_all();
    }
};

__device__ __forceinline__ moe_ring moe_ring_of(unsigned char *rings, uint64_t *full, int depth, const moe_rows *list, int warp)
{
    return {rings + warp * depth * MOE_PLACE_BYTES, full + warp * depth, list, depth, warp, 0, 0, 0, 0, 0, 0, 0, -1, 0, -1, -1};
}

#endif
