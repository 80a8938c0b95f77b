/* safetensors files: memory-mapped for reading, atomic for writing. */
#ifndef KL_HARNESS_SAFETENSORS_H
#define KL_HARNESS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

enum { KL_TENSOR_DIMS = 8 };

/* A named array. data points into a mapping (read-only) or at memory that someone else owns. */
typedef struct kl_tensor {
    char *name;
    void *data;
    kl_dtype dtype;
    int ndim;
    int64_t shape[KL_TENSOR_DIMS];
} kl_tensor;

int64_t kl_tensor_count(const kl_tensor *t); /* elements */
size_t kl_tensor_bytes(const kl_tensor *t);

/* One file, or a directory's model.safetensors, or its shards through model.safetensors.index.json. */
typedef struct kl_tensors kl_tensors;

/* Checks the header in full: length, JSON, dtype, shape against byte range, ranges inside the file, no
 * overlap, no gap; the index against the shards. path: a file or a directory. */
kl_status kl_tensors_open(kl_tensors **t, const char *path);
/* The same on bytes in memory, which must outlive t. For tests and fuzzing. */
kl_status kl_tensors_open_memory(kl_tensors **t, const void *bytes, size_t size, const char *name);
void kl_tensors_close(kl_tensors *t);

int kl_tensors_size(const kl_tensors *t);
const kl_tensor *kl_tensors_at(const kl_tensors *t, int i);          /* in name order */
const kl_tensor *kl_tensors_find(const kl_tensors *t, const char *name); /* NULL: not there */
size_t kl_tensors_file_bytes(const kl_tensors *t);
const char *kl_tensors_metadata(const kl_tensors *t, const char *key); /* NULL: not there */

/* Writes to path.tmp, fsyncs, renames. metadata: pairs key, value, ..., NULL; may be NULL.
 * KL_EIO with errno's text (a full disk) leaves neither path nor path.tmp changed. */
kl_status kl_tensors_save(const char *path, const kl_tensor *tensors, int count, const char *const *metadata);

#endif
