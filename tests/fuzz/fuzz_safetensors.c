/* A safetensors file from anywhere: either refused, or every tensor lies inside it. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "harness/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile unsigned sink;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *bytes = malloc(size ? size : 1); /* exactly the size, so that a read past it is seen */
    if (!bytes)
        return 0;
    memcpy(bytes, data, size);
    kl_tensors *t;
    if (!kl_failed(kl_tensors_open_memory(&t, bytes, size, "fuzz"))) {
        for (int i = 0; i < kl_tensors_size(t); i++) {
            const kl_tensor *x = kl_tensors_at(t, i);
            size_t n = kl_tensor_bytes(x);
            for (size_t k = 0; k < n; k++)
                sink += ((unsigned char *)x->data)[k];
            if (kl_tensors_find(t, x->name) != x)
                abort();
        }
        const char *format = kl_tensors_metadata(t, "format");
        sink += format ? (unsigned)strlen(format) : 0;
        kl_tensors_close(t);
    }
    free(bytes);
    return 0;
}
