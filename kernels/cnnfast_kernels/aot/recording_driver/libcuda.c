// libcuda.so.1 without a GPU, as much of it as Triton's driver.c and its launchers ask for (3.6 to 3.9).
//
// Loads nothing and runs nothing. It keeps what it is asked to launch, and the tensor maps that it is asked to encode, until Python
// (__init__.py beside this file) has read them; the functions that Python calls begin with recorder_. A tensor map that breaks one of
// CUDA's documented limits is refused as CUDA refuses it, and the record says which limit it was.
//
// Built against the cuda.h that comes with Triton, whose driver.c calls these functions by the same header.

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { MOST_PARAMETERS = 256, MOST_DIMENSIONS = 5 };

// A loaded binary and its one kernel: what a CUmodule and a CUfunction point to. Never freed, so that no two kernels of a process share
// a handle.
struct kernel {
    uint32_t parameters;
    uint32_t bytes[MOST_PARAMETERS];
};

// The two records below are read by Python's ctypes, field by field.
struct launch {
    uint64_t function, stream;
    uint32_t grid[3], block[3];
    uint32_t shared_bytes, attributes;
    uint64_t start; // of its bytes among all: first the kernel's parameters, one after the other, then the attributes
    uint64_t parameter_bytes, attribute_bytes;
};

struct encode {
    uint64_t address;
    uint64_t dims[MOST_DIMENSIONS], strides[MOST_DIMENSIONS]; // innermost first; strides in bytes, the innermost axis has none
    uint32_t box[MOST_DIMENSIONS], element_strides[MOST_DIMENSIONS];
    uint32_t rank, type, element_bytes, interleave, swizzle, promotion, fill;
    char refusal[160]; // empty where the map is legal
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // launchers let go of Python's lock when they launch
static bool recording;
static int capability, most_shared_bytes;

static struct launch *launches;
static struct encode *encodes;
static unsigned char *bytes;
static uint64_t launch_count, launch_room, encode_count, encode_room, byte_count, byte_room;

// Room for `more` items of `size` bytes behind the first `count`.
static void *grown(void *items, uint64_t size, uint64_t count, uint64_t more, uint64_t *room) {
    if (count + more > *room) {
        *room = 2 * (count + more);
        items = realloc(items, *room * size);
        if (!items)
            abort();
    }
    return items;
}

static void keep(const void *what, size_t size) {
    bytes = grown(bytes, 1, byte_count, size, &byte_room);
    memcpy(bytes + byte_count, what, size);
    byte_count += size;
}

// --- what Python calls ---------------------------------------------------------------------------------------------------------------

// `of_capability` is 90 for sm_90; `shared_bytes` is what one block may have. Nothing is kept unless `record`.
void recorder_start(int of_capability, int shared_bytes, int record) {
    capability = of_capability;
    most_shared_bytes = shared_bytes;
    recording = record;
}

// How many bytes to keep of each parameter of a launch of `kernel`: the launcher passes pointers to them, and no sizes.
// False where that is more than there is room for.
int recorder_expect(struct kernel *kernel, uint32_t parameters, const uint32_t *sizes) {
    if (parameters > MOST_PARAMETERS)
        return false;
    kernel->parameters = parameters;
    memcpy(kernel->bytes, sizes, parameters * sizeof *sizes);
    return true;
}

uint64_t recorder_launches(const struct launch **first) { return *first = launches, launch_count; }
uint64_t recorder_encodes(const struct encode **first) { return *first = encodes, encode_count; }
uint64_t recorder_bytes(const unsigned char **first) { return *first = bytes, byte_count; }
void recorder_forget(void) { launch_count = encode_count = byte_count = 0; }

// --- launches ------------------------------------------------------------------------------------------------------------------------

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
    (void)extra; // Triton passes none
    if (!recording)
        return CUDA_SUCCESS;
    const struct kernel *kernel = (const struct kernel *)f;
    pthread_mutex_lock(&lock);
    launches = grown(launches, sizeof *launches, launch_count, 1, &launch_room);
    struct launch *l = &launches[launch_count++];
    *l = (struct launch){
        .function = (uintptr_t)f,
        .stream = (uintptr_t)config->hStream,
        .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
        .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
        .shared_bytes = config->sharedMemBytes,
        .attributes = config->numAttrs,
        .start = byte_count,
        .attribute_bytes = config->numAttrs * sizeof *config->attrs,
    };
    for (uint32_t i = 0; i < kernel->parameters; i++) {
        keep(parameters[i], kernel->bytes[i]);
        l->parameter_bytes += kernel->bytes[i];
    }
    keep(config->attrs, l->attribute_bytes);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

// --- tensor maps ---------------------------------------------------------------------------------------------------------------------

static uint32_t element_bytes(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
        return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
        return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
        return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
        return 8;
    default: // of four and six bits, which have rules of their own
        return 0;
    }
}

