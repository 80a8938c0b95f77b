/* Summaries of parts: a part takes the state S before it to M S + B. B is the walk from zero state; the columns of M are the walk
 * without v from the columns of the identity. So this is the walk of walk_wide.cuh for the state alone,
 *
 *     u^T = v^T Tb^T - S^T w^T      S^T <- S^T Diag(decay) + u^T kg
 *
 * by two warpgroups that share the tiles, each with 64 columns of [V | K]: what one waits for, the other's work hides. */
#ifndef KL_KDA_CUDA_SUMMARY_CUH
#define KL_KDA_CUDA_SUMMARY_CUH

#include "kda/cuda/walk_wide.cuh"

enum { KDA_SUMMARY_COLUMNS = 2 * KDA_WIDE_COLUMNS, KDA_SUMMARY_THREADS = 2 * 128 + 2 * 32 };

/* Shared memory: tile n, with v of both halves, lies in slot n % SLOTS. */
template <int KP_, int SLOTS_> struct kda_summary_ring {
    static constexpr int KP = KP_, SLOTS = SLOTS_, TILE = kda_core_tile<KP>::bytes;
    struct {
        alignas(128) unsigned char v[2][KDA_WIDE_ROWS], tile[TILE];
    } slot[SLOTS];
    uint64_t full[SLOTS], empty[SLOTS];
};

/* All threads, before the block synchronises. Columns of K read no v: theirs is zero. */
template <class Ring> __device__ __forceinline__ void kda_summary_init(Ring &r, bool reads_v)
{
    for (int i = 0; i < Ring::SLOTS && !reads_v; i++)
        for (int at = 16 * (int)threadIdx.x; at < 2 * KDA_WIDE_ROWS; at += 16 * KDA_SUMMARY_THREADS)
            *(uint4 *)(r.slot[i].v[0] + at) = make_uint4(0, 0, 0, 0);
    if (threadIdx.x)
        return;
    for (int i = 0; i < Ring::SLOTS; i++) {
        kl_mbar_init(&r.full[i], reads_v ? 1 + 2 * 32 : 1);
        kl_mbar_init(&r.empty[i], 2 * 128);
    }
    kl_mbar_init_fence();
}

/* The loader of a half, one warp; that of half 0 brings the tiles [begin, end) of a path. tiles: the path's first; column: the half's first. */
template <class Ring>
__device__ __forceinline__ void kda_summary_load(Ring &r, const kda_walk &p, const kda_path &path, int begin, int end, const unsigned char *tiles,
                                                 int64_t apart, int column, int half, bool reads_v)
{
    kda_wide_cells cells(p, path, p.v_stride, column, begin);
    for (int n = 0; n < end - begin; n++) {
        int slot = n % Ring::SLOTS;
        if (n >= Ring::SLOTS)
            kl_mbar_wait(&r.empty[slot], (n / Ring::SLOTS - 1) & 1);
        if (half == 0 && kl_lane() == 0) {
            kl_mbar_expect(&r.full[slot], Ring::TILE);
            kl_bulk_load(r.slot[slot].tile, tiles + (begin + n) * apart, Ring::TILE, &r.full[slot]);
            kl_bulk_issued(&r.full[slot]);
        }
        __syncwarp();
        if (reads_v) {
            kda_wide_take(r.slot[slot].v[half], p, cells);
            kda_wide_taken(p, &r.full[slot]);
        }
        cells.next();
    }
}

