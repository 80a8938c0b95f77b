/* Reading: every shard is mapped and its header checked in full before a tensor is handed out. */
#include "harness/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "harness/file.h"
#include "harness/json.h"

enum { HEADER_MAX = 100000000, INDEX_MAX = 64 << 20, NAME_BYTES_MAX = 512, SHARDS_MAX = 10000 };

typedef struct {
    char *path;
    char *bytes;
    size_t size;
    bool mapped;
} shard;

typedef struct {
    kl_tensor tensor;
    int shard;
} entry;

struct kl_tensors {
    shard *shards;
    int shard_count;
    entry *entries;     /* by name */
    int count;
    cJSON *metadata;    /* of the first shard that has some, or NULL */
};

/* Where a tensor lies in its shard's data. */
typedef struct {
    size_t begin, end;
    const char *name;
} range;

int64_t kl_tensor_count(const kl_tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++)
        n *= t->shape[i];
    return n;
}

size_t kl_tensor_bytes(const kl_tensor *t) { return (size_t)kl_tensor_count(t) * kl_dtype_size(t->dtype); }

static bool dtype_from_name(const char *name, kl_dtype *dtype)
{
    static const struct {
        const char *name;
        kl_dtype dtype;
    } names[] = {{"F32", KL_F32}, {"BF16", KL_BF16}, {"F16", KL_F16}, {"F64", KL_F64}, {"I32", KL_I32}, {"I64", KL_I64}, {"U8", KL_U8}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i].name) == 0) {
            *dtype = names[i].dtype;
            return true;
        }
    return false;
}

static bool name_is_plain(const char *name)
{
    size_t n = strlen(name);
    if (n == 0 || n > NAME_BYTES_MAX)
        return false;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f)
            return false;
    return true;
}

static kl_status read_dtype(const cJSON *json, const char *file, kl_tensor *t)
{
    const cJSON *dtype = kl_json_get(json, "dtype");
    char text[64];
    if (!cJSON_IsString(dtype) || !dtype_from_name(dtype->valuestring, &t->dtype))
        return kl_error(KL_EFORMAT, "%s: tensor '%s': dtype: expected one of F32, BF16, F16, F64, I32, I64, U8, got %s", file, t->name,
                        kl_json_describe(dtype, text));
    return kl_ok();
}

/* Shape, and the bytes that it and the dtype ask for. */
static kl_status read_shape(const cJSON *json, const char *file, kl_tensor *t, size_t *bytes)
{
    const cJSON *shape = kl_json_get(json, "shape");
    if (!cJSON_IsArray(shape))
        return kl_error(KL_EFORMAT, "%s: tensor '%s': shape: expected an array", file, t->name);
    *bytes = kl_dtype_size(t->dtype);
    bool overflow = false;
    for (const cJSON *item = shape->child; item; item = item->next) {
        char text[64];
        int64_t n;
        if (t->ndim == KL_TENSOR_DIMS)
            return kl_error(KL_EFORMAT, "%s: tensor '%s': shape: expected at most %d dimensions", file, t->name, KL_TENSOR_DIMS);
        if (!kl_json_integer(item, &n) || n < 0)
            return kl_error(KL_EFORMAT, "%s: tensor '%s': shape: expected sizes of 0 or more, got %s", file, t->name, kl_json_describe(item, text));
        t->shape[t->ndim++] = n;
        /* checked even where another size is 0: the product of the others must still fit */
        overflow |= n > 0 && __builtin_mul_overflow(*bytes, (size_t)n, bytes);
    }
    if (overflow || *bytes > (size_t)INT64_MAX)
        return kl_error(KL_EFORMAT, "%s: tensor '%s': shape: its product does not fit 63 bits", file, t->name);
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] == 0)
            *bytes = 0;
    return kl_ok();
}