static bool integral(CUtensorMapDataType type) {
    return type <= CU_TENSOR_MAP_DATA_TYPE_INT64; // uint8, uint16, uint32, int32, uint64, int64 come first
}

// Bytes that one line of a box may have; 0 where there is no such swizzle.
static uint32_t swizzle_bytes(CUtensorMapSwizzle swizzle) {
    switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
        return UINT32_MAX;
    case CU_TENSOR_MAP_SWIZZLE_32B:
        return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
        return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
        return 128;
    default: // the variants of 128 bytes for which Triton has no use
        return 0;
    }
}

#define REFUSE_IF(condition, ...)                                                                                                        \
    do {                                                                                                                                 \
        if (condition) {                                                                                                                 \
            snprintf(e->refusal, sizeof e->refusal, __VA_ARGS__);                                                                        \
            return;                                                                                                                      \
        }                                                                                                                                \
    } while (0)

// The limits that CUDA's documentation of cuTensorMapEncodeTiled states, where nothing is interleaved.
static void judge(struct encode *e, const CUtensorMap *map) {
    const unsigned long long farthest = 1ull << 40, largest = 1ull << 32;
    REFUSE_IF((uintptr_t)map % 64, "the map lies at %p, which is no multiple of 64 bytes", (const void *)map);
    REFUSE_IF(e->rank < 1 || e->rank > MOST_DIMENSIONS, "rank %u is not from 1 to 5", e->rank);
    REFUSE_IF(!e->element_bytes, "data type %u is not of whole bytes", e->type);
    REFUSE_IF(e->interleave != CU_TENSOR_MAP_INTERLEAVE_NONE, "interleave %u is not known here", e->interleave);
    REFUSE_IF(e->promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "there is no L2 promotion %u", e->promotion);
    REFUSE_IF(e->fill > CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA, "there is no fill %u", e->fill);
    REFUSE_IF(e->fill && integral(e->type), "NaN outside of a tensor of integers, data type %u", e->type);
    REFUSE_IF(e->address % 16, "the tensor lies at 0x%llx, which is no multiple of 16 bytes", (unsigned long long)e->address);
    unsigned long long box_bytes = e->element_bytes;
    for (uint32_t i = 0; i < e->rank; i++) {
        unsigned long long dim = e->dims[i], stride = e->strides[i];
        REFUSE_IF(!dim || dim > largest, "extent %llu of axis %u is not from 1 to 2^32", dim, i);
        REFUSE_IF(!e->box[i] || e->box[i] > 256, "box of %u along axis %u is not from 1 to 256", e->box[i], i);
        REFUSE_IF(!e->element_strides[i] || e->element_strides[i] > 8, "element stride %u of axis %u is not from 1 to 8",
                  e->element_strides[i], i);
        REFUSE_IF(i && stride % 16, "stride of %llu bytes of axis %u is no multiple of 16", stride, i);
        REFUSE_IF(i && stride >= farthest, "stride of %llu bytes of axis %u is not below 2^40", stride, i);
        box_bytes *= e->box[i];
    }
    uint32_t line = e->box[0] * e->element_bytes, most = swizzle_bytes(e->swizzle);
    REFUSE_IF(!most, "swizzle %u is not known here", e->swizzle);
    REFUSE_IF(line % 16, "a line of the box has %u bytes, which is no multiple of 16", line);
    REFUSE_IF(line > most, "a line of the box has %u bytes, more than the %u of its swizzle", line, most);
    REFUSE_IF(box_bytes > (unsigned)most_shared_bytes, "a box of %llu bytes, more than the %d of shared memory", box_bytes,
              most_shared_bytes);
}

