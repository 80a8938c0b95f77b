/* A cache file from anywhere into a small cache: refused, or loaded with a length that the cache has room for. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "harness/cache.h"
#include "tests/fuzz/small_cache.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static kl_cache *cache;
    if (!cache && kl_failed(small_cache(&cache)))
        abort();
    char *bytes = malloc(size ? size : 1);
    if (!bytes)
        return 0;
    memcpy(bytes, data, size);
    int64_t before = cache->length[1];
    kl_status s = kl_cache_load_memory(cache, 1, bytes, size, "fuzz");
    if (kl_failed(s) ? cache->length[1] != before || !s.message[0] : cache->length[1] < 0 || cache->length[1] > cache->capacity)
        abort();
    free(bytes);
    return 0;
}
