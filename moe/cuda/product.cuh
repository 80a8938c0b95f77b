/* Grouped products by warpgroups: rows of x, sorted by expert, times that expert's weights,
 *
 *     y[r,:] = w_e x[r,:]   or   w_e^T x[r,:]   or, of two weights whose rows lie eight by eight beside each other,   silu(w1_e x[r,:]) (.) w3_e x[r,:]
 *
 * Weights are the matrix unit's first operand, 256 rows a block, so that a tile has as many tokens as there are, in eights.
 * One warpgroup fetches: weights by tensor copies, rows of x one by one through their index; two multiply, 128 rows of weights each,
 * and are apart by as much as the ring of stages allows, so that one stores while the other multiplies. Blocks of a cluster
 * take neighbouring tiles of one expert, and each fetches its share of the weights for all.
 *
 * A stage's `full` counts the fetching threads' copies and the weights' bytes, `empty` the multiplying warps of the whole cluster. The
 * copies arrive by themselves; who multiplies puts the fence between them and the matrix unit, since a thread that fetches
 * would wait in it for all copies that it has under way. */
#ifndef KL_MOE_CUDA_PRODUCT_CUH
#define KL_MOE_CUDA_PRODUCT_CUH

#include "moe/cuda/chunk.cuh"

enum { MOE_K = 64, MOE_HALF_BYTES = 128 * 2 * MOE_K, MOE_PRODUCT_THREADS = 384 };

/* CLUSTER blocks share weights; MOST tokens a tile at most. */
template <int CLUSTER_, int MOST_, int STAGES_, moe_kind KIND_> struct moe_form {
    static constexpr int CLUSTER = CLUSTER_, MOST = MOST_, STAGES = STAGES_;
    static constexpr moe_kind KIND = KIND_;
    static constexpr int COLUMNS = KIND == MOE_SWIGLU ? 64 : 128; /* of y, that 128 rows of weights make */
    struct shared {
        unsigned char w[STAGES][2][MOE_HALF_BYTES], x[STAGES][MOST * 2 * MOE_K];
        unsigned char y[2][(MOST + 31) / 32 * 32 * 128];
        uint64_t full[STAGES], empty[STAGES];
    };
};

/* What one block does at a time: rows first .. first+n-1, the 256 rows of weights of `column`. */
struct moe_item {
    int expert, column, first, n;
};

__device__ __forceinline__ int moe_items(const moe_product &p, int cluster)
{
    return p.across * (p.group ? *p.groups : (p.rows + cluster * p.tile - 1) / (cluster * p.tile));
}

template <int CLUSTER> __device__ __forceinline__ moe_item moe_item_of(const moe_product &p, int i, int rank)
{
    int at = i / p.across, own = CLUSTER * p.tile;
    moe_group g = p.group ? p.group[at] : moe_group{0, at * own, p.rows - at * own < own ? p.rows - at * own : own, p.tile};
    int n = g.rows - rank * g.tile;
    return {g.expert, i % p.across, g.row + rank * g.tile, n < 0 ? 0 : n > g.tile ? g.tile : n};
}

/* Piece of 16 bytes of a row of 128, as swizzled copies leave them. */
__device__ __forceinline__ unsigned char *moe_piece(unsigned char *rows, int row, int piece) { return rows + row * 128 + ((piece ^ (row & 7)) << 4); }

/* ---- fetching ---- */

template <class F> __device__ __forceinline__ void moe_fetch_weights(typename F::shared &m, const moe_product &p, const moe_item &it, int slot, int k, int rank, int more)
{
    kl_mbar_expect(&m.full[slot], 2 * MOE_HALF_BYTES + more);
    for (int half = 0; half < 2; half++) {
        if (F::CLUSTER > 1 && half != rank)
            continue;
        for (int panel = 0; panel < (F::KIND == MOE_TRANSPOSED ? 2 : 1); panel++) {
            unsigned char *to = m.w[slot][half] + panel * (MOE_HALF_BYTES / 2);
            int at = 2 * it.column + half, x = F::KIND == MOE_TRANSPOSED ? 128 * at + 64 * panel : k, eight = F::KIND == MOE_TRANSPOSED ? k / MOE_K * p.eights : at * p.eights;
            if (F::CLUSTER > 1)
                kl_tensor_load_multicast(to, &p.weight, x, 0, 0, eight, it.expert, &m.full[slot], 3);
            else
                kl_tensor_load(to, &p.weight, x, 0, 0, eight, it.expert, &m.full[slot]);
        }
    }
}

/* The 64 rows of weights of `half`, from the kth 16 columns on that are summed over. */
template <class F> __device__ __forceinline__ auto moe_weights_at(unsigned char *rows, int half, int k)
{
    if constexpr (F::KIND == MOE_TRANSPOSED)
        return kl_operand_at(kl_operand_columns(rows, MOE_HALF_BYTES / 2), half * (MOE_HALF_BYTES / 2) + k * 16 * 128);
    else
        return kl_operand_at(kl_operand_rows(rows), half * (MOE_HALF_BYTES / 2) + 32 * k);
}

