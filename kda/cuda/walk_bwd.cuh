/* The two walks of the backward pass: the states S forwards, their gradients dS backwards. Neither needs the other, so one grid
 * holds both. A warp owns 16 columns of V and keeps S^T (dS^T) [16 x KP] in accumulators for the whole sequence; as a packed
 * operand the same registers go to the matrix unit and to memory. With ^T throughout:
 *
 *     forwards    r = T' v - w' S            S  <- Diag(P) S  + kg^T (beta r)                   keeps S before the tile, and r
 *     backwards   du = Aqk^T do + kg dS      dS <- Diag(P) dS + qg^T do - w'^T (beta du)        keeps dS after the tile, and du
 *
 * One more warp fetches the prepared tiles into a ring; the rows of v and do each warp fetches for itself. */
#ifndef KL_KDA_CUDA_WALK_BWD_CUH
#define KL_KDA_CUDA_WALK_BWD_CUH

#include "kda/cuda/tile_bwd.cuh"

enum { KDA_WALK_PANELS = 4 }; /* of v or do, a warp */

template <int KP> struct kda_walk_bwd_room {
    static constexpr int stages = KP > 128 ? 2 : 3, stage = kda_bwd_tile<KP>::T - kda_bwd_tile<KP>::w, state = 16 * KP * 2,
                         kept = state + KDA_PANEL_BYTES, own = 2 * kept + KDA_WALK_PANELS * KDA_PANEL_BYTES, /* a warp's: state and panel out, twice; panels in */
                         bars = stages * stage, first = bars + 128;
    static constexpr int bytes(int workers) { return first + workers * own; }
};

