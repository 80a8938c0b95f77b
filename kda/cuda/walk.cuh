/* The walk over the tiles of one head of one sequence: a warp owns 16 columns of V and keeps their state S^T [16, K] in
 * its accumulators from the first tile to the last. Per tile
 *
 *     u = Tb v - w S          S <- Diag(decay) S + kg^T u
 *
 * and nothing else is on the serial chain: a warp beside it makes Tb v ahead of time, and another one o = qg S + Aqk u from
 * the bf16 copies of S and u that the first leaves in shared memory. */
#ifndef KL_KDA_CUDA_WALK_CUH
#define KL_KDA_CUDA_WALK_CUH

#include "kda/cuda/ring.cuh"
#include "kda/cuda/sequences.cuh"

struct kda_walk {
    kda_sequences sequences;
    const uint16_t *v;
    uint16_t *o;
    const float *h0;
    float *ht, *chunk_states;
    const int64_t *state_index;
    int64_t v_stride, o_stride, HV, pool;
    int K, V;
    int channel_stride, column_stride; /* of a state */
    bool v_aligned, o_aligned;         /* rows can be moved 16 bytes at a time */
};

kda_walk kda_walk_of(const kda_problem *p, const void *table);

/* One head of one sequence, as warps see it. */
struct kda_path {
    kda_place place;
    int64_t head, slot;
    int tiles; /* -1: left out */
};

__device__ __forceinline__ kda_path kda_path_of(const kda_walk &p, int64_t pair)
{
    int64_t n = (uint32_t)pair / (uint32_t)p.HV;
    kda_path path;
    path.head = (uint32_t)pair % (uint32_t)p.HV;
    n = p.sequences.row ? p.sequences.row[n].order : n;
    path.place = kda_place_of(p.sequences, n);
    path.slot = p.state_index ? p.state_index[n] : n;
    path.tiles = path.slot >= 0 && path.slot < p.pool ? (int)path.place.tiles : -1;
    return path;
}

/* ---- the state between memory and accumulators: s[j] holds channels 8 j + (2t, 2t+1) of columns g and g + 8 ---- */

template <int KP> __device__ __forceinline__ void kda_load_state(float s[KP / 8][4], const kda_walk &p, const float *h, int column)
{
    int t = kl_lane() & 3, g = kl_lane() >> 2;
#pragma unroll
    for (int j = 0; j < KP / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int c = 8 * j + 2 * t + (i & 1), x = column + g + 8 * (i >> 1);
            s[j][i] = h && c < p.K && x < p.V ? h[c * p.channel_stride + x * p.column_stride] : 0.0f;
        }
}
template <int KP> __device__ __forceinline__ void kda_store_state(const float s[KP / 8][4], const kda_walk &p, float *h, int column)
{
    int t = kl_lane() & 3, g = kl_lane() >> 2;
#pragma unroll
    for (int j = 0; j < KP / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int c = 8 * j + 2 * t + (i & 1), x = column + g + 8 * (i >> 1);
            if (c < p.K && x < p.V)
                h[c * p.channel_stride + x * p.column_stride] = s[j][i];
        }
}

/* ---- v and o: rows of 16 columns in shared memory, two 16-byte halves a row, exchanged in every second group of four rows ---- */

__device__ __forceinline__ unsigned char *kda_row_half(unsigned char *rows, int row, int half)
{
    return rows + 32 * row + 16 * (half ^ (row >> 2 & 1));
}

/* A lane moves one row of each tile: token `lane` of it, 16 columns of one head. */
struct kda_lane_row {
    int64_t at, step, left; /* offset of the row, from tile to tile; tokens from this one to the sequence's end */
    int columns;            /* that exist, of the 16 */
};

__device__ __forceinline__ kda_lane_row kda_lane_row_of(const kda_walk &p, const kda_path &path, int64_t stride, int column)
{
    int lane = kl_lane(), tile = p.sequences.tile;
    kda_lane_row r;
    r.at = (path.place.begin + lane) * stride + path.head * p.V + column;
    r.step = tile * stride;
    r.left = lane < tile && path.tiles > 0 ? path.place.length - lane : 0;
    r.columns = p.V - column;
    return r;
}

