/* Gradients of weights: for each expert, over its rows,
 *
 *     out_e[i,j] += sum_r a[r,i] b[r,j]
 *
 * Rows are what the sums run along, and lie in shared memory as they lie in global memory: 64 rows a stage, panels of 64 columns each. A block
 * has 256 columns of a and 192 of b. One warpgroup fetches rows through their index, zeros behind an expert's last; two multiply. */
#include "common/gpu.h"
#include "moe/cuda/backward.cuh"

namespace {

enum { ROWS = 64, PANEL = ROWS * 128, A_PANELS = 4, B_PANELS = 3, STAGES = 3, THREADS = 384, M = 64 * A_PANELS, N = 64 * B_PANELS };
/* Bytes from row to row where sums lie to be added: rows that a warp writes together begin eight banks apart. */
enum { STAGE_ROW = 4 * N + 32 };

struct shared {
    unsigned char a[STAGES][A_PANELS][PANEL], b[STAGES][B_PANELS][PANEL];
    unsigned char stage[8][8 * STAGE_ROW]; /* of a warp */
    uint64_t full[STAGES], empty[STAGES];
};

struct item {
    int expert, i, j, first, n; /* from column i of a and j of b on; rows first .. first+n-1 */
};

__device__ __forceinline__ item item_of(const moe_weight_product &p, int at)
{
    int across = (p.J + N - 1) / N, tiles = across * ((p.I + M - 1) / M), e = at / tiles, rest = at % tiles;
    item it = {e, rest / across * M, rest % across * N, 0, p.rows};
    if (p.first) {
        it.first = p.first[e];
        it.n = p.first[e + 1] - it.first;
    }
    return p.out[0] && (p.out[0][e] || p.out[1][e]) ? it : item{e, 0, 0, 0, 0};
}

__device__ __forceinline__ int items_of(const moe_weight_product &p) { return p.experts * ((p.I + M - 1) / M) * ((p.J + N - 1) / N); }

__device__ __forceinline__ unsigned char *piece_at(unsigned char *panel, int row, int piece) { return panel + row * 128 + ((piece ^ (row & 7)) << 4); }

/* Rows row, row + 16, row + 32, row + 48 of a stage. */
struct four_rows {
    int a[4], b[4]; /* -1: behind the last */

    __device__ __forceinline__ void find(const moe_weight_product &p, const item &it, int row)
    {
#pragma unroll
        for (int q = 0; q < 4; q++) {
            int r = row + 16 * q, at = it.first + r;
            bool there = r < it.n;
            a[q] = there ? (p.a_token ? p.a_token[at] : at) : -1;
            b[q] = there ? (p.b_token ? p.b_token[at] : at) : -1;
        }
    }
};

template <int PANELS> __device__ __forceinline__ void fetch_panels(unsigned char (*panel)[PANEL], const uint16_t *x, int width, const int (&from)[4], int column, int row, int piece)
{
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const uint16_t *source = x + (size_t)(from[q] < 0 ? 0 : from[q]) * width;
#pragma unroll
        for (int n = 0; n < PANELS; n++) {
            int at = column + 64 * n + 8 * piece;
            bool valid = from[q] >= 0 && at < width;
            kl_copy16(piece_at(panel[n], row + 16 * q, piece), valid ? source + at : x, valid);
        }
    }
}

__device__ __forceinline__ void fetch(shared &m, const moe_weight_product &p, int thread)
{
    int row = thread / 8, piece = thread % 8, use = 0;
    for (int at = (int)blockIdx.x; at < items_of(p); at += (int)gridDim.x) {
        item it = item_of(p, at);
        four_rows next;
        next.find(p, it, row);
        for (int r = 0; r < it.n; r += ROWS, use++) {
            int slot = use % STAGES;
            four_rows now = next;
            next.find(p, it, r + ROWS + row);
            if (use >= STAGES)
                kl_mbar_wait(&m.empty[slot], (use / STAGES - 1) & 1);
            fetch_panels<A_PANELS>(m.a[slot], p.a, p.I, now.a, it.i, row, piece);
            fetch_panels<B_PANELS>(m.b[slot], p.b, p.J, now.b, it.j, row, piece);
            kl_copy_arrive(&m.full[slot]);
        }
    }
}

/* Adds eight rows of c to what is there: through shared memory, so that a warp asks for whole runs of a row at a time. Lane 4 g + t has columns
 * 8 n + 2 t, 8 n + 2 t + 1 of row g in c[4 n], c[4 n + 1]. */