namespace {

struct walk_place {
    kda_place sequence;
    int64_t n;
    int hv, mine;  /* value head; counted in the slice */
    int panel;     /* 16 columns of V: which */
};

/* Element e of accumulator block nb: column V and channel. */
__device__ __forceinline__ int walk_v(const walk_place &w, int e) { return 16 * w.panel + kl_lane() / 4 + 8 * (e >> 1); }
__device__ __forceinline__ int walk_channel(int nb, int e) { return 8 * nb + 2 * (kl_lane() & 3) + (e & 1); }

template <int KP> __device__ void walk_load_state(const kda_bwd_args &a, const walk_place &w, const float *states, int64_t slot, float S[KP / 8][4])
{
    const float *h = states + (slot * a.HV + w.hv) * a.K * a.V;
    int to_v = a.value_first ? a.K : 1, to_channel = a.value_first ? 1 : a.V;
#pragma unroll
    for (int nb = 0; nb < KP / 8; nb++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int v = walk_v(w, e), c = walk_channel(nb, e);
            S[nb][e] = states && v < a.V && c < a.K ? h[v * to_v + c * to_channel] : 0.0f;
        }
}

template <int KP> __device__ void walk_store_state(const kda_bwd_args &a, const walk_place &w, float *states, const float S[KP / 8][4])
{
    float *h = states + (w.n * a.HV + w.hv) * a.K * a.V;
    int to_v = a.value_first ? a.K : 1, to_channel = a.value_first ? 1 : a.V;
#pragma unroll
    for (int nb = 0; nb < KP / 8; nb++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int v = walk_v(w, e), c = walk_channel(nb, e);
            if (v < a.V && c < a.K)
                h[v * to_v + c * to_channel] = S[nb][e];
        }
}

/* What rounding a pair to bf16 leaves over, rounded. */
__device__ __forceinline__ uint32_t walk_rest(float low, float high)
{
    uint32_t pair = kl_pack_bf16(low, high);
    return kl_pack_bf16(low - kl_bf16_low(pair), high - kl_bf16_high(pair));
}

/* In a sequence of so few tiles no sum over tokens evens the rounding of S out: there it is read twice as precisely. */
enum { FEW_TILES = 4 };

/* Four of a product's operands are under way while one is used. */
enum { AHEAD = 3 };

/* R += (S^T - its operand copy) X^T: what rounding S^T leaves over. */
template <int KP> __device__ void walk_read_rest(const float S[KP / 8][4], const unsigned char *X, float R[4][4])
{
    int lane = kl_lane();
#pragma unroll
    for (int c = 0; c < KP / 16; c++) {
        uint32_t s[4];
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[e] = walk_rest(S[2 * c + (e >> 1)][2 * (e & 1)], S[2 * c + (e >> 1)][2 * (e & 1) + 1]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t b[4];
            kl_ldmatrix4(b, X + kda_wide_at(KP, 16 * i + kda_across_row(lane), 2 * c + kda_across_piece(lane)));
            kl_mma(R[2 * i], s, b);
            kl_mma(R[2 * i + 1], s, b + 2);
        }
    }
}

/* R[0] + R[1] += S^T X^T [16 x 32], X = w' or kg, and S^T <- S^T Diag(P); the operand copy of S^T goes to `kept` first. */
template <int KP>
__device__ __forceinline__ void walk_read(float S[KP / 8][4], const unsigned char *X, const float *decay, unsigned char *kept, float R[2][4][4])
{
    constexpr int part = KP < 128 ? KP / 16 : KP < 256 ? 8 : 4, second = KP < 256; /* operands held at once; two chains of products where registers allow */
    int lane = kl_lane();
#pragma unroll
    for (int first = 0; first < KP / 16; first += part) {
        uint32_t s[part][4], b[AHEAD + 1][4];
        auto load = [&](int n) {
            kl_ldmatrix4(b[n % (AHEAD + 1)], X + kda_wide_at(KP, 16 * (n & 1) + kda_across_row(lane), 2 * (first + n / 2) + kda_across_piece(lane)));
        };
#pragma unroll
        for (int c = 0; c < part; c++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[c][e] = kl_pack_bf16(S[2 * (first + c) + (e >> 1)][2 * (e & 1)], S[2 * (first + c) + (e >> 1)][2 * (e & 1) + 1]);
            kl_stmatrix4(kept + kda_wide_at(KP, kda_down_row(lane), 2 * (first + c) + kda_down_piece(lane)), s[c]);
        }
#pragma unroll
        for (int n = 0; n < AHEAD; n++)
            load(n);
#pragma unroll
        for (int n = 0; n < 2 * part; n++) {
            if (n + AHEAD < 2 * part)
                load(n + AHEAD);
            kl_mma(R[n / 2 & second][2 * (n & 1)], s[n / 2], b[n % (AHEAD + 1)]);
            kl_mma(R[n / 2 & second][2 * (n & 1) + 1], s[n / 2], b[n % (AHEAD + 1)] + 2);
            int nb = 2 * first + n;
            float2 d = *(const float2 *)(decay + 8 * nb + 2 * (lane & 3));
            S[nb][0] *= d.x;
            S[nb][1] *= d.y;
            S[nb][2] *= d.x;
            S[nb][3] *= d.y;
        }
    }
}

/* S^T += x X [16 x KP], x [16 x 32] as two operands, X [32 x KP] an image. */
template <int KP> __device__ __forceinline__ void walk_write(float S[KP / 8][4], const uint32_t x[2][4], const unsigned char *X)
{
    constexpr int blocks = KP / 16;
    int lane = kl_lane();
    uint32_t b[AHEAD + 1][4];
    auto load = [&](int n) {
        kl_ldmatrix4_trans(b[n % (AHEAD + 1)], X + kda_wide_at(KP, 16 * (n / blocks) + kda_down_row(lane), 2 * (n % blocks) + kda_down_piece(lane)));
    };
#pragma unroll
    for (int n = 0; n < AHEAD; n++)
        load(n);
#pragma unroll
    for (int n = 0; n < 2 * blocks; n++) {
        if (n + AHEAD < 2 * blocks)
            load(n + AHEAD);
        kl_mma(S[2 * (n % blocks)], x[n / blocks], b[n % (AHEAD + 1)]);
        kl_mma(S[2 * (n % blocks) + 1], x[n / blocks], b[n % (AHEAD + 1)] + 2);
    }
}

/* Z += v^T T'^T forwards, do^T Aqk backwards: [16 x 32], x the operands of v^T or do^T. */
template <bool forward> __device__ __forceinline__ void walk_small(const uint32_t x[2][4], const unsigned char *X, float Z[4][4])
{
    int lane = kl_lane();
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j <= i; j++) {
            uint32_t b[4];
            if (forward)
                kl_ldmatrix4(b, X + kda_small_at(16 * i + kda_across_row(lane), 2 * j + kda_across_piece(lane)));
            else
                kl_ldmatrix4_trans(b, X + kda_small_at(16 * i + kda_down_row(lane), 2 * j + kda_down_piece(lane)));
            int from = forward ? j : i, to = forward ? i : j;
            kl_mma(Z[2 * to], x[from], b);
            kl_mma(Z[2 * to + 1], x[from], b + 2);
        }
}