/* Starts the copy of the row of v, zeros where there is nothing, and goes on to the next tile. One group of copies. */
__device__ __forceinline__ void kda_fetch_v(unsigned char *rows, const kda_walk &p, kda_lane_row &r)
{
    const uint16_t *from = p.v + r.at;
    if (p.v_aligned) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            bool valid = r.left > 0 && r.columns > 8 * half;
            kl_copy16(kda_row_half(rows, kl_lane(), half), valid ? from + 8 * half : p.v, valid);
        }
    } else {
#pragma unroll 1
        for (int x = 0; x < KDA_COLUMNS; x++)
            ((uint16_t *)kda_row_half(rows, kl_lane(), x / 8))[x % 8] = r.left > 0 && r.columns > x ? from[x] : (uint16_t)0;
    }
    kl_copy_commit();
    r.at += r.step;
    r.left -= p.sequences.tile;
}

__device__ __forceinline__ void kda_put_o(unsigned char *rows, const kda_walk &p, kda_lane_row &r)
{
    uint16_t *to = p.o + r.at;
    if (p.o_aligned) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (r.left > 0 && r.columns > 8 * half)
                *(uint4 *)(to + 8 * half) = *(const uint4 *)kda_row_half(rows, kl_lane(), half);
    } else if (r.left > 0) {
#pragma unroll 1
        for (int x = 0; x < KDA_COLUMNS && x < r.columns; x++)
            to[x] = ((const uint16_t *)kda_row_half(rows, kl_lane(), x / 8))[x % 8];
    }
    r.at += r.step;
    r.left -= p.sequences.tile;
}

/* ---- one tile ---- */

/* r [token / 8] = -Tb v, as accumulators of its transpose, from the tile's v rows. */
template <int KP> __device__ __forceinline__ void kda_negative_input(float r[4][4], const unsigned char *tile, unsigned char *rows)
{
    int lane = kl_lane();
    uint32_t a[2][4], f[3][4];
#pragma unroll
    for (int j = 0; j < 2; j++)
        kl_ldmatrix4_trans(a[j], kda_row_half(rows, 16 * j + 8 * (lane >> 4) + (lane & 7), lane >> 3 & 1));
#pragma unroll
    for (int b = 0; b < 3; b++)
        kda_read_block(f[b], tile + kda_tile<KP>::Tb, b);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[j][i] ^= 0x80008000u;
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            r[n][i] = 0.0f;
    kl_mma(r[0], a[0], f[0]);
    kl_mma(r[1], a[0], f[0] + 2);
    kl_mma(r[2], a[0], f[1]);
    kl_mma(r[3], a[0], f[1] + 2);
    kl_mma(r[2], a[1], f[2]);
    kl_mma(r[3], a[1], f[2] + 2);
}

/* ---- the three warps of 16 columns; first: the number of the path's first tile ---- */

template <class Ring>
__device__ __forceinline__ void kda_walk_input(Ring &m, const kda_walk &p, const kda_path &path, int first, int warp, int column)
{
    auto &own = m.column[warp];
    bool leads = kl_lane() == 0;
    kda_lane_row row = kda_lane_row_of(p, path, p.v_stride, column);
    for (int i = 0; i < KDA_V_TILES; i++)
        kda_fetch_v(own.v[(first + i) % KDA_V_TILES], p, row);
    for (int i = 0; i < path.tiles; i++) {
        int n = first + i, half = n & 1;
        float r[4][4];
        kl_copy_wait<KDA_V_TILES - 1>();
        kl_mbar_wait(&own.handed[half], (n >> 1 & 1) ^ 1);
        kda_ring_await(m, n);
        if (leads && warp == 0)
            kda_ring_rearm(m, n);
        __syncwarp();
        kda_negative_input<Ring::KP>(r, m.slot[n % Ring::SLOTS], own.v[n % KDA_V_TILES]);
#pragma unroll
        for (int b = 0; b < 4; b++)
            own.input[half][b][kl_lane()] = make_float4(r[b][0], r[b][1], r[b][2], r[b][3]);
        kl_mbar_arrive(&own.given[half]);
        __syncwarp();
        kda_fetch_v(own.v[n % KDA_V_TILES], p, row);
    }
}

