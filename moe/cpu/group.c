#include "common/parallel.h"
#include "moe/cpu/moe_cpu.h"

/* Buffers of a block are kept near this many floats, but a block has at least TOKENS_MIN tokens, so that
 * the weights of an expert are not read for a handful of rows. */
enum { BLOCK_FLOATS = 1 << 23, TOKENS_MIN = 1024, TOKENS_MAX = 8192 };

int moe_threads(const kl_ctx *ctx) { return ctx && ctx->threads > 0 ? ctx->threads : omp_get_max_threads(); }

bool moe_worth_threads(const moe_problem *p, int64_t tokens)
{
    int64_t widths = (p->E ? p->top_k * p->I : 0) + p->Is;
    return tokens * widths * p->D * 3 > 1 << 19;
}

kl_status moe_enter(const void *workspace, size_t bytes, size_t need)
{
    KL_REQUIRE(need != SIZE_MAX, "moe: sizes: the workspace does not fit memory");
    KL_REQUIRE(need == 0 || (workspace && bytes >= need), "moe: workspace: expected %zu bytes, got %zu", need, workspace ? bytes : (size_t)0);
    KL_REQUIRE(((uintptr_t)workspace & 63) == 0, "moe: workspace: expected 64-byte alignment, got %p", workspace);
    return kl_ok();
}

kl_status moe_enter_forward(const kl_ctx *ctx, const moe_problem *p)
{
    KL_REQUIRE(ctx, "moe: ctx: expected a context, got NULL");
    KL_TRY(moe_validate(ctx, p));
    KL_REQUIRE(p->y || p->T == 0, "moe: y: expected [%lld,%lld], got NULL", (long long)p->T, (long long)p->D);
    return kl_ok();
}

moe_expert moe_expert_of(const moe_problem *p, int64_t e)
{
    if (e == p->E)
        return (moe_expert){p->shared_w1, p->shared_w3, p->shared_w2, p->Is};
    return (moe_expert){p->w1[e], p->w3[e], p->w2[e], p->I};
}

int64_t moe_block_tokens(const moe_problem *p, kl_pass pass)
{
    int64_t inner = pass == KL_FORWARD ? 1 : 3;
    int64_t a_token = (p->E ? p->top_k * (inner * p->I + p->D) : 0) + inner * p->Is + 1;
    int64_t tokens = BLOCK_FLOATS / a_token;
    tokens = tokens < TOKENS_MIN ? TOKENS_MIN : tokens > TOKENS_MAX ? TOKENS_MAX : tokens;
    return p->T < tokens ? p->T : tokens;
}

/* Tiles of [rows, columns] over all experts and the shared one, at most. */
static size_t tiles_bound(const moe_problem *p, int64_t tokens, int64_t columns, int64_t shared_columns)
{
    int64_t routed = p->E ? tokens * p->top_k / MOE_TILE_ROWS + (p->E < tokens * p->top_k ? p->E : tokens * p->top_k) : 0;
    int64_t shared = p->Is ? kl_ceil_div(tokens, MOE_TILE_ROWS) : 0;
    return (size_t)(routed * kl_ceil_div(columns, MOE_TILE_COLUMNS) + shared * kl_ceil_div(shared_columns, MOE_TILE_COLUMNS));
}

moe_block moe_block_carve(kl_arena *a, const moe_problem *p, int64_t tokens, int threads)
{
    moe_block b = {.tile_rows = tokens < MOE_TILE_ROWS ? tokens : MOE_TILE_ROWS};
    size_t rows = p->E ? kl_mul((size_t)tokens, (size_t)p->top_k, &a->overflow) : 0;
    if (p->E) {
        b.routes = moe_routes_carve(a, p, tokens, threads);
        b.first = KL_TAKE(a, int64_t, p->E + 1);
        b.token = KL_TAKE(a, int32_t, rows);
        b.row_of = KL_TAKE(a, int32_t, rows);
        b.row_weight = KL_TAKE(a, float, rows);
    }
    b.inner = KL_TAKE(a, moe_tile, tiles_bound(p, tokens, p->I, p->Is));
    b.outer = KL_TAKE(a, moe_tile, tiles_bound(p, tokens, p->D, p->D));
    return b;
}

/* Counting sort by expert; tokens stay in order within an expert. */
static void sort_rows(const moe_problem *p, moe_block *b)
{
    int64_t rows = b->count * p->top_k;
    memset(b->first, 0, (size_t)(p->E + 1) * sizeof *b->first);
    for (int64_t i = 0; i < rows; i++)
        b->first[b->routes.id[i] + 1]++;
    for (int64_t e = 0; e < p->E; e++)
        b->first[e + 1] += b->first[e];
    for (int64_t i = 0; i < rows; i++) {
        int64_t r = b->first[b->routes.id[i]]++;
        b->token[r] = (int32_t)(i / p->top_k);
        b->row_of[i] = (int32_t)r;
        b->row_weight[r] = b->routes.weight[i];
    }
    for (int64_t e = p->E; e > 0; e--)
        b->first[e] = b->first[e - 1];
    b->first[0] = 0;
}

static int64_t add_tiles(moe_tile *tiles, int64_t n, int64_t e, int64_t from, int64_t to, int64_t columns)
{
    for (int64_t r = from; r < to; r += MOE_TILE_ROWS)
        for (int64_t c = 0; c < columns; c += MOE_TILE_COLUMNS)
            tiles[n++] = (moe_tile){(int32_t)e, (int32_t)r, (int32_t)(to - r < MOE_TILE_ROWS ? to - r : MOE_TILE_ROWS), (int32_t)c,
                                    (int32_t)(columns - c < MOE_TILE_COLUMNS ? columns - c : MOE_TILE_COLUMNS)};
    return n;
}

static void cut_tiles(const moe_problem *p, moe_block *b)
{
    b->inner_count = b->outer_count = 0;
    if (p->Is) {
        b->inner_count = add_tiles(b->inner, 0, p->E, 0, b->count, p->Is);
        b->outer_count = add_tiles(b->outer, 0, p->E, 0, b->count, p->D);
    }
    if (p->E == 0)
        return;
    sort_rows(p, b);
    for (int64_t e = 0; e < p->E; e++) {
        b->inner_count = add_tiles(b->inner, b->inner_count, e, b->first[e], b->first[e + 1], p->I);
        b->outer_count = add_tiles(b->outer, b->outer_count, e, b->first[e], b->first[e + 1], p->D);
    }
}

void moe_block_take(const kl_ctx *ctx, const moe_problem *p, int64_t t, int64_t tokens, moe_block *b)
{
    b->t = t;
    b->count = p->T - t < tokens ? p->T - t : tokens;
    if (p->E)
        moe_route(ctx, p, t, b->count, &b->routes);
    cut_tiles(p, b);
}

const float *moe_gather(const moe_problem *p, const moe_block *b, const moe_tile *tile, const void *source, float *buffer)
{
    const float *rows = (const float *)source + b->t * p->D;
    if (tile->expert == p->E)
        return rows + tile->row * p->D;
    for (int64_t i = 0; i < tile->rows; i++)
        memcpy(buffer + i * p->D, rows + b->token[tile->row + i] * p->D, (size_t)p->D * sizeof(float));
    return buffer;
}
