/* kl_upload: a table from the host as kernel parameters. */
#include "common/device.cuh"

#include <cstring>

namespace {

struct piece {
    uint64_t word[496]; /* with the other parameters under the 4 KB that every device allows */
};

__global__ void put(unsigned char *dst, int bytes, const __grid_constant__ piece p)
{
    const unsigned char *src = (const unsigned char *)p.word;
    for (int i = (int)threadIdx.x; i < bytes; i += (int)blockDim.x)
        dst[i] = src[i];
}

} // namespace

kl_status kl_upload(const kl_ctx *ctx, void *dst, const void *src, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += sizeof(piece)) {
        size_t n = bytes - at < sizeof(piece) ? bytes - at : sizeof(piece);
        piece p;
        memcpy(p.word, (const char *)src + at, n);
        kl_grid g;
        g.threads = 256;
        KL_TRY(kl_launch(ctx, "upload", g, put, (unsigned char *)dst + at, (int)n, p));
    }
    return kl_ok();
}