/* The blocks of w and then of kg that a tile's products read one after another, each fetched STEPS ahead of its use. */
template <int KP> struct kda_blocks {
    static constexpr int EACH = KP / 8, ALL = 2 * EACH, STEPS = KP == 128 ? 7 : 3;
    static_assert(EACH - STEPS > EACH / 2, "the next tile is asked for half-way through kg and waited for before its first block");
    uint32_t f[STEPS + 1][4];

    __device__ __forceinline__ void fetch(const unsigned char *tile, int i)
    {
        kda_read_block(f[i % (STEPS + 1)], tile + (i < EACH ? kda_tile<KP>::w : kda_tile<KP>::kg), i % EACH);
    }
    __device__ __forceinline__ const uint32_t *at(int i) const { return f[i % (STEPS + 1)]; }
};

template <class Ring>
__device__ __forceinline__ void kda_walk_state(Ring &m, const kda_walk &p, const kda_path &path, int first, int warp, int column)
{
    constexpr int KP = Ring::KP, CHANNELS = KP / 16;
    using blocks = kda_blocks<KP>;
    if (path.tiles < 0)
        return;
    auto &own = m.column[warp];
    int lane = kl_lane(), tiles_a_chunk = p.sequences.chunk / p.sequences.tile;
    int64_t size = (int64_t)p.K * p.V, at = (path.slot * p.HV + path.head) * size;
    float s[KP / 8][4];
    blocks b;
    kda_load_state<KP>(s, p, p.h0 ? p.h0 + at : nullptr, column);
    if (path.tiles > 0) {
        kl_mbar_wait(&own.given[first & 1], first >> 1 & 1);
        kl_mbar_wait(&own.read, (first & 1) ^ 1);
#pragma unroll
        for (int i = 0; i < blocks::STEPS; i++)
            b.fetch(m.slot[first % Ring::SLOTS], i);
    }
    for (int i = 0; i < path.tiles; i++) {
        int n = first + i, half = n & 1, next = n + 1;
        bool more = i + 1 < path.tiles, ready = true;
        const unsigned char *tile = m.slot[n % Ring::SLOTS], *next_tile = m.slot[next % Ring::SLOTS];
        const float *decay = (const float *)(tile + kda_tile<KP>::decay) + 2 * (lane & 3);
        if (p.chunk_states && i % tiles_a_chunk == 0)
            kda_store_state<KP>(s, p, p.chunk_states + ((path.place.chunk + i / tiles_a_chunk) * p.HV + path.head) * size, column);

        /* -u^T = S^T w^T - v^T Tb^T, the sums over odd and even channel blocks apart; S <- Diag(decay) S */
        float even[4][4] = {}, odd[4][4];
#pragma unroll
        for (int x = 0; x < 4; x++) {
            float4 v = own.input[half][x][lane];
            odd[x][0] = v.x, odd[x][1] = v.y, odd[x][2] = v.z, odd[x][3] = v.w;
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            uint32_t a[4] = {kl_pack_bf16(s[2 * c][0], s[2 * c][1]), kl_pack_bf16(s[2 * c][2], s[2 * c][3]),
                             kl_pack_bf16(s[2 * c + 1][0], s[2 * c + 1][1]), kl_pack_bf16(s[2 * c + 1][2], s[2 * c + 1][3])};
            float2 d[2] = {*(const float2 *)(decay + 16 * c), *(const float2 *)(decay + 16 * c + 8)};
            float(*r)[4] = c & 1 ? odd : even;
#pragma unroll
            for (int x = 0; x < 2; x++) {
                b.fetch(tile, 2 * c + x + blocks::STEPS);
                kl_mma(r[2 * x], a, b.at(2 * c + x));
                kl_mma(r[2 * x + 1], a, b.at(2 * c + x) + 2);
            }
            own.state[c][lane] = make_uint4(a[0], a[1], a[2], a[3]);
#pragma unroll
            for (int x = 0; x < 2; x++)
#pragma unroll
                for (int y = 0; y < 4; y++)
                    s[2 * c + x][y] *= y & 1 ? d[x].y : d[x].x;
        }
        kl_mbar_arrive(&own.written);
        uint32_t u[2][4];
#pragma unroll
        for (int x = 0; x < 4; x++)
#pragma unroll
            for (int y = 0; y < 2; y++)
                u[x >> 1][2 * (x & 1) + y] =
                    kl_pack_bf16(-even[x][2 * y] - odd[x][2 * y], -even[x][2 * y + 1] - odd[x][2 * y + 1]);

        /* S^T += u^T kg; half-way u is handed over, towards the end the next tile is looked for */
#pragma unroll
        for (int k = 0; k < blocks::EACH; k++) {
            int j = blocks::EACH + k, c = k % CHANNELS;
            if (k == CHANNELS) {
#pragma unroll
                for (int x = 0; x < 2; x++)
                    own.u[half][x][lane] = make_uint4(u[x][0], u[x][1], u[x][2], u[x][3]);
                kl_mbar_arrive(&own.handed[half]);
                if (more)
                    ready = kl_mbar_test(&own.given[next & 1], next >> 1 & 1) & kl_mbar_test(&own.read, n & 1);
            }
            if (j + blocks::STEPS == blocks::ALL && more && !ready) {
                kl_mbar_wait(&own.given[next & 1], next >> 1 & 1);
                kl_mbar_wait(&own.read, n & 1);
            }
            if (j + blocks::STEPS < blocks::ALL)
                b.fetch(tile, j + blocks::STEPS);
            else if (more)
                b.fetch(next_tile, j + blocks::STEPS - blocks::ALL);
            kl_mma(s[2 * c], u[k / CHANNELS], b.at(j));
            kl_mma(s[2 * c + 1], u[k / CHANNELS], b.at(j) + 2);
        }
        kda_ring_release(m, n);
    }
    if (p.ht)
        kda_store_state<KP>(s, p, p.ht + at, column);
}