template <int KP, bool forward>
__device__ void walk_columns(const kda_bwd_args &a, const walk_place &w, unsigned char *shared, unsigned char *own)
{
    using room = kda_walk_bwd_room<KP>;
    using tile = kda_bwd_tile<KP>;
    int lane = kl_lane();
    uint64_t *full = (uint64_t *)(shared + room::bars), *empty = full + room::stages;
    unsigned char *in = own + 2 * room::kept;
    int tiles = (int)w.sequence.tiles;
    int64_t head = (int64_t)w.hv * a.V;
    const uint16_t *rows = forward ? a.v + head : a.d_o ? a.d_o + head : nullptr;
    int stride = forward ? a.v_stride : a.o_stride;

    auto number = [&](int i) { return forward ? i : tiles - 1 - i; };
    auto fetch = [&](int i) {
        if (i < tiles) {
            int64_t first = (int64_t)number(i) * KDA_BWD_TOKENS, left = w.sequence.length - first;
            kda_panel_copy(in + i % KDA_WALK_PANELS * KDA_PANEL_BYTES, rows ? rows + (w.sequence.begin + first) * stride : nullptr, stride,
                           left < KDA_BWD_TOKENS ? (int)left : (int)KDA_BWD_TOKENS, a.V, w.panel, forward ? a.v_wide : a.o_wide);
        }
        kl_copy_commit();
    };
    for (int i = 0; i < KDA_WALK_PANELS - 1; i++)
        fetch(i);

    float S[KP / 8][4];
    int64_t state = forward && a.state_index ? a.state_index[w.n] : w.n;
    const float *states = forward ? a.h0 : a.dht;
    if (forward && (state < 0 || state >= a.state_pool))
        states = nullptr;
    walk_load_state<KP>(a, w, states, state, S);

    for (int i = 0, s = 0, phase = 0; i < tiles; i++) {
        const unsigned char *stage = shared + s * room::stage - (forward ? tile::Tr : tile::w);
        unsigned char *kept = own + (i & 1) * room::kept, *out = kept + room::state;
        kl_copy_wait<KDA_WALK_PANELS - 2>();
        if (lane == 0)
            kl_bulk_wait_read<1>();
        __syncwarp();
        const unsigned char *panel = in + i % KDA_WALK_PANELS * KDA_PANEL_BYTES;
        uint32_t x[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_ldmatrix4_trans(x[j], panel + kda_panel_at(16 * j + kda_across_row(lane), kda_across_piece(lane)));
        kl_mbar_wait(&full[s], phase);

        /* the small product, from operands that have nothing to wait for, then the one with the state: r = Z - R, du = Z + R */
        float Z[4][4] = {}, R[2][4][4] = {};
        const float *beta = (const float *)(stage + tile::rows);
        walk_small<forward>(x, stage + (forward ? tile::Tr : tile::Aqk), Z);
        if (tiles <= FEW_TILES)
            walk_read_rest<KP>(S, stage + (forward ? tile::w : tile::kg), R[0]);
        walk_read<KP>(S, stage + (forward ? tile::w : tile::kg), (const float *)(stage + tile::decay), kept, R);
        if (!forward)
            walk_write<KP>(S, x, stage + tile::qg);
        uint32_t r[2][4], u[2][4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 b = *(const float2 *)(beta + 8 * n + 2 * (lane & 3));
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                float r0 = R[0][n][e] + R[1][n][e], r1 = R[0][n][e + 1] + R[1][n][e + 1];
                r0 = forward ? Z[n][e] - r0 : Z[n][e] + r0;
                r1 = forward ? Z[n][e + 1] - r1 : Z[n][e + 1] + r1;
                r[n >> 1][2 * (n & 1) + e / 2] = kl_pack_bf16(r0, r1);
                u[n >> 1][2 * (n & 1) + e / 2] = forward ? kl_pack_bf16(b.x * r0, b.y * r1) : kl_pack_bf16(-b.x * r0, -b.y * r1);
            }
        }
        walk_write<KP>(S, u, stage + (forward ? tile::kg : tile::w));

        /* beside those products: what is kept goes to memory, the stage back to the feeder, the next rows are asked for */
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_stmatrix4_trans(out + kda_panel_at(16 * j + kda_across_row(lane), kda_across_piece(lane)), r[j]);
        kl_fence_async_shared();
        kl_mbar_arrive(&empty[s]);
        __syncwarp();
        if (lane == 0) {
            int64_t slot = kda_bwd_slot(a, w.sequence.tile + number(i), w.mine);
            kl_bulk_store(kda_bwd_state(a, KP, slot, !forward) + w.panel * room::state, kept, room::state);
            kl_bulk_store(kda_bwd_panel(a, slot, !forward) + w.panel * KDA_PANEL_BYTES, out, KDA_PANEL_BYTES);
            kl_bulk_commit();
        }
        fetch(i + KDA_WALK_PANELS - 1);
        if (++s == room::stages) {
            s = 0;
            phase ^= 1;
        }
    }
    if (!forward && a.dh0)
        walk_store_state<KP>(a, w, a.dh0, S);
    kl_copy_wait<0>();
    if (lane == 0)
        kl_bulk_wait<0>();
}