/* Rows of x through their index, piece by piece, eight threads a row. */
template <class F> __device__ __forceinline__ void moe_fetch_pieces(typename F::shared &m, const moe_product &p, int rank, int thread)
{
    enum { STAGES = F::STAGES, EACH = (F::MOST + 15) / 16 };
    int items = moe_items(p, F::CLUSTER), row = thread / 8, piece = thread % 8, use = 0;
    uint32_t pitch = (uint32_t)p.K / 8;
    for (int i = (int)blockIdx.x / F::CLUSTER; i < items; i += (int)gridDim.x / F::CLUSTER) {
        moe_item it = moe_item_of<F::CLUSTER>(p, i, rank);
        uint32_t from[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int r = it.first + 16 * j + row;
            from[j] = 16 * j + row < it.n ? (uint32_t)p.token[r] * pitch : 0;
        }
        for (int k = 0; k < p.K; k += MOE_K, use++) {
            int slot = use % STAGES;
            uint32_t column = (uint32_t)k / 8 + piece;
            if (use >= STAGES)
                kl_mbar_wait(&m.empty[slot], (use / STAGES - 1) & 1);
            if (thread == 0)
                moe_fetch_weights<F>(m, p, it, slot, k, rank, 0);
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (16 * j + row < it.n)
                    kl_copy16(moe_piece(m.x[slot], 16 * j + row, piece), p.x + ((size_t)(column < pitch ? from[j] + column : from[j]) << 3), column < pitch);
            kl_copy_arrive(&m.full[slot]);
        }
    }
}

/* Rows of x that follow one another by tensor copies, a thread eight of them. */
template <class F> __device__ __forceinline__ void moe_fetch_boxes(typename F::shared &m, const moe_product &p, int rank, int thread)
{
    enum { STAGES = F::STAGES };
    static_assert(F::MOST <= 8 * 128, "a box a thread");
    int items = moe_items(p, F::CLUSTER), use = 0;
    for (int i = (int)blockIdx.x / F::CLUSTER; i < items; i += (int)gridDim.x / F::CLUSTER) {
        moe_item it = moe_item_of<F::CLUSTER>(p, i, rank);
        int boxes = (it.n + MOE_BOX - 1) / MOE_BOX;
        for (int k = 0; k < p.K; k += MOE_K, use++) {
            int slot = use % STAGES;
            if (use >= STAGES)
                kl_mbar_wait(&m.empty[slot], (use / STAGES - 1) & 1);
            if (thread == 0)
                moe_fetch_weights<F>(m, p, it, slot, k, rank, boxes * MOE_BOX * 128);
            if (thread < boxes)
                kl_tensor_load(m.x[slot] + thread * MOE_BOX * 128, &p.x_map, k, it.first + thread * MOE_BOX, &m.full[slot]);
        }
    }
}

/* ---- multiplying ---- */

__device__ __forceinline__ float moe_silu(float a) { return a * kl_rcp(1.0f + kl_exp2(-1.44269504f * a)); }

/* Rows of 64 numbers of y, from registers through shared memory: value(q) is a matrix of 8 columns of y x 8 tokens, and goes to
 * piece `piece` of tokens 8 q .. 8 q + 7. */
template <int count, class Value> __device__ __forceinline__ void moe_lay_down(unsigned char *rows, int piece, Value value)
{
#pragma unroll
    for (int q = 0; q < count; q += 4) {
        uint32_t r[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            r[j] = q + j < count ? value(q + j) : 0u;
        kl_stmatrix4_trans(moe_piece(rows, 8 * q + kl_lane(), piece), r);
    }
}

__device__ __forceinline__ void moe_put_rows(unsigned char *rows, const moe_product &p, const moe_item &it, int column, int thread)
{
    int piece = thread % 8;
    if (column + 8 * piece >= p.width)
        return;
    for (int r = thread / 8; r < it.n; r += 16)
        *(uint4 *)(p.y + (size_t)(it.first + r) * p.width + column + 8 * piece) = *(const uint4 *)moe_piece(rows, r, piece);
}

template <class F, int N> __device__ __forceinline__ void moe_store(typename F::shared &m, const moe_product &p, const moe_item &it, float (&c)[2][N / 2], int own, int thread)
{
    unsigned char *rows = m.y[own];
    int warp = thread / 32, column = (2 * it.column + own) * F::COLUMNS;
    if constexpr (F::KIND == MOE_SWIGLU) {
        kl_barrier(1 + own, 128);
#pragma unroll
        for (int half = 0; half < 2; half++)
            moe_lay_down<N / 8>(rows, 4 * half + warp, [&](int q) {
                const float *s = &c[half][4 * q];
                float a0 = p.up_first ? s[2] : s[0], a1 = p.up_first ? s[3] : s[1], b0 = p.up_first ? s[0] : s[2], b1 = p.up_first ? s[1] : s[3];
                return kl_pack_bf16(moe_silu(a0) * b0, moe_silu(a1) * b1);
            });
        kl_barrier(1 + own, 128);
        moe_put_rows(rows, p, it, column, thread);
    } else {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            kl_barrier(1 + own, 128);
#pragma unroll
            for (int eight = 0; eight < 2; eight++)
                moe_lay_down<N / 8>(rows, 2 * warp + eight, [&](int q) { return kl_pack_bf16(c[half][4 * q + 2 * eight], c[half][4 * q + 2 * eight + 1]); });
            kl_barrier(1 + own, 128);
            moe_put_rows(rows, p, it, column + 64 * half, thread);
        }
    }
}

