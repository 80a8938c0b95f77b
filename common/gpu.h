/* What the build and the machine offer of CUDA. Compiled from gpu.cu with a toolkit and from
 * gpu_absent.c without one; callers cannot tell the difference but by the answers. */
#ifndef KL_COMMON_GPU_H
#define KL_COMMON_GPU_H

#include <stdbool.h>
#include <stddef.h>

#include "common/status.h"

#ifdef __cplusplus
extern "C" {
#endif

bool kl_gpu_compiled(void);           /* was a CUDA toolkit there at build time? */
int kl_gpu_count(void);               /* usable devices; 0 without driver or device */
const char *kl_gpu_toolkit(void);     /* "13.0", or "none" */
void kl_gpu_describe(int index, char *text, size_t size); /* "NVIDIA H100 80GB HBM3, sm_90" or why not */
kl_status kl_gpu_check(int index);    /* KL_EDEVICE naming what is missing, or ok */

#ifdef __cplusplus
}
#endif
#endif
