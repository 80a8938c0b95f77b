/* Descriptions of tensors for the copy engine. The driver encodes them; it is asked through the runtime, so that nothing links to it. */
#include "common/device.cuh"

#ifndef KL_EMULATE
#include <cuda.h>
#endif

namespace {

kl_status check(const char *name, const void *base, const kl_tensor_shape &s)
{
    KL_REQUIRE((uintptr_t)base % 16 == 0, "%s: expected an address that is a multiple of 16, got %p", name, base);
    KL_REQUIRE(s.dims >= 2 && s.dims <= 5, "%s: expected 2 to 5 dimensions, got %d", name, s.dims);
    for (int i = 0; i < s.dims; i++) {
        KL_REQUIRE(s.size[i] >= 1 && s.size[i] <= (int64_t)1 << 32, "%s: expected 1 to 2^32 elements along dimension %d, got %lld", name, i,
                   (long long)s.size[i]);
        KL_REQUIRE(i == 0 || (s.stride[i] % 8 == 0 && s.stride[i] >= 0 && s.stride[i] < (int64_t)1 << 39),
                   "%s: expected a multiple of 8 elements below 2^39 from one to the next along dimension %d, got %lld", name, i, (long long)s.stride[i]);
        KL_REQUIRE(s.box[i] >= 1 && s.box[i] <= 256, "%s: expected a box of 1 to 256 along dimension %d, got %d", name, i, s.box[i]);
    }
    int row = 2 * s.box[0];
    KL_REQUIRE(s.swizzle == KL_SWIZZLE_NONE ? row % 16 == 0 : row == kl_swizzle_bytes(s.swizzle),
               "%s: expected a box with rows of %d bytes, got %d", name, kl_swizzle_bytes(s.swizzle), row);
    return kl_ok();
}

#ifdef KL_EMULATE

kl_status encode(kl_tensor_map *map, const char *, const void *base, const kl_tensor_shape &s)
{
    map->base = (unsigned char *)base;
    map->shape = s;
    return kl_ok();
}

#else

kl_status encode(kl_tensor_map *map, const char *name, const void *base, const kl_tensor_shape &s)
{
    static_assert(sizeof(kl_tensor_map) == sizeof(CUtensorMap) && alignof(kl_tensor_map) >= alignof(CUtensorMap), "one stands for the other");
    static const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    KL_TRY(kl_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found), name));
    if (found != cudaDriverEntryPointSuccess || !entry)
        return kl_error(KL_EDEVICE, "%s: the driver knows no tensor maps: expected one for CUDA 12.0 or later", name);
    cuuint64_t size[5], stride[4];
    cuuint32_t box[5], step[5];
    for (int i = 0; i < s.dims; i++) {
        size[i] = (cuuint64_t)s.size[i];
        box[i] = (cuuint32_t)s.box[i];
        step[i] = 1;
        if (i)
            stride[i - 1] = 2 * (cuuint64_t)s.stride[i];
    }
    CUresult e = ((decltype(&cuTensorMapEncodeTiled))entry)((CUtensorMap *)map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)s.dims, (void *)base, size,
                                                            stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[s.swizzle],
                                                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return e == CUDA_SUCCESS ? kl_ok() : kl_error(KL_EDEVICE, "%s: the driver refused the tensor map: error %d", name, (int)e);
}

#endif

} // namespace

kl_status kl_tensor_describe(kl_tensor_map *map, const char *name, const void *base, const kl_tensor_shape &shape)
{
    KL_TRY(check(name, base, shape));
    return encode(map, name, base, shape);
}
