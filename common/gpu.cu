#include "common/gpu.h"

#include <cstdio>
#include <cuda_runtime.h>
#include <new>
#include <nvtx3/nvToolsExt.h>

#include "common/device.cuh"

#define KL_STRING_(x) #x
#define KL_STRING(x) KL_STRING_(x)

struct kl_gpu_clock {
    cudaEvent_t start, stop;
};
struct kl_gpu_graph {
    cudaGraphExec_t exec;
};

static cudaStream_t stream_of(const kl_ctx *ctx) { return (cudaStream_t)ctx->stream; }

bool kl_gpu_compiled(void) { return true; }
bool kl_gpu_emulated(void) { return false; }
bool kl_gpu_launched(int, const char **, size_t *) { return false; }
void kl_gpu_emulate(int, size_t, bool) {}

int kl_gpu_count(void)
{
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char *kl_gpu_toolkit(void)
{
    return KL_STRING(__CUDACC_VER_MAJOR__) "." KL_STRING(__CUDACC_VER_MINOR__);
}

void kl_gpu_describe(int index, char *text, size_t size)
{
    cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, index);
    if (e == cudaSuccess)
        snprintf(text, size, "%s, sm_%d%d", p.name, p.major, p.minor);
    else
        snprintf(text, size, "none (%s)", cudaGetErrorString(e));
}

static kl_status check_capability(int index, bool *hopper)
{
    static const int archs[] = {__CUDA_ARCH_LIST__};
    int major = 0, minor = 0;
    KL_TRY(kl_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device"));
    KL_TRY(kl_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device"));
    return kl_gpu_check_capability(index, 10 * major + minor, archs, sizeof archs / sizeof *archs, hopper);
}

kl_status kl_gpu_check(int index)
{
    int count = 0;
    bool hopper;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess)
        return kl_error(KL_EDEVICE, "device: cuda:%d was asked for, but CUDA found no device (%s); use --device cpu", index, cudaGetErrorString(e));
    if (index < 0 || index >= count)
        return kl_error(KL_EDEVICE, "device: expected an index below %d, got cuda:%d", count, index);
    return check_capability(index, &hopper);
}

int kl_gpu_multiprocessors(const kl_ctx *ctx)
{
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ctx->device_index);
    return count;
}

kl_status kl_gpu_open(kl_ctx *ctx)
{
    int shared = 0;
    KL_TRY(check_capability(ctx->device_index, &ctx->hopper));
    KL_TRY(kl_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ctx->device_index), "device"));
    ctx->shared_most = (size_t)shared;
    KL_TRY(kl_cuda(cudaSetDevice(ctx->device_index), "device"));
    cudaStream_t s;
    KL_TRY(kl_cuda(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "stream"));
    ctx->stream = s;
    return kl_ok();
}

void kl_gpu_close(kl_ctx *ctx)
{
    kl_gpu_products_close(ctx);
    if (ctx->stream)
        cudaStreamDestroy(stream_of(ctx));
    ctx->stream = nullptr;
}

kl_status kl_gpu_memory(const kl_ctx *ctx, size_t *free_bytes, size_t *total_bytes)
{
    (void)ctx;
    return kl_cuda(cudaMemGetInfo(free_bytes, total_bytes), "device memory");
}

kl_status kl_gpu_alloc(const kl_ctx *ctx, void **memory, size_t bytes)
{
    *memory = nullptr;
    cudaError_t e = cudaMalloc(memory, bytes ? bytes : 1);
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        size_t left = 0, total = 0;
        kl_gpu_memory(ctx, &left, &total);
        return kl_error(KL_ENOMEM, "device memory: expected room for %zu bytes, %zu of %zu are free", bytes, left, total);
    }
    return kl_cuda(e, "device memory");
}

void kl_gpu_free(const kl_ctx *ctx, void *memory)
{
    (void)ctx;
    cudaFree(memory);
}

