#include "common/context.h"

#include <omp.h>
#include <stdlib.h>

#include "common/blas.h"
#include "common/gpu.h"

kl_status kl_gpu_check_capability(int index, int capability, const int *archs, int count, bool *hopper)
{
    enum { HOPPER = 90, OLDEST = 80 };
    int oldest = 0; /* from which on there is code for every device */
    bool own = false;
    for (int i = 0; i < count; i++) {
        int arch = archs[i] / 10;
        own = own || arch == HOPPER;
        if (arch != HOPPER && (!oldest || arch < oldest))
            oldest = arch;
    }
    *hopper = own && capability == HOPPER;
    if (*hopper || (oldest && capability >= oldest))
        return kl_ok();
    if (!oldest && capability >= OLDEST)
        return kl_error(KL_EDEVICE, "device: expected compute capability 9.0, all that this build has code for (CUDA_ARCHS), got %d.%d of cuda:%d; use --device cpu",
                        capability / 10, capability % 10, index);
    oldest = oldest ? oldest : OLDEST;
    return kl_error(KL_EDEVICE, "device: expected compute capability %d.%d or newer, got %d.%d of cuda:%d; use --device cpu", oldest / 10, oldest % 10,
                    capability / 10, capability % 10, index);
}

kl_status kl_gpu_require_hopper(const kl_ctx *ctx, const char *who)
{
    if (ctx->device != KL_CUDA || ctx->hopper)
        return kl_ok();
    return kl_error(KL_EUNSUPPORTED, "%s: device: expected compute capability 9.0 and code for it, which cuda:%d is not; use --device cpu", who, ctx->device_index);
}

kl_status kl_ctx_create(kl_ctx **out, const kl_ctx_options *options)
{
    KL_REQUIRE(out, "ctx: expected a place for the context, got NULL");
    *out = NULL;
    kl_ctx_options o = options ? *options : (kl_ctx_options){0};
    KL_REQUIRE(o.device == KL_CPU || o.device == KL_CUDA, "device: expected cpu or cuda, got %d", (int)o.device);
    KL_REQUIRE(o.threads >= 0 && o.threads <= 4096, "threads: expected 0 (all) to 4096, got %d", o.threads);
    if (o.device == KL_CUDA)
        KL_TRY(kl_gpu_check(o.device_index));
    kl_ctx *ctx = calloc(1, sizeof *ctx);
    if (!ctx)
        return kl_error(KL_ENOMEM, "context: out of memory");
    ctx->device = o.device;
    ctx->device_index = o.device_index;
    ctx->threads = o.threads ? o.threads : omp_get_max_threads();
    kl_blas_single_threaded();
    kl_status s = o.device == KL_CUDA ? kl_gpu_open(ctx) : kl_ok();
    if (kl_failed(s)) {
        kl_ctx_destroy(ctx);
        return s;
    }
    *out = ctx;
    return kl_ok();
}

void kl_ctx_destroy(kl_ctx *ctx)
{
    if (ctx && ctx->device == KL_CUDA)
        kl_gpu_close(ctx);
    free(ctx);
}

const char *kl_device_name(kl_device device) { return device == KL_CUDA ? "cuda" : "cpu"; }
