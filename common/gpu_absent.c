#include "common/gpu.h"

#include <stdio.h>

bool kl_gpu_compiled(void) { return false; }
int kl_gpu_count(void) { return 0; }
const char *kl_gpu_toolkit(void) { return "none"; }

void kl_gpu_describe(int index, char *text, size_t size)
{
    snprintf(text, size, "device %d: built without a CUDA toolkit", index);
}

kl_status kl_gpu_check(int index)
{
    return kl_error(KL_EDEVICE, "device: cuda:%d was asked for, but this build has no CUDA side (no nvcc when it was built); use --device cpu", index);
}