template <int KP, bool forward> __device__ void walk_feed(const kda_bwd_args &a, const walk_place &w, unsigned char *shared)
{
    using room = kda_walk_bwd_room<KP>;
    using tile = kda_bwd_tile<KP>;
    constexpr int from = forward ? tile::Tr : tile::w, bytes = (forward ? tile::qg : tile::T) - from;
    uint64_t *full = (uint64_t *)(shared + room::bars), *empty = full + room::stages;
    int tiles = (int)w.sequence.tiles;
    for (int i = 0, s = 0, phase = 1; i < tiles; i++) {
        kl_mbar_wait(&empty[s], phase);
        kl_mbar_expect(&full[s], bytes);
        int64_t number = w.sequence.tile + (forward ? i : tiles - 1 - i);
        kl_bulk_load(shared + s * room::stage, a.tile + kda_bwd_slot(a, number, w.mine) * tile::bytes + from, bytes, &full[s]);
        kl_bulk_issued(&full[s]);
        if (++s == room::stages) {
            s = 0;
            phase ^= 1;
        }
    }
}

/* Blocks: sequence, value head, run of columns, direction. */
template <int KP> __global__ void __launch_bounds__(160) walk_bwd(const __grid_constant__ kda_bwd_args a)
{
    KL_SHARED(shared);
    using room = kda_walk_bwd_room<KP>;
    int most = (int)blockDim.x / 32 - 1, warp = (int)threadIdx.x / 32, panels = a.VP / 16;
    unsigned at = blockIdx.x, runs = (unsigned)((panels + most - 1) / most), heads = (unsigned)(a.heads * a.group);
    bool forward = at & 1;
    at >>= 1;
    int first = (int)(at % runs) * most, workers = panels - first < most ? panels - first : most;
    at /= runs;
    walk_place w;
    w.mine = (int)(at % heads);
    w.hv = a.first * a.group + w.mine;
    w.n = at / heads;
    if (a.sequences.row)
        w.n = a.sequences.row[w.n].order;
    w.sequence = kda_place_of(a.sequences, w.n);
    w.panel = first + warp;
    uint64_t *full = (uint64_t *)(shared + room::bars), *empty = full + room::stages;
    if (threadIdx.x == 0) {
        for (int s = 0; s < room::stages; s++) {
            kl_mbar_init(&full[s], 1);
            kl_mbar_init(&empty[s], 32 * workers);
        }
        kl_mbar_init_fence();
    }
    __syncthreads();
    unsigned char *own = shared + room::first + warp * room::own;
    if (warp < workers) {
        if (forward)
            walk_columns<KP, true>(a, w, shared, own);
        else
            walk_columns<KP, false>(a, w, shared, own);
    } else if (warp == most && kl_lane() == 0) {
        if (forward)
            walk_feed<KP, true>(a, w, shared);
        else
            walk_feed<KP, false>(a, w, shared);
    }
}

} // namespace

#endif
