/* KDA through the public header alone: one sequence at once, then the same token by token with the carried state.
 *
 *     cc kda_example.c $(pkg-config --cflags --libs kl) -o kda_example && ./kda_example */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <kda/kda.h>

enum { T = 100, H = 2, K = 16, V = 16 };

static float q[T][H][K], k[T][H][K], v[T][H][V], g[T][H][K], beta[T][H];
static float whole[T][H][V], step[T][H][V], state[H][K][V];

static void run(kl_ctx *ctx, const kda_problem *p)
{
    size_t bytes = kda_workspace(ctx, p, KL_FORWARD);
    void *workspace = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    kl_status s = kda_forward(ctx, p, workspace, bytes);
    free(workspace);
    if (kl_failed(s)) {
        fprintf(stderr, "%s\n", s.message);
        exit(EXIT_FAILURE);
    }
}

int main(void)
{
    kl_ctx *ctx;
    if (kl_failed(kl_ctx_create(&ctx, NULL)))
        return EXIT_FAILURE;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < H; h++) {
            beta[t][h] = 0.5f;
            for (int i = 0; i < K; i++) {
                q[t][h][i] = sinf(0.3f * (float)(t + i)), k[t][h][i] = cosf(0.7f * (float)(t * h + i));
                v[t][h][i] = sinf((float)(t - i)), g[t][h][i] = -0.1f * (float)(i + 1);
            }
        }
    /* q and k are normalised inside; everything not named is zero: contiguous, log gate, scale K^-0.5, no initial state. */
    kda_problem p = {.B = 1, .T = T, .N = 1, .H = H, .HV = H, .K = K, .V = V, .G = K, .qk_l2norm = true,
                     .q = q, .k = k, .v = v, .g = g, .beta = beta, .o = whole};
    run(ctx, &p);
    for (int t = 0; t < T; t++) {
        kda_problem one = p;
        one.T = 1, one.q = q[t], one.k = k[t], one.v = v[t], one.g = g[t], one.beta = beta[t], one.o = step[t];
        one.h0 = t ? state : NULL, one.ht = state;
        run(ctx, &one);
    }
    double worst = 0;
    for (int i = 0; i < T * H * V; i++)
        worst = fmax(worst, fabs((double)(&whole[0][0][0])[i] - (double)(&step[0][0][0])[i]));
    printf("%d tokens at once and one by one: largest difference %.1e\n", T, worst);
    kl_ctx_destroy(ctx);
    return worst < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
