/* Matrix products by cuBLASLt. The library is looked for when it is needed: a machine without it runs everything else. */
#include "common/gpu.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <memory>
#include <new>
#include <vector>

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
    decltype(&cublasLtMatrixLayoutSetAttribute) layout_set;
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
        {&l->layout_set, "cublasLtMatrixLayoutSetAttribute"},
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

/* What the library's answer depends on. */
struct question {
    kl_product shape;
    uint32_t alignment; /* of all addresses and rows, at most 16 bytes */
    size_t workspace;
};

bool same(const question &a, const question &b)
{
    const kl_product &p = a.shape, &q = b.shape;
    return p.count == q.count && p.scattered == q.scattered && p.a_next == q.a_next && p.b_next == q.b_next && p.y_next == q.y_next && p.M == q.M && p.N == q.N && p.K == q.K && p.a_stride == q.a_stride && p.b_stride == q.b_stride && p.y_stride == q.y_stride &&
           p.a_transposed == q.a_transposed && p.b_transposed == q.b_transposed && p.y_dtype == q.y_dtype && a.alignment == b.alignment &&
           a.workspace == b.workspace;
}

struct plan {
    question asked;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, y;
    cublasLtMatmulAlgo_t algorithm;
};

/* What a context keeps. */
struct products {
    library l;
    bool found;
    cublasLtHandle_t handle;
    std::vector<plan> plans;
};

void release(const library &l, const plan &p)
{
    for (cublasLtMatrixLayout_t layout : {p.a, p.b, p.y})
        if (layout)
            l.layout_destroy(layout);
    if (p.operation)
        l.operation_destroy(p.operation);
}

/* A matrix [rows,columns], row after row, is its transpose to the library: columns first. */
kl_status lay_out(const library &l, cublasLtMatrixLayout_t *layout, kl_dtype type, int64_t rows, int64_t columns, int64_t stride, const kl_product &s, int64_t next)
{
    int32_t batch = (int32_t)s.count;
    uint32_t mode = CUBLASLT_BATCH_MODE_POINTER_ARRAY;
    KL_TRY(check(l.layout_create(layout, type == KL_F32 ? CUDA_R_32F : CUDA_R_16BF, (uint64_t)columns, (uint64_t)rows, stride), "layout"));
    if (s.count <= 1 && !s.scattered)
        return kl_ok();
    KL_TRY(check(l.layout_set(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch), "layout"));
    if (s.scattered)
        return check(l.layout_set(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_MODE, &mode, sizeof mode), "layout");
    return check(l.layout_set(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &next, sizeof next), "layout");
}

/* y^T = b^T a^T in the library's order. */
kl_status ask(const products &all, plan *p)
{
    const library &l = all.l;
    const kl_product &s = p->asked.shape;
    cublasOperation_t first = s.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, second = s.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    KL_TRY(check(l.operation_create(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation"));
    KL_TRY(check(l.operation_set(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first), "operation"));
    KL_TRY(check(l.operation_set(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second), "operation"));
    KL_TRY(lay_out(l, &p->b, KL_BF16, s.b_transposed ? s.N : s.K, s.b_transposed ? s.K : s.N, s.b_stride, s, s.b_next));
    KL_TRY(lay_out(l, &p->a, KL_BF16, s.a_transposed ? s.K : s.M, s.a_transposed ? s.M : s.K, s.a_stride, s, s.a_next));
    KL_TRY(lay_out(l, &p->y, s.y_dtype, s.M, s.N, s.y_stride, s, s.y_next));
    cublasLtMatmulPreference_t preference;
    KL_TRY(check(l.preference_create(&preference), "preference"));
    l.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &p->asked.workspace, sizeof p->asked.workspace);
    for (cublasLtMatmulPreferenceAttributes_t of : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        l.preference_set(preference, of, &p->asked.alignment, sizeof p->asked.alignment);
    cublasLtMatmulHeuristicResult_t found = {};
    int count = 0;
    cublasStatus_t e = l.heuristic(all.handle, p->operation, p->b, p->a, p->y, p->y, preference, 1, &found, &count);
    l.preference_destroy(preference);
    if (e != CUBLAS_STATUS_SUCCESS || !count)
        return kl_error(KL_EUNSUPPORTED, "product: cuBLASLt has no way to multiply [%lld,%lld] by [%lld,%lld] (status %d)", (long long)s.M,
                        (long long)s.K, (long long)s.K, (long long)s.N, (int)e);
    p->algorithm = found.algo;
    return kl_ok();
}

kl_status open_products(kl_ctx *ctx, products **out)
{
    products *all = (products *)ctx->blas;
    if (!all) {
        ctx->blas = all = new (std::nothrow) products();
        if (!all)
            return kl_error(KL_ENOMEM, "product: out of memory");
        all->found = open_library(&all->l) && all->l.create(&all->handle) == CUBLAS_STATUS_SUCCESS;
    }
    *out = all;
    return all->found ? kl_ok() : kl_error(KL_EUNSUPPORTED, "product: libcublasLt was not found");
}

kl_status find(products *all, const question &asked, const plan **out)
{
    for (const plan &p : all->plans)
        if (same(p.asked, asked)) {
            *out = &p;
            return kl_ok();
        }
    plan p = {};
    p.asked = asked;
    kl_status s = ask(*all, &p);
    if (kl_failed(s)) {
        release(all->l, p);
        return s;
    }
    all->plans.push_back(p);
    *out = &all->plans.back();
    return kl_ok();
}

} // namespace

kl_status kl_gpu_product(kl_ctx *ctx, const kl_product *shape, float alpha, const void *a, const void *b, float beta, const void *c,
                         void *y, void *workspace, size_t bytes)
{
    products *all;
    const plan *p;
    if (shape->M <= 0 || shape->N <= 0 || shape->K <= 0)
        return kl_ok();
    KL_TRY(open_products(ctx, &all));
    uint64_t places = (shape->scattered ? 0 : (uintptr_t)a | (uintptr_t)b | (uintptr_t)y | (beta != 0.0f ? (uintptr_t)c : 0)) | 2 * (uint64_t)shape->a_stride |
                      2 * (uint64_t)shape->b_stride | kl_dtype_size(shape->y_dtype) * (uint64_t)shape->y_stride | 2 * (uint64_t)shape->a_next | 2 * (uint64_t)shape->b_next |
                      kl_dtype_size(shape->y_dtype) * (uint64_t)shape->y_next | 16;
    /* The library wants its workspace at multiples of 256 bytes. */
    void *place = workspace;
    size_t room = bytes;
    if (!workspace || !std::align(256, 1, place, room))
        room = 0;
    KL_TRY(find(all, {*shape, (uint32_t)(places & (~places + 1)), room / 256 * 256}, &p));
    return check(all->l.matmul(all->handle, p->operation, &alpha, b, p->b, a, p->a, &beta, beta != 0.0f ? c : y, p->y, y, p->y, &p->algorithm,
                               place, p->asked.workspace, (cudaStream_t)ctx->stream), "product");
}

void kl_gpu_products_close(kl_ctx *ctx)
{
    products *all = (products *)ctx->blas;
    if (!all)
        return;
    for (const plan &p : all->plans)
        release(all->l, p);
    if (all->handle)
        all->l.destroy(all->handle);
    delete all;
    ctx->blas = nullptr;
}
