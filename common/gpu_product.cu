/* The product that a device is measured by. cuBLASLt is looked for when it is needed: a machine without it runs everything
 * else. */
#include "common/gpu.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <new>

#include "common/device.cuh"

namespace {

struct library {
    void *handle;
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtMatmulDescCreate) operation_create;
    decltype(&cublasLtMatmulDescDestroy) operation_destroy;
    decltype(&cublasLtMatmulDescSetAttribute) operation_set;
    decltype(&cublasLtMatrixLayoutCreate) layout_create;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
    decltype(&cublasLtMatmulPreferenceCreate) preference_create;
    decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
    decltype(&cublasLtMatmul) matmul;
};

bool open_library(library *l)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "/usr/local/cuda/lib64/libcublasLt.so"};
    for (const char *name : names)
        if ((l->handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)))
            break;
    if (!l->handle)
        return false;
    struct { void *function; const char *name; } wanted[] = {
        {&l->create, "cublasLtCreate"}, {&l->destroy, "cublasLtDestroy"},
        {&l->operation_create, "cublasLtMatmulDescCreate"}, {&l->operation_destroy, "cublasLtMatmulDescDestroy"},
        {&l->operation_set, "cublasLtMatmulDescSetAttribute"},
        {&l->layout_create, "cublasLtMatrixLayoutCreate"}, {&l->layout_destroy, "cublasLtMatrixLayoutDestroy"},
        {&l->preference_create, "cublasLtMatmulPreferenceCreate"}, {&l->preference_destroy, "cublasLtMatmulPreferenceDestroy"},
        {&l->preference_set, "cublasLtMatmulPreferenceSetAttribute"}, {&l->heuristic, "cublasLtMatmulAlgoGetHeuristic"}, {&l->matmul, "cublasLtMatmul"}};
    for (auto &w : wanted) {
        void *f = dlsym(l->handle, w.name);
        if (!f)
            return false;
        *(void **)w.function = f;
    }
    return true;
}

kl_status check(cublasStatus_t e, const char *what)
{
    return e == CUBLAS_STATUS_SUCCESS ? kl_ok() : kl_error(KL_EDEVICE, "cuBLASLt: %s: status %d", what, (int)e);
}

} // namespace

struct kl_gpu_product {
    library l;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t layout;
    cublasLtMatmulAlgo_t algorithm;
    void *workspace;
    size_t workspace_bytes;
};

/* Y^T = B^T A^T in the library's column order, A and B row after row. */
static kl_status set_up(const kl_ctx *ctx, kl_gpu_product *p, int64_t n)
{
    p->workspace_bytes = (size_t)64 << 20;
    KL_TRY(kl_gpu_alloc(ctx, &p->workspace, p->workspace_bytes));
    KL_TRY(check(p->l.create(&p->handle), "handle"));
    KL_TRY(check(p->l.operation_create(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation"));
    KL_TRY(check(p->l.layout_create(&p->layout, CUDA_R_16BF, (uint64_t)n, (uint64_t)n, n), "layout"));
    cublasLtMatmulPreference_t preference;
    KL_TRY(check(p->l.preference_create(&preference), "preference"));
    p->l.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &p->workspace_bytes, sizeof p->workspace_bytes);
    cublasLtMatmulHeuristicResult_t found = {};
    int count = 0;
    cublasStatus_t e = p->l.heuristic(p->handle, p->operation, p->layout, p->layout, p->layout, p->layout, preference, 1, &found, &count);
    p->l.preference_destroy(preference);
    KL_TRY(check(e, "heuristic"));
    if (!count)
        return kl_error(KL_EUNSUPPORTED, "cuBLASLt: no algorithm for bfloat16 matrices of %lld x %lld", (long long)n, (long long)n);
    p->algorithm = found.algo;
    return kl_ok();
}

kl_status kl_gpu_product_create(const kl_ctx *ctx, kl_gpu_product **out, int64_t n)
{
    *out = nullptr;
    kl_gpu_product *p = new (std::nothrow) kl_gpu_product();
    if (!p)
        return kl_error(KL_ENOMEM, "product: out of memory");
    kl_status s = open_library(&p->l) ? set_up(ctx, p, n) : kl_error(KL_EUNSUPPORTED, "product: libcublasLt was not found");
    if (kl_failed(s)) {
        kl_gpu_product_destroy(ctx, p);
        return s;
    }
    *out = p;
    return s;
}

kl_status kl_gpu_product_run(const kl_ctx *ctx, const kl_gpu_product *p, void *y, const void *a, const void *b)
{
    float one = 1.0f, zero = 0.0f;
    return check(p->l.matmul(p->handle, p->operation, &one, b, p->layout, a, p->layout, &zero, y, p->layout, y, p->layout, &p->algorithm,
                             p->workspace, p->workspace_bytes, (cudaStream_t)ctx->stream), "product");
}

void kl_gpu_product_destroy(const kl_ctx *ctx, kl_gpu_product *p)
{
    if (!p)
        return;
    if (p->layout)
        p->l.layout_destroy(p->layout);
    if (p->operation)
        p->l.operation_destroy(p->operation);
    if (p->handle)
        p->l.destroy(p->handle);
    if (p->workspace)
        kl_gpu_free(ctx, p->workspace);
    delete p;
}