/* o^T = S^T qg^T + u^T Aqk^T */
template <class Ring>
__device__ __forceinline__ void kda_walk_output(Ring &m, const kda_walk &p, const kda_path &path, int first, int warp, int column)
{
    constexpr int KP = Ring::KP;
    auto &own = m.column[warp];
    int lane = kl_lane();
    kda_lane_row row = kda_lane_row_of(p, path, p.o_stride, column);
    for (int i = 0; i < path.tiles; i++) {
        int n = first + i, half = n & 1;
        const unsigned char *tile = m.slot[n % Ring::SLOTS];
        float o[4][4] = {};
        uint4 s[KP / 16], u[2];
        kl_mbar_wait(&own.written, n & 1);
#pragma unroll
        for (int c = 0; c < KP / 16; c++)
            s[c] = own.state[c][lane];
        kl_mbar_arrive(&own.read);
#pragma unroll
        for (int c = 0; c < KP / 16; c++) {
            uint32_t a[4] = {s[c].x, s[c].y, s[c].z, s[c].w}, f[2][4];
            kda_read_block(f[0], tile + kda_tile<KP>::qg, 2 * c);
            kda_read_block(f[1], tile + kda_tile<KP>::qg, 2 * c + 1);
#pragma unroll
            for (int b = 0; b < 4; b++)
                kl_mma(o[b], a, f[b >> 1] + 2 * (b & 1));
        }
        uint32_t f[3][4];
#pragma unroll
        for (int b = 0; b < 3; b++)
            kda_read_block(f[b], tile + kda_tile<KP>::Aqk, b);
        kl_mbar_wait(&own.handed[half], n >> 1 & 1);
#pragma unroll
        for (int b = 0; b < 2; b++)
            u[b] = own.u[half][b][lane];
        kl_mbar_arrive(&own.given[half]);
        kda_ring_release(m, n);
        uint32_t a[2][4] = {{u[0].x, u[0].y, u[0].z, u[0].w}, {u[1].x, u[1].y, u[1].z, u[1].w}};
        kl_mma(o[0], a[0], f[0]);
        kl_mma(o[1], a[0], f[0] + 2);
        kl_mma(o[2], a[0], f[1]);
        kl_mma(o[3], a[0], f[1] + 2);
        kl_mma(o[2], a[1], f[2]);
        kl_mma(o[3], a[1], f[2] + 2);
        /* matrices of 8 tokens x 8 columns: lane 8 q + row gives the row of token 8 (2 b + (q >> 1)) + row, half q & 1 */
#pragma unroll
        for (int b = 0; b < 2; b++) {
            uint32_t x[4] = {kl_pack_bf16(o[2 * b][0], o[2 * b][1]), kl_pack_bf16(o[2 * b][2], o[2 * b][3]),
                             kl_pack_bf16(o[2 * b + 1][0], o[2 * b + 1][1]), kl_pack_bf16(o[2 * b + 1][2], o[2 * b + 1][3])};
            kl_stmatrix4_trans(kda_row_half(own.o, 16 * b + 8 * (lane >> 4) + (lane & 7), lane >> 3 & 1), x);
        }
        __syncwarp();
        kda_put_o(own.o, p, row);
        __syncwarp();
    }
}

#endif
