/* Writing: the header is made in memory, the data goes straight from its owner to the file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "harness/file.h"
#include "harness/json.h"
#include "harness/safetensors.h"

static const char *dtype_file_name(kl_dtype t)
{
    static const char *const names[] = {"F32", "BF16", "F16", "F64", "I32", "I64", "U8"};
    return (unsigned)t < sizeof names / sizeof *names ? names[t] : NULL;
}

static kl_status check_tensor(const kl_tensor *t)
{
    KL_REQUIRE(t->name && t->name[0] && strcmp(t->name, "__metadata__") != 0, "tensor name: expected one");
    KL_REQUIRE(kl_utf8_valid(t->name, strlen(t->name)) == strlen(t->name), "tensor name: expected UTF-8");
    KL_REQUIRE(dtype_file_name(t->dtype), "tensor '%s': dtype: unknown number %d", t->name, (int)t->dtype);
    KL_REQUIRE(t->ndim >= 0 && t->ndim <= KL_TENSOR_DIMS, "tensor '%s': ndim: expected 0 to %d, got %d", t->name, KL_TENSOR_DIMS, t->ndim);
    int64_t bytes = (int64_t)kl_dtype_size(t->dtype);
    for (int i = 0; i < t->ndim; i++)
        KL_REQUIRE(t->shape[i] >= 0 && !__builtin_mul_overflow(bytes, t->shape[i], &bytes), "tensor '%s': shape[%d] = %lld does not fit", t->name, i,
                   (long long)t->shape[i]);
    KL_REQUIRE(t->data || bytes == 0, "tensor '%s': data: expected a pointer, got NULL", t->name);
    return kl_ok();
}

static int compare_names(const void *a, const void *b) { return strcmp((*(const kl_tensor *const *)a)->name, (*(const kl_tensor *const *)b)->name); }

/* Wider elements first, so that every tensor is aligned; by name among equals. */
static int compare_places(const void *a, const void *b)
{
    size_t x = kl_dtype_size((*(const kl_tensor *const *)a)->dtype), y = kl_dtype_size((*(const kl_tensor *const *)b)->dtype);
    return x != y ? (x > y ? -1 : 1) : compare_names(a, b);
}

static kl_status check_all(const kl_tensor **order, int count)
{
    for (int i = 0; i < count; i++)
        KL_TRY(check_tensor(order[i]));
    qsort(order, (size_t)count, sizeof *order, compare_names);
    for (int i = 1; i < count; i++)
        KL_REQUIRE(strcmp(order[i - 1]->name, order[i]->name) != 0, "tensor '%s' is given twice", order[i]->name);
    qsort(order, (size_t)count, sizeof *order, compare_places);
    return kl_ok();
}

static void put_string(FILE *out, const char *text)
{
    fputc('"', out);
    for (const char *p = text; *p; p++)
        if ((unsigned char)*p < 0x20)
            fprintf(out, "\\u%04x", (unsigned)*p);
        else
            fprintf(out, *p == '"' || *p == '\\' ? "\\%c" : "%c", *p);
    fputc('"', out);
}

static void put_metadata(FILE *out, const char *const *metadata, bool more)
{
    fputs("\"__metadata__\":{", out);
    for (int i = 0; metadata[i]; i += 2) {
        fputs(i ? "," : "", out);
        put_string(out, metadata[i]);
        fputc(':', out);
        put_string(out, metadata[i + 1]);
    }
    fputs(more ? "}," : "}", out);
}

/* The JSON, padded with spaces so that the data begins at a multiple of 8. *bytes: free it. */
static kl_status make_header(const kl_tensor **order, int count, const char *const *metadata, char **bytes, size_t *size)
{
    *bytes = NULL;
    FILE *out = open_memstream(bytes, size);
    if (!out)
        return kl_error_errno("no memory for a header");
    fputc('{', out);
    if (metadata && metadata[0])
        put_metadata(out, metadata, count > 0);
    size_t at = 0;
    for (int i = 0; i < count; i++) {
        const kl_tensor *t = order[i];
        put_string(out, t->name);
        fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtype_file_name(t->dtype));
        for (int d = 0; d < t->ndim; d++)
            fprintf(out, "%s%lld", d ? "," : "", (long long)t->shape[d]);
        fprintf(out, "],\"data_offsets\":[%zu,%zu]}%s", at, at + kl_tensor_bytes(t), i + 1 < count ? "," : "");
        at += kl_tensor_bytes(t);
    }
    fputc('}', out);
    fflush(out);
    for (size_t pad = (8 - *size % 8) % 8; pad; pad--)
        fputc(' ', out);
    if (fclose(out) != 0) {
        free(*bytes);
        *bytes = NULL;
        return kl_error(KL_ENOMEM, "no memory for a header");
    }
    return kl_ok();
}

static kl_status write_all(kl_writer *w, const kl_tensor **order, int count, const char *header, size_t size)
{
    unsigned char length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (unsigned char)((uint64_t)size >> (8 * i));
    KL_TRY(kl_writer_write(w, length, sizeof length));
    KL_TRY(kl_writer_write(w, header, size));
    for (int i = 0; i < count; i++)
        KL_TRY(kl_writer_write(w, order[i]->data, kl_tensor_bytes(order[i])));
    return kl_writer_commit(w);
}

kl_status kl_tensors_save(const char *path, const kl_tensor *tensors, int count, const char *const *metadata)
{
    KL_REQUIRE(count >= 0, "count: expected 0 or more, got %d", count);
    const kl_tensor **order = malloc(((size_t)count + 1) * sizeof *order);
    if (!order)
        return kl_error(KL_ENOMEM, "no memory for %d tensors", count);
    for (int i = 0; i < count; i++)
        order[i] = &tensors[i];
    char *header = NULL;
    size_t size = 0;
    kl_writer w = {0};
    kl_status s = check_all(order, count);
    if (!kl_failed(s))
        s = make_header(order, count, metadata, &header, &size);
    if (!kl_failed(s))
        s = kl_writer_open(&w, path);
    if (!kl_failed(s))
        s = write_all(&w, order, count, header, size);
    kl_writer_abandon(&w);
    free(header);
    free(order);
    return s;
}
