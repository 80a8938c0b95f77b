/* Rows of weights on their way to a warp, through a ring of its own in shared memory: nobody else is asked, and what is multiplied now
 * says nothing of what comes next. */
#ifndef KL_MOE_CUDA_ROWS_CUH
#define KL_MOE_CUDA_ROWS_CUH

#include "moe/cuda/moe_cuda.cuh"

/* A place of a ring holds a piece of a row, or of two rows half of it each. */
enum { MOE_PLACE_BYTES = 2304, MOE_LEAST_PLACES = 2, MOE_MOST_PLACES = 4 };

/* The rows of some slots, `rows` each: item i is row i % rows of slot i / rows. Each warp has the items from first + warp apart, by `step`, before
 * `fixed`; the others up to `end` are drawn by whoever comes for them. */
struct moe_rows {
    const uint16_t *a, *b; /* of expert 0; b NULL: one row at a time */
    int64_t stride;        /* elements from expert to expert */
    int columns, rows;
    const int *id;         /* a slot's expert; NULL: 0 */
    int first, apart, step, fixed, end;
    int *drawn;            /* so far; NULL: fixed is end */
    int places;            /* of the ring, that may be used */

    __device__ __forceinline__ int from(int warp) const { return first + warp * apart; }
    __device__ __forceinline__ int wide() const { return MOE_PLACE_BYTES / (b ? 4 : 2); }
    /* Sixteen bytes of a row from that column on that lie in one place. */
    __device__ __forceinline__ int pieces(int column) const { return min(wide(), columns - column) / 8; }
};

/* All lanes of the warp have the same copy but for what they hold: lane n the item in place n and its list, lane 0 the number drawn ahead. */
struct moe_ring {
    unsigned char *place; /* [depth][MOE_PLACE_BYTES] */
    uint64_t *full;       /* [depth] */
    const moe_rows *list;
    int depth, warp, lists; /* lists: those before it may be fetched */
    int fetched, used, slot_in, slot_out, turn; /* pieces; the places of the next; parity */
    int at, item, column; /* what is fetched next */
    int held_item, held_list, ahead;

    __device__ __forceinline__ void draw()
    {
        if (list[at].drawn && kl_lane() == 0)
            ahead = atomicAdd(list[at].drawn, 1);
    }
    __device__ __forceinline__ void enter()
    {
        item = list[at].from(warp);
        draw();
    }
    /* To the next item that there is, if any list has one. */
    __device__ __forceinline__ void settle()
    {
        while (at < lists && item >= list[at].fixed) {
            const moe_rows &l = list[at];
            if (l.drawn) {
                item = l.fixed + __shfl_sync(0xffffffffu, ahead, 0);
                if (item < l.end) {
                    draw();
                    return;
                }
            }
            if (++at < lists)
                enter();
            else
                item = -1;
        }
    }
    __device__ __forceinline__ void fetch()
    {
        const moe_rows &l = list[at];
        int slot = item / l.rows, n = 16 * l.pieces(column);
        int64_t from = (l.id ? l.id[slot] : 0) * l.stride + (int64_t)(item - slot * l.rows) * l.columns + column;
        if (kl_lane() == 0) {
            unsigned char *to = place + slot_in * MOE_PLACE_BYTES;
            kl_mbar_expect(&full[slot_in], l.b ? 2 * n : n);
            kl_bulk_load_once(to, l.a + from, n, &full[slot_in]);
            if (l.b)
                kl_bulk_load_once(to + MOE_PLACE_BYTES / 2, l.b + from, n, &full[slot_in]);
        }
        if (kl_lane() == slot_in) {
            held_item = item;
            held_list = at;
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
        while (at < lists && fetched - used < min(list[at].places, depth))
            fetch();
    }
    /* From now on the lists before `limit` may be fetched: as many pieces as there is room for. */
    __device__ __forceinline__ void fill(int limit)
    {
        lists = limit;
        if (item < 0)
            enter();
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
    return {rings + warp * depth * MOE_PLACE_BYTES, full + warp * depth, list, depth, warp, 0, 0, 0, 0, 0, 0, 0, -1, 0, -1, -1, 0};
}

#endif