static kl_status read_offsets(const cJSON *json, const char *file, const kl_tensor *t, size_t bytes, size_t data_size, range *r)
{
    const cJSON *offsets = kl_json_get(json, "data_offsets");
    int64_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 || !kl_json_integer(offsets->child, &begin) ||
        !kl_json_integer(offsets->child->next, &end) || begin < 0 || end < begin)
        return kl_error(KL_EFORMAT, "%s: tensor '%s': data_offsets: expected [begin, end] with 0 <= begin <= end", file, t->name);
    if ((size_t)end > data_size)
        return kl_error(KL_EFORMAT, "%s: tensor '%s': data_offsets: ends at byte %lld of %zu bytes of data: the file is truncated or damaged", file,
                        t->name, (long long)end, data_size);
    if ((size_t)(end - begin) != bytes)
        return kl_error(KL_EFORMAT, "%s: tensor '%s': data_offsets: expected %zu bytes for its shape and dtype, got %lld", file, t->name, bytes,
                        (long long)(end - begin));
    *r = (range){(size_t)begin, (size_t)end, t->name};
    return kl_ok();
}

static kl_status read_entry(const cJSON *json, const char *file, char *data, size_t data_size, kl_tensor *t, range *r)
{
    if (!name_is_plain(json->string))
        return kl_error(KL_EFORMAT, "%s: tensor name: expected 1 to %d printable bytes", file, NAME_BYTES_MAX);
    t->name = strdup(json->string);
    if (!t->name)
        return kl_error(KL_ENOMEM, "%s: no memory for a tensor name", file);
    if (!cJSON_IsObject(json))
        return kl_error(KL_EFORMAT, "%s: tensor '%s': expected an object", file, t->name);
    KL_TRY(read_dtype(json, file, t));
    size_t bytes = 0;
    KL_TRY(read_shape(json, file, t, &bytes));
    KL_TRY(read_offsets(json, file, t, bytes, data_size, r));
    t->data = data + r->begin;
    if (bytes && (uintptr_t)t->data % kl_dtype_size(t->dtype) != 0)
        return kl_error(KL_EFORMAT, "%s: tensor '%s': data_offsets: begins at byte %zu, which is not aligned for %s", file, t->name, r->begin,
                        kl_dtype_name(t->dtype));
    return kl_ok();
}