kl_status kl_gpu_copy(const kl_ctx *ctx, void *dst, const void *src, size_t bytes)
{
    if (bytes)
        KL_TRY(kl_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream_of(ctx)), "copy"));
    return kl_gpu_sync(ctx);
}

kl_status kl_gpu_move(const kl_ctx *ctx, void *dst, const void *src, size_t bytes)
{
    return bytes ? kl_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream_of(ctx)), "copy") : kl_ok();
}

kl_status kl_gpu_fill(const kl_ctx *ctx, void *dst, int byte, size_t bytes)
{
    return bytes ? kl_cuda(cudaMemsetAsync(dst, byte, bytes, stream_of(ctx)), "fill") : kl_ok();
}

kl_status kl_gpu_sync(const kl_ctx *ctx) { return kl_cuda(cudaStreamSynchronize(stream_of(ctx)), "device"); }

kl_status kl_gpu_clock_create(const kl_ctx *ctx, kl_gpu_clock **out)
{
    (void)ctx;
    kl_gpu_clock *c = new (std::nothrow) kl_gpu_clock();
    *out = nullptr;
    if (!c)
        return kl_error(KL_ENOMEM, "clock: out of memory");
    kl_status s = kl_cuda(cudaEventCreate(&c->start), "clock");
    if (!kl_failed(s))
        s = kl_cuda(cudaEventCreate(&c->stop), "clock");
    if (kl_failed(s)) {
        kl_gpu_clock_destroy(c);
        return s;
    }
    *out = c;
    return s;
}

void kl_gpu_clock_destroy(kl_gpu_clock *c)
{
    if (!c)
        return;
    if (c->start)
        cudaEventDestroy(c->start);
    if (c->stop)
        cudaEventDestroy(c->stop);
    delete c;
}

kl_status kl_gpu_clock_start(const kl_ctx *ctx, kl_gpu_clock *c) { return kl_cuda(cudaEventRecord(c->start, stream_of(ctx)), "clock"); }

kl_status kl_gpu_clock_stop(const kl_ctx *ctx, kl_gpu_clock *c, double *seconds)
{
    float ms = 0.0f;
    KL_TRY(kl_cuda(cudaEventRecord(c->stop, stream_of(ctx)), "clock"));
    KL_TRY(kl_cuda(cudaEventSynchronize(c->stop), "device"));
    KL_TRY(kl_cuda(cudaEventElapsedTime(&ms, c->start, c->stop), "clock"));
    *seconds = 1e-3 * ms;
    return kl_ok();
}

kl_status kl_gpu_graph_begin(const kl_ctx *ctx)
{
    return kl_cuda(cudaStreamBeginCapture(stream_of(ctx), cudaStreamCaptureModeThreadLocal), "graph");
}

kl_status kl_gpu_graph_end(const kl_ctx *ctx, kl_gpu_graph **out)
{
    *out = nullptr;
    cudaGraph_t graph = nullptr;
    KL_TRY(kl_cuda(cudaStreamEndCapture(stream_of(ctx), &graph), "graph"));
    cudaGraphExec_t exec = nullptr;
    kl_status s = kl_cuda(cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaGraphDestroy(graph);
    KL_TRY(s);
    kl_gpu_graph *g = new (std::nothrow) kl_gpu_graph();
    if (!g) {
        cudaGraphExecDestroy(exec);
        return kl_error(KL_ENOMEM, "graph: out of memory");
    }
    g->exec = exec;
    *out = g;
    return kl_ok();
}

kl_status kl_gpu_graph_launch(const kl_ctx *ctx, kl_gpu_graph *g) { return kl_cuda(cudaGraphLaunch(g->exec, stream_of(ctx)), "graph"); }

void kl_gpu_graph_destroy(kl_gpu_graph *g)
{
    if (!g)
        return;
    cudaGraphExecDestroy(g->exec);
    delete g;
}

void kl_gpu_range_push(const char *name) { nvtxRangePushA(name); }
void kl_gpu_range_pop(void) { nvtxRangePop(); }