// What stands in a map that was encoded here, so that launches differ in their parameters where maps do. The second word stays zero:
// Triton clears a bit of it for small tensors.
struct contents {
    uint64_t address, zero, dims[MOST_DIMENSIONS], strides[MOST_DIMENSIONS - 1];
    uint32_t box[MOST_DIMENSIONS];
    uint8_t element_strides[MOST_DIMENSIONS], rank, type, interleave, swizzle, promotion, fill;
};
_Static_assert(sizeof(struct contents) <= sizeof(CUtensorMap), "a map has 128 bytes");

CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                        const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                        const cuuint32_t *element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                        CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    if (!recording)
        return CUDA_SUCCESS;
    struct encode e = {
        .address = (uintptr_t)address,
        .rank = rank,
        .type = type,
        .element_bytes = element_bytes(type),
        .interleave = interleave,
        .swizzle = swizzle,
        .promotion = promotion,
        .fill = fill,
    };
    for (uint32_t i = 0; i < rank && i < MOST_DIMENSIONS; i++) {
        e.dims[i] = dims[i];
        e.strides[i] = i ? strides[i - 1] : 0;
        e.box[i] = box[i];
        e.element_strides[i] = element_strides[i];
    }
    judge(&e, map);
    pthread_mutex_lock(&lock);
    encodes = grown(encodes, sizeof *encodes, encode_count, 1, &encode_room);
    encodes[encode_count++] = e;
    pthread_mutex_unlock(&lock);
    if (e.refusal[0])
        return CUDA_ERROR_INVALID_VALUE;

    struct contents c = {.address = e.address, .rank = rank, .type = type, .interleave = interleave, .swizzle = swizzle,
                         .promotion = promotion, .fill = fill};
    memcpy(c.dims, e.dims, sizeof c.dims);
    memcpy(c.strides, e.strides + 1, sizeof c.strides);
    memcpy(c.box, e.box, sizeof c.box);
    for (uint32_t i = 0; i < rank; i++)
        c.element_strides[i] = element_strides[i];
    memset(map, 0, sizeof *map);
    memcpy(map, &c, sizeof c);
    return CUDA_SUCCESS;
}

// No kernel here asks for a map of this kind.
CUresult CUDAAPI cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                         const cuuint64_t *dims, const cuuint64_t *strides, const int *lower, const int *upper,
                                         cuuint32_t channels, cuuint32_t pixels, const cuuint32_t *element_strides,
                                         CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                         CUtensorMapFloatOOBfill fill) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

// --- binaries ------------------------------------------------------------------------------------------------------------------------

CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) {
    *module = calloc(1, sizeof(struct kernel));
    return *module ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
    *f = (CUfunction)module;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

// --- the device and its context ------------------------------------------------------------------------------------------------------

CUresult CUDAAPI cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "an error of the driver that records";
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = capability / 10;
        break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        *value = capability % 10;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = most_shared_bytes;
        break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = 132;
        break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        *value = 32;
        break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        *value = 65536;
        break;
    default: // clocks and widths, which nothing depends on
        *value = 1;
    }
    return CUDA_SUCCESS;
}

// One context, which is always current.
static CUcontext the_context(void) { return (CUcontext)&lock; }

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) {
    *context = the_context();
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

// Memory is the process's own, and a GPU would find it under the same address.
CUresult CUDAAPI cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    memcpy(value, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *config) {
    *clusters = 1;
    return CUDA_SUCCESS;
}