static int compare_ranges(const void *a, const void *b)
{
    const range *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

/* Together the ranges must cover the data once, from its first byte to its last. */
static kl_status check_cover(range *r, int count, size_t data_size, const char *file)
{
    qsort(r, (size_t)count, sizeof *r, compare_ranges);
    size_t at = 0;
    for (int i = 0; i < count; i++) {
        if (r[i].begin < at)
            return kl_error(KL_EFORMAT, "%s: tensor '%s': begins at byte %zu, inside '%s', which ends at %zu", file, r[i].name, r[i].begin, r[i - 1].name, at);
        if (r[i].begin > at)
            return kl_error(KL_EFORMAT, "%s: tensor '%s': begins at byte %zu, but bytes %zu to there belong to no tensor", file, r[i].name, r[i].begin, at);
        at = r[i].end;
    }
    if (at != data_size)
        return kl_error(KL_EFORMAT, "%s: expected the tensors to end with the data, at byte %zu, they end at %zu: the file is overlong or damaged", file,
                        data_size, at);
    return kl_ok();
}

static kl_status check_metadata(const cJSON *metadata, const char *file)
{
    if (!cJSON_IsObject(metadata))
        return kl_error(KL_EFORMAT, "%s: __metadata__: expected an object of strings", file);
    for (const cJSON *item = metadata->child; item; item = item->next)
        if (!cJSON_IsString(item))
            return kl_error(KL_EFORMAT, "%s: __metadata__: expected only strings, '%.60s' is not one", file, item->string);
    return kl_ok();
}

static kl_status reserve(kl_tensors *t, size_t more)
{
    size_t wanted = (size_t)t->count + more + 1;
    if (wanted > (size_t)INT32_MAX)
        return kl_error(KL_EFORMAT, "too many tensors: %zu", wanted);
    entry *entries = realloc(t->entries, wanted * sizeof *entries);
    if (!entries)
        return kl_error(KL_ENOMEM, "no memory for %zu tensors", wanted);
    t->entries = entries;
    return kl_ok();
}

static kl_status read_entries(kl_tensors *t, int index, const cJSON *header, range *ranges, char *data, size_t data_size)
{
    const char *file = t->shards[index].path;
    int n = 0;
    for (const cJSON *item = header->child; item; item = item->next) {
        if (strcmp(item->string, "__metadata__") == 0) {
            KL_TRY(check_metadata(item, file));
            continue;
        }
        entry *e = &t->entries[t->count++];
        *e = (entry){.shard = index};
        KL_TRY(read_entry(item, file, data, data_size, &e->tensor, &ranges[n++]));
    }
    return check_cover(ranges, n, data_size, file);
}

/* The header of one shard, whose bytes are already there: 8 bytes of length N, N bytes of JSON, then the data. */
static kl_status read_header(kl_tensors *t, int index)
{
    shard *sh = &t->shards[index];
    if (sh->size < 8)
        return kl_error(KL_EFORMAT, "%s: expected a safetensors file, found only %zu bytes", sh->path, sh->size);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | (unsigned char)sh->bytes[i];
    if (length > HEADER_MAX || length > sh->size - 8)
        return kl_error(KL_EFORMAT, "%s: header of %llu bytes: expected at most %d, and the file has %zu after its first 8", sh->path,
                        (unsigned long long)length, HEADER_MAX, sh->size - 8);
    cJSON *header;
    KL_TRY(kl_json_parse(&header, sh->bytes + 8, (size_t)length, sh->path));
    size_t entries = (size_t)cJSON_GetArraySize(header);
    range *ranges = malloc((entries + 1) * sizeof *ranges);
    kl_status s = ranges ? reserve(t, entries) : kl_error(KL_ENOMEM, "%s: no memory for %zu entries", sh->path, entries);
    if (!kl_failed(s))
        s = read_entries(t, index, header, ranges, sh->bytes + 8 + length, sh->size - 8 - (size_t)length);
    if (!kl_failed(s) && !t->metadata)
        t->metadata = cJSON_DetachItemFromObjectCaseSensitive(header, "__metadata__");
    free(ranges);
    cJSON_Delete(header);
    return s;
}

/* Maps the file read-only into the shard. */
static kl_status map_file(shard *sh)
{
    int fd = open(sh->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return kl_error_errno("%s", sh->path);
    struct stat st;
    kl_status s = kl_ok();
    if (fstat(fd, &st) != 0)
        s = kl_error_errno("%s", sh->path);
    else if (!S_ISREG(st.st_mode))
        s = kl_error(KL_EINVAL, "%s: expected a regular file", sh->path);
    else if (st.st_size < 8)
        s = kl_error(KL_EFORMAT, "%s: expected a safetensors file, found only %lld bytes", sh->path, (long long)st.st_size);
    if (!kl_failed(s)) {
        sh->size = (size_t)st.st_size;
        void *map = mmap(NULL, sh->size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED)
            s = kl_error_errno("%s: cannot be mapped", sh->path);
        else {
            sh->bytes = map;
            sh->mapped = true;
        }
    }
    close(fd);
    return s;
}

static kl_status add_shard(kl_tensors *t, const char *path)
{
    shard *shards = realloc(t->shards, ((size_t)t->shard_count + 1) * sizeof *shards);
    if (!shards)
        return kl_error(KL_ENOMEM, "no memory for %d shards", t->shard_count + 1);
    t->shards = shards;
    shards[t->shard_count] = (shard){.path = strdup(path)};
    if (!shards[t->shard_count].path)
        return kl_error(KL_ENOMEM, "no memory for a path");
    t->shard_count++;
    return kl_ok();
}

static kl_status open_shard(kl_tensors *t, const char *path)
{
    KL_TRY(add_shard(t, path));
    KL_TRY(map_file(&t->shards[t->shard_count - 1]));
    return read_header(t, t->shard_count - 1);
}

/* A shard's file name as the index gives it: a name, not a path. */
static kl_status check_shard_name(const cJSON *item, const char *index)
{
    if (!cJSON_IsString(item) || !name_is_plain(item->valuestring) || strlen(item->valuestring) > 255 || strchr(item->valuestring, '/') ||
        strcmp(item->valuestring, "..") == 0 || strcmp(item->valuestring, ".") == 0)
        return kl_error(KL_EFORMAT, "%s: weight_map: '%.100s': expected the plain name of a file beside it", index, item->string);
    return kl_ok();
}

static int compare_strings(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

static kl_status open_shards(kl_tensors *t, const cJSON *map, const char *dir, const char *index)
{
    size_t n = (size_t)cJSON_GetArraySize(map), at = 0;
    const char **files = malloc((n + 1) * sizeof *files);
    if (!files)
        return kl_error(KL_ENOMEM, "%s: no memory for %zu entries", index, n);
    kl_status s = kl_ok();
    for (const cJSON *item = map->child; item && !kl_failed(s); item = item->next) {
        s = check_shard_name(item, index);
        files[at++] = item->valuestring;
    }
    if (!kl_failed(s))
        qsort(files, n, sizeof *files, compare_strings);
    for (size_t i = 0; i < n && !kl_failed(s); i++) {
        if (i && strcmp(files[i], files[i - 1]) == 0)
            continue;
        char path[4096];
        if (t->shard_count == SHARDS_MAX)
            s = kl_error(KL_EFORMAT, "%s: more than %d shards", index, SHARDS_MAX);
        else if (snprintf(path, sizeof path, "%s/%s", dir, files[i]) >= (int)sizeof path)
            s = kl_error(KL_EINVAL, "%s: path too long", dir);
        else
            s = kl_error_in(open_shard(t, path), "shard of %s", index);
    }
    free(files);
    return s;
}

static int compare_entries(const void *a, const void *b) { return strcmp(((const entry *)a)->tensor.name, ((const entry *)b)->tensor.name); }

static kl_status sort_entries(kl_tensors *t)
{
    if (t->count)
        qsort(t->entries, (size_t)t->count, sizeof *t->entries, compare_entries);
    for (int i = 1; i < t->count; i++) {
        const entry *a = &t->entries[i - 1], *b = &t->entries[i];
        if (strcmp(a->tensor.name, b->tensor.name) == 0)
            return kl_error(KL_EFORMAT, "tensor '%s' stands in both %s and %s", a->tensor.name, t->shards[a->shard].path, t->shards[b->shard].path);
    }
    return kl_ok();
}

static const entry *find_entry(const kl_tensors *t, const char *name)
{
    entry key = {.tensor.name = (char *)name};
    return t->count ? bsearch(&key, t->entries, (size_t)t->count, sizeof key, compare_entries) : NULL;
}

static const char *file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* What is listed is there, in the shard that is named; with equal numbers nothing else is. */
static kl_status check_index(const kl_tensors *t, const cJSON *map, const char *index)
{
    int listed = 0;
    for (const cJSON *item = map->child; item; item = item->next, listed++) {
        const entry *e = find_entry(t, item->string);
        if (!e)
            return kl_error(KL_EFORMAT, "%s: tensor '%.200s' is listed, but %s does not hold it", index, item->string, item->valuestring);
        if (strcmp(file_name(t->shards[e->shard].path), item->valuestring) != 0)
            return kl_error(KL_EFORMAT, "%s: tensor '%s' is listed in %s, but stands in %s", index, e->tensor.name, item->valuestring, t->shards[e->shard].path);
    }
    for (int i = 0; i < t->count && listed != t->count; i++)
        if (!kl_json_get(map, t->entries[i].tensor.name))
            return kl_error(KL_EFORMAT, "%s: tensor '%s' of %s is not listed", index, t->entries[i].tensor.name, t->shards[t->entries[i].shard].path);
    return kl_ok();
}

static kl_status open_index(kl_tensors *t, const char *dir, const char *index)
{
    char *text;
    size_t size;
    cJSON *json;
    KL_TRY(kl_file_read(index, INDEX_MAX, &text, &size));
    kl_status s = kl_json_parse(&json, text, size, index);
    free(text);
    if (kl_failed(s))
        return s;
    const cJSON *map = kl_json_get(json, "weight_map");
    if (!cJSON_IsObject(map) || !map->child)
        s = kl_error(KL_EFORMAT, "%s: weight_map: expected an object that names the shard of every tensor", index);
    if (!kl_failed(s))
        s = open_shards(t, map, dir, index);
    if (!kl_failed(s))
        s = sort_entries(t);
    if (!kl_failed(s))
        s = check_index(t, map, index);
    cJSON_Delete(json);
    return s;
}

static kl_status open_path(kl_tensors *t, const char *path)
{
    struct stat st;
    if (stat(path, &st) != 0)
        return kl_error_errno("%s", path);
    if (!S_ISDIR(st.st_mode)) {
        KL_TRY(open_shard(t, path));
        return sort_entries(t);
    }
    char file[4096];
    KL_REQUIRE(strlen(path) < sizeof file - 64, "%s: path too long", path);
    snprintf(file, sizeof file, "%s/model.safetensors", path);
    if (stat(file, &st) == 0) {
        KL_TRY(open_shard(t, file));
        return sort_entries(t);
    }
    snprintf(file, sizeof file, "%s/model.safetensors.index.json", path);
    if (stat(file, &st) == 0)
        return open_index(t, path, file);
    return kl_error(KL_EIO, "%s: expected model.safetensors or model.safetensors.index.json in it, found neither", path);
}

/* Hands the result over, or cleans up. */
static kl_status finish(kl_tensors **out, kl_tensors *t, kl_status s)
{
    if (kl_failed(s))
        kl_tensors_close(t);
    else
        *out = t;
    return s;
}

kl_status kl_tensors_open(kl_tensors **t, const char *path)
{
    *t = NULL;
    kl_tensors *made = calloc(1, sizeof *made);
    if (!made)
        return kl_error(KL_ENOMEM, "%s: no memory", path);
    return finish(t, made, open_path(made, path));
}

kl_status kl_tensors_open_memory(kl_tensors **t, const void *bytes, size_t size, const char *name)
{
    *t = NULL;
    kl_tensors *made = calloc(1, sizeof *made);
    if (!made)
        return kl_error(KL_ENOMEM, "%s: no memory", name);
    kl_status s = add_shard(made, name);
    if (!kl_failed(s)) {
        made->shards[0].bytes = (char *)bytes;
        made->shards[0].size = size;
        s = read_header(made, 0);
    }
    if (!kl_failed(s))
        s = sort_entries(made);
    return finish(t, made, s);
}

void kl_tensors_close(kl_tensors *t)
{
    if (!t)
        return;
    for (int i = 0; i < t->count; i++)
        free(t->entries[i].tensor.name);
    for (int i = 0; i < t->shard_count; i++) {
        if (t->shards[i].mapped)
            munmap(t->shards[i].bytes, t->shards[i].size);
        free(t->shards[i].path);
    }
    free(t->entries);
    free(t->shards);
    cJSON_Delete(t->metadata);
    free(t);
}

int kl_tensors_size(const kl_tensors *t) { return t->count; }

const kl_tensor *kl_tensors_at(const kl_tensors *t, int i) { return i >= 0 && i < t->count ? &t->entries[i].tensor : NULL; }

const kl_tensor *kl_tensors_find(const kl_tensors *t, const char *name)
{
    const entry *e = find_entry(t, name);
    return e ? &e->tensor : NULL;
}

size_t kl_tensors_file_bytes(const kl_tensors *t)
{
    size_t bytes = 0;
    for (int i = 0; i < t->shard_count; i++)
        bytes += t->shards[i].size;
    return bytes;
}

const char *kl_tensors_metadata(const kl_tensors *t, const char *key)
{
    const cJSON *item = kl_json_get(t->metadata, key);
    return cJSON_IsString(item) ? item->valuestring : NULL;
}
