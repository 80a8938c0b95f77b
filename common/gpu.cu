#include "common/gpu.h"

#include <cstdio>
#include <cuda_runtime.h>

#define KL_STRING_(x) #x
#define KL_STRING(x) KL_STRING_(x)

bool kl_gpu_compiled(void) { return true; }

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

kl_status kl_gpu_check(int index)
{
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess)
        return kl_error(KL_EDEVICE, "device: cuda:%d was asked for, but CUDA found no device (%s); use --device cpu", index, cudaGetErrorString(e));
    if (index < 0 || index >= count)
        return kl_error(KL_EDEVICE, "device: expected an index below %d, got cuda:%d", count, index);
    return kl_error(KL_EUNSUPPORTED, "device: no CUDA kernels are in this build yet; use --device cpu");
}