/* What a warp holds: s and r (u in float) as accumulators, their rounded copies, and v as operands. */
template <class Ring> struct kda_summary_warp {
    static constexpr int KP = Ring::KP, STEPS = KP / 16, SLOTS = Ring::SLOTS;
    using at = kda_core_tile<KP>;
    Ring &m;
    int half, fragment;
    float s[KP / 8][4], r[4][4];
    uint32_t rounded_s[STEPS][4], u[2][4], v[2][4];

    /* warp: 0 to 7, the same for all of a warp by __shfl_sync. */
    __device__ __forceinline__ kda_summary_warp(Ring &m, int warp) : m(m), half(warp / 4), fragment(kda_wide_fragment(warp % 4)) {}
    __device__ __forceinline__ kl_operand operand(int n, int offset, int row) const { return kl_operand_of(m.slot[n % SLOTS].tile + offset, row, 128); }

    /* r = v^T Tb^T */
    __device__ __forceinline__ void input(int n)
    {
        kl_mbar_wait(&m.full[n % SLOTS], n / SLOTS & 1);
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_ldmatrix4_trans(v[j], m.slot[n % SLOTS].v[half] + fragment + 16 * KDA_WIDE_ROW * j);
        kl_operand Tb = operand(n, at::Tb, at::T_row);
        kl_wgmma_fence();
        kl_wgmma<32, false>(&r[0][0], v[0], Tb);
        kl_wgmma<32>(&r[0][0], v[1], kl_operand_at(Tb, 2 * at::T_row));
        kl_wgmma_commit();
    }
    /* r -= S^T w^T */
    __device__ __forceinline__ void correct(int n)
    {
        kl_operand w = operand(n, at::RO, at::RO_row);
        kl_wgmma_fence();
#pragma unroll
        for (int c = 0; c < STEPS; c++)
            kl_wgmma<32>(&r[0][0], rounded_s[c], kl_operand_at(w, 2 * c * at::RO_row));
        kl_wgmma_commit();
    }
    __device__ __forceinline__ void decay(int n)
    {
        const float *decay = (const float *)(m.slot[n % SLOTS].tile + at::decay) + 2 * (kl_lane() & 3);
#pragma unroll
        for (int j = 0; j < KP / 8; j++) {
            float2 d = *(const float2 *)(decay + 8 * j);
            s[j][0] *= d.x, s[j][1] *= d.y, s[j][2] *= d.x, s[j][3] *= d.y;
        }
    }
    /* S^T += u^T kg */
    __device__ __forceinline__ void update(int n)
    {
        kl_operand kg = operand(n, at::G, at::G_row);
        kda_wide_pack<2>(u, &r[0][0]);
        kl_wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2; j++)
            kl_wgmma<KP>(&s[0][0], u[j], kl_operand_at(kg, 2 * j * at::G_row));
        kl_wgmma_commit();
    }

    /* `tiles` tiles; every round ends with all products done. */
    __device__ __forceinline__ void walk(int tiles)
    {
        input(0);
        kl_wgmma_wait<0>();
        kda_wide_pack<STEPS>(rounded_s, &s[0][0]);
#pragma unroll 1
        for (int n = 0; n < tiles; n++) {
            correct(n);
            decay(n);
            kl_wgmma_wait<0>();
            update(n);
            input(n + 1 < tiles ? n + 1 : n);
            kl_wgmma_wait<1>();
            kda_wide_pack<STEPS>(rounded_s, &s[0][0]);
            kl_wgmma_wait<0>();
            kl_mbar_arrive(&m.empty[n % SLOTS]);
        }
    }
};

/* Columns of the identity. */
template <int KP> __device__ __forceinline__ void kda_identity(float s[KP / 8][4], int column)
{
    int t = kl_lane() & 3, g = kl_lane() >> 2;
#pragma unroll
    for (int j = 0; j < KP / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[j][i] = 8 * j + 2 * t + (i & 1) == column + g + 8 * (i >> 1) ? 1.0f : 0.0f;
}

/* M as carry.cuh reads it, [d / 8][i / 16] A fragments of m16n8k8: s[.][i] of column d of M is M[i, d]. */
template <int KP> __device__ __forceinline__ void kda_store_summary(const float s[KP / 8][4], float *M, int column)
{
    int t = kl_lane() & 3, g = kl_lane() >> 2;
    if (column >= KP)
        return;
#pragma unroll
    for (int j = 0; j < KP / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int d = column + g + 8 * (e >> 1), i = 8 * j + 2 * t + (e & 1);
            M[((d / 8 * (KP / 16) + i / 16) * 32 + (i & 7) * 4 + (d & 3)) * 4 + (i >> 3 & 1) + 2 * (d >> 2 & 1)] = s[j][e];
        }
}

#endif