__device__ __forceinline__ void add_rows(unsigned char *stage, const float *c, float *out, int J, int columns)
{
    enum { RUNS = N / 64, PAIRS = 2 }; /* half a warp asks for runs of 64 numbers of a row, of two pairs of rows at a time */
    int lane = kl_lane(), row = lane / 16, column = lane % 16 * 4;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
        *(float2 *)(stage + lane / 4 * STAGE_ROW + (8 * n + 2 * (lane & 3)) * 4) = make_float2(c[4 * n], c[4 * n + 1]);
    __syncwarp();
    out += (size_t)row * J + column;
    stage += row * STAGE_ROW + column * 4;
#pragma unroll 1
    for (int first = 0; first < 8; first += 2 * PAIRS, out += 2 * PAIRS * J, stage += 2 * PAIRS * STAGE_ROW) {
        float4 old[PAIRS][RUNS];
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int run = 0; run < RUNS; run++)
                if (64 * run + column < columns)
                    old[i][run] = __ldcs((const float4 *)(out + 2 * i * J + 64 * run));
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int run = 0; run < RUNS; run++) {
                float4 sum = old[i][run], add = *(const float4 *)(stage + 2 * i * STAGE_ROW + 256 * run);
                if (64 * run + column < columns)
                    __stcs((float4 *)(out + 2 * i * J + 64 * run), make_float4(sum.x + add.x, sum.y + add.y, sum.z + add.z, sum.w + add.w));
            }
    }
    __syncwarp();
}

/* The warp's 16 rows of c from row `from` on. Of two weights, eight by eight, the first eight are rows of the first, the others of the second. */
__device__ __forceinline__ void add_half(unsigned char *stage, const moe_weight_product &p, const item &it, const float *c, int from)
{
    bool two = p.out[1] != p.out[0];
#pragma unroll
    for (int eight = 0; eight < 2; eight++) {
        float *rows = from + 8 * eight < p.I ? p.out[eight][it.expert] : nullptr;
        if (rows)
            add_rows(stage, c + 2 * eight, rows + (size_t)(two ? from / 2 : from + 8 * eight) * p.J + it.j, p.J, p.J - it.j);
    }
}

__device__ __forceinline__ void multiply(shared &m, const moe_weight_product &p, int own, int thread)
{
    int use = 0;
    for (int at = (int)blockIdx.x; at < items_of(p); at += (int)gridDim.x) {
        item it = item_of(p, at);
        int blocks = __shfl_sync(0xffffffffu, (it.n + ROWS - 1) / ROWS, 0);
        float c[2][N / 2] = {};
        for (int i = 0; i < blocks; i++, use++) {
            int slot = use % STAGES;
            kl_mbar_wait(&m.full[slot], use / STAGES & 1);
            kl_fence_async_shared();
            kl_operand_n a = kl_operand_columns(m.a[slot][2 * own], PANEL), b = kl_operand_columns(m.b[slot][0], PANEL);
            kl_wgmma_fence();
#pragma unroll
            for (int k = 0; k < ROWS / 16; k++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    kl_wgmma<N>(c[half], kl_operand_at(a, half * PANEL + k * 16 * 128), kl_operand_at(b, k * 16 * 128), true);
            kl_wgmma_commit();
            kl_wgmma_wait<1>();
            if (i > 0 && kl_lane() == 0)
                kl_mbar_arrive(&m.empty[(use - 1) % STAGES]);
        }
        kl_wgmma_wait<0>();
        if (blocks == 0)
            continue;
        if (kl_lane() == 0)
            kl_mbar_arrive(&m.empty[(use - 1) % STAGES]);
#pragma unroll
        for (int half = 0; half < 2; half++)
            add_half(m.stage[4 * own + thread / 32], p, it, c[half], it.i + 128 * own + 64 * half + 16 * (thread / 32));
    }
}

__global__ void __launch_bounds__(THREADS, 1) weight_products(const __grid_constant__ moe_weight_product p)
{
    KL_SHARED(memory);
    shared &m = *(shared *)memory;
    int role = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0), thread = (int)threadIdx.x % 128;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            kl_mbar_init(&m.full[i], 128);
            kl_mbar_init(&m.empty[i], 8);
        }
        kl_mbar_init_fence();
    }
    __syncthreads();
    kl_grid_wait();
    kl_grid_release();
    if (role == 0) {
        kl_registers_fewer<40>();
        fetch(m, p, thread);
    } else {
        kl_registers_more<232>();
        multiply(m, p, role - 1, thread);
    }
}

} // namespace

kl_status moe_device_weight_product(const kl_ctx *ctx, const char *name, const moe_weight_product &p)
{
    kl_range range(name);
    kl_grid g;
    g.x = kl_gpu_multiprocessors(ctx);
    g.threads = THREADS;
    g.shared = sizeof(shared);
    g.overlap = true;
    return kl_launch(ctx, name, g, weight_products, p);
}