/* All of K for N tokens. */
template <class F, int N> __device__ __forceinline__ void moe_multiply(typename F::shared &m, const moe_product &p, const moe_item &it, int &use, int own, int thread)
{
    float c[2][N / 2] = {};
    int blocks = (p.K + MOE_K - 1) / MOE_K;
    auto release = [&](int n) {
        if (kl_lane() < F::CLUSTER) {
            if (F::CLUSTER > 1)
                kl_mbar_arrive_at(&m.empty[n % F::STAGES], kl_lane());
            else
                kl_mbar_arrive(&m.empty[n % F::STAGES]);
        }
    };
    for (int i = 0; i < blocks; i++, use++) {
        int slot = use % F::STAGES;
        kl_mbar_wait(&m.full[slot], use / F::STAGES & 1);
        kl_fence_async_shared();
        kl_operand x = kl_operand_rows(m.x[slot]);
        kl_wgmma_fence();
#pragma unroll
        for (int k = 0; k < MOE_K / 16; k++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                kl_wgmma<N>(c[half], moe_weights_at<F>(m.w[slot][own], half, k), kl_operand_at(x, 32 * k), true);
        kl_wgmma_commit();
        kl_wgmma_wait<1>();
        if (i > 0)
            release(use - 1);
    }
    kl_wgmma_wait<0>();
    release(use - 1);
    moe_store<F, N>(m, p, it, c, own, thread);
}

/* Tiles of other sizes than these are computed as the next larger. */
#define MOE_CASE(N)                                                \
    if (N <= F::MOST && n <= N)                                    \
        return moe_multiply<F, N <= F::MOST ? N : 8>(m, p, it, use, own, thread)
template <class F> __device__ __forceinline__ void moe_multiply_any(typename F::shared &m, const moe_product &p, const moe_item &it, int &use, int own, int thread)
{
    int n = __shfl_sync(0xffffffffu, it.n, 0);
    if (F::MOST <= 64) {
        MOE_CASE(8);
        MOE_CASE(16);
        MOE_CASE(24);
        MOE_CASE(32);
        MOE_CASE(48);
        MOE_CASE(64);
    } else {
        MOE_CASE(32);
        MOE_CASE(64);
        MOE_CASE(72);
        MOE_CASE(80);
        MOE_CASE(88);
        MOE_CASE(96);
        MOE_CASE(104);
        MOE_CASE(112);
        MOE_CASE(120);
        MOE_CASE(128);
    }
}
#undef MOE_CASE

template <class F> __global__ void __launch_bounds__(MOE_PRODUCT_THREADS, 1) moe_products(const __grid_constant__ moe_product p)
{
    KL_SHARED(memory);
    typename F::shared &m = *(typename F::shared *)memory;
    int role = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0), thread = (int)threadIdx.x % 128, rank = F::CLUSTER > 1 ? kl_cluster_rank() : 0;
    if (threadIdx.x == 0) {
        kl_tensor_prefetch(&p.weight);
        for (int i = 0; i < F::STAGES; i++) {
            kl_mbar_init(&m.full[i], p.token ? 128 + 1 : 1);
            kl_mbar_init(&m.empty[i], 8 * F::CLUSTER);
        }
        kl_mbar_init_fence();
    }
    if (F::CLUSTER > 1)
        kl_cluster_sync();
    else
        __syncthreads();
    kl_grid_wait();
    kl_grid_release();
    if (role == 0) {
        kl_registers_fewer<40>();
        if (p.token)
            moe_fetch_pieces<F>(m, p, rank, thread);
        else
            moe_fetch_boxes<F>(m, p, rank, thread);
    } else {
        kl_registers_more<232>();
        int items = moe_items(p, F::CLUSTER), use = 0;
        for (int i = (int)blockIdx.x / F::CLUSTER; i < items; i += (int)gridDim.x / F::CLUSTER)
            moe_multiply_any<F>(m, p, moe_item_of<F::CLUSTER>(p, i, rank), use, role - 1, thread);
    }
    if (F::CLUSTER > 1)
        kl_cluster_sync();
}

#endif
