/* A reader of the golden data: little-endian safetensors files, whole file in memory, for tests only.
 * Every failure ends the test program with one line: golden data that cannot be read proves nothing. */
#ifndef TESTS_GOLDEN_H
#define TESTS_GOLDEN_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cjson/cJSON.h>

typedef struct {
    const char *path;
    unsigned char *bytes;  /* the whole file */
    size_t size, data;     /* data: where the tensors begin */
    cJSON *header;
} golden;

typedef struct {
    char dtype[8];         /* "F32", "BF16", "I64" as in the file */
    int64_t shape[8];
    int rank;
    int64_t count;         /* product of the shape */
    const unsigned char *bytes;
} golden_tensor;

static inline void golden_fail(const char *path, const char *what)
{
    fprintf(stderr, "%s: %s\n", path, what);
    exit(2);
}

static inline unsigned char *golden_read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0)
        golden_fail(path, "cannot be read (tests run from the repository root)");
    *size = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = malloc(*size + 1);
    if (!bytes || fread(bytes, 1, *size, file) != *size)
        golden_fail(path, "cannot be read whole");
    bytes[*size] = 0;
    fclose(file);
    return bytes;
}

/* A JSON file such as a model's config.json; free with cJSON_Delete. */
static inline cJSON *golden_json(const char *path)
{
    size_t size;
    unsigned char *bytes = golden_read_file(path, &size);
    cJSON *json = cJSON_ParseWithLength((char *)bytes, size);
    if (!json)
        golden_fail(path, "is not JSON");
    free(bytes);
    return json;
}

static inline golden golden_open(const char *path)
{
    golden g = { .path = path };
    g.bytes = golden_read_file(path, &g.size);
    uint64_t length = 0;
    if (g.size < sizeof length)
        golden_fail(path, "is shorter than a safetensors header");
    memcpy(&length, g.bytes, sizeof length);
    if (length > g.size - sizeof length)
        golden_fail(path, "has a header longer than the file");
    g.data = sizeof length + (size_t)length;
    g.header = cJSON_ParseWithLength((char *)g.bytes + sizeof length, (size_t)length);
    if (!g.header)
        golden_fail(path, "has a header that is not JSON");
    return g;
}

static inline void golden_close(golden *g)
{
    cJSON_Delete(g->header);
    free(g->bytes);
}

static inline int64_t golden_element_size(const char *dtype)
{
    return strcmp(dtype, "F32") == 0 ? 4 : strcmp(dtype, "BF16") == 0 ? 2 : strcmp(dtype, "I64") == 0 ? 8 : 0;
}

static inline int golden_has(const golden *g, const char *name)
{
    return cJSON_GetObjectItemCaseSensitive(g->header, name) != NULL;
}

static inline golden_tensor golden_find(const golden *g, const char *name)
{
    golden_tensor t = { .count = 1 };
    const cJSON *entry = cJSON_GetObjectItemCaseSensitive(g->header, name);
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype"), *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets"), *n;
    if (!cJSON_IsString(dtype) || !cJSON_IsArray(shape) || cJSON_GetArraySize(shape) > 8 || cJSON_GetArraySize(offsets) != 2)
        golden_fail(g->path, name);
    snprintf(t.dtype, sizeof t.dtype, "%s", dtype->valuestring);
    cJSON_ArrayForEach(n, shape) {
        t.shape[t.rank++] = (int64_t)n->valuedouble;
        t.count *= (int64_t)n->valuedouble;
    }
    double begin = cJSON_GetArrayItem(offsets, 0)->valuedouble, end = cJSON_GetArrayItem(offsets, 1)->valuedouble;
    if (begin < 0 || end > (double)(g->size - g->data) || end - begin != (double)(t.count * golden_element_size(t.dtype)))
        golden_fail(g->path, name);
    t.bytes = g->bytes + g->data + (size_t)begin;
    return t;
}

/* Element i of a float tensor. */
static inline double golden_at(const golden_tensor *t, int64_t i)
{
    uint32_t bits = 0;
    float x;
    if (t->dtype[0] == 'F') {
        memcpy(&bits, t->bytes + 4 * i, 4);
    } else {
        uint16_t high;
        memcpy(&high, t->bytes + 2 * i, 2);
        bits = (uint32_t)high << 16;
    }
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A float tensor as doubles, or as floats; free() it. */
static inline double *golden_doubles(const golden *g, const char *name)
{
    golden_tensor t = golden_find(g, name);
    double *x = malloc((size_t)(t.count + 1) * sizeof *x);
    for (int64_t i = 0; x && i < t.count; i++)
        x[i] = golden_at(&t, i);
    return x ? x : (golden_fail(g->path, "out of memory"), NULL);
}

static inline float *golden_floats(const golden *g, const char *name)
{
    golden_tensor t = golden_find(g, name);
    float *x = malloc((size_t)(t.count + 1) * sizeof *x);
    for (int64_t i = 0; x && i < t.count; i++)
        x[i] = (float)golden_at(&t, i);
    return x ? x : (golden_fail(g->path, "out of memory"), NULL);
}

static inline int64_t *golden_ints(const golden *g, const char *name)
{
    golden_tensor t = golden_find(g, name);
    int64_t *x = malloc((size_t)(t.count + 1) * sizeof *x);
    if (!x || strcmp(t.dtype, "I64") != 0)
        golden_fail(g->path, name);
    memcpy(x, t.bytes, (size_t)t.count * sizeof *x);
    return x;
}

#endif
