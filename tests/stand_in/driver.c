/* Stands in for the CUDA driver where there is none: it computes nothing, writes down what it is asked in the file that
 * STAND_IN_LOG names, and refuses what the driver refuses: calls without a context on the calling thread, allocations of
 * nothing, and in a stream that is being captured waits for events outside of the graph.
 *
 * STAND_IN_VERSION is the driver's version (13000), STAND_IN_DEVICES how many devices there are (1), STAND_IN_BROKEN the
 * one that does not answer. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    DEVICE_UNAVAILABLE = 46,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_ISOLATION = 905
};

typedef struct {
    /* The stream that recorded it while it was captured. */
    void *captured;
} Event;

static __thread void *current;
/* The stream that is being captured, and its status as the driver counts it: 1 active, 2 invalidated. */
static void *captured;
static int status;

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static void note(const char *format, ...) {
    FILE *log = fopen(getenv("STAND_IN_LOG"), "a");
    va_list list;
    va_start(list, format);
    vfprintf(log, format, list);
    va_end(list);
    fputc('\n', log);
    fclose(log);
}

#define NEEDS_CONTEXT(...) \
    note(__VA_ARGS__);     \
    if (!current) return INVALID_CONTEXT

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }

int cuDriverGetVersion(int *version) {
    *version = setting("STAND_IN_VERSION", 13000);
    return SUCCESS;
}

int cuGetErrorName(int error, const char **name) {
    *name = error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    static __thread char buffer[32];
    snprintf(buffer, sizeof buffer, "number %d", error);
    *text = buffer;
    return SUCCESS;
}

/* Devices. */

int cuDeviceGetCount(int *count) {
    *count = setting("STAND_IN_DEVICES", 1);
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < setting("STAND_IN_DEVICES", 1) ? SUCCESS : INVALID_DEVICE;
}

int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "Stand-in %d", device);
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)1 << 30;
    return device == setting("STAND_IN_BROKEN", -1) ? DEVICE_UNAVAILABLE : SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 16: *value = 132; break;         /* multiprocessors */
    case 75: *value = 9; break;           /* compute capability, major */
    case 76: *value = 0; break;           /* and minor */
    case 97: *value = 227 * 1024; break;  /* shared memory of a block */
    default: *value = 1;
    }
    return device == setting("STAND_IN_BROKEN", -1) ? DEVICE_UNAVAILABLE : SUCCESS;
}

/* Contexts. */

int cuDevicePrimaryCtxRetain(void **context, int device) {
    note("open %d", device);
    *context = (void *)(uintptr_t)(0x1000 + device);
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, SUCCESS; }

int cuCtxGetCurrent(void **context) {
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    note("bind");
    current = context;
    return SUCCESS;
}

int cuCtxSynchronize(void) {
    NEEDS_CONTEXT("synchronize");
    return SUCCESS;
}

/* Streams, events, memory. */

int cuStreamCreate(void **stream, unsigned flags) {
    NEEDS_CONTEXT("stream %u", flags);
    *stream = malloc(1);
    return SUCCESS;
}

int cuStreamDestroy_v2(void *stream) { return (void)stream, SUCCESS; }
int cuStreamSynchronize(void *stream) { return (void)stream, SUCCESS; }

int cuStreamIsCapturing(void *stream, int *out) {
    *out = captured == stream ? status : 0;
    return SUCCESS;
}

int cuStreamBeginCapture_v2(void *stream, int mode) {
    NEEDS_CONTEXT("begin capture %d", mode);
    captured = stream;
    status = 1;
    return SUCCESS;
}

int cuStreamEndCapture(void *stream, void **graph) {
    NEEDS_CONTEXT("end capture");
    int valid = captured == stream && status == 1;
    *graph = NULL;
    status = 0;
    return valid ? SUCCESS : CAPTURE_INVALIDATED;
}

static int is_captured(void *stream) { return status && captured == stream; }

int cuEventCreate(void **event, unsigned flags) {
    NEEDS_CONTEXT("event %u", flags);
    *event = calloc(1, sizeof(Event));
    return SUCCESS;
}

int cuEventDestroy_v2(void *event) { return (void)event, SUCCESS; }

int cuEventRecord(void *event, void *stream) {
    NEEDS_CONTEXT("record %p", event);
    ((Event *)event)->captured = is_captured(stream) ? stream : NULL;
    return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    NEEDS_CONTEXT("wait %p%s", event, flags ? " in another way" : "");
    if (is_captured(stream) && ((Event *)event)->captured != stream) {
        status = 2;
        return CAPTURE_ISOLATION;
    }
    return SUCCESS;
}

int cuMemAllocAsync(uint64_t *address, size_t bytes, void *stream) {
    NEEDS_CONTEXT("allocate %zu", bytes);
    (void)stream;
    *address = (uint64_t)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
    return bytes ? SUCCESS : INVALID_VALUE;
}

int cuMemFreeAsync(uint64_t address, void *stream) {
    NEEDS_CONTEXT("free");
    (void)stream;
    free((void *)(uintptr_t)address);
    return SUCCESS;
}

/* Kernels. */

int cuModuleLoadData(void **module, const void *image) {
    NEEDS_CONTEXT("load %s", (const char *)image);
    *module = malloc(1);
    return SUCCESS;
}

int cuModuleUnload(void *module) { return (void)module, SUCCESS; }

int cuModuleGetFunction(void **function, void *module, const char *name) {
    NEEDS_CONTEXT("find %s", name);
    *function = strdup(name);
    return module ? SUCCESS : INVALID_VALUE;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    NEEDS_CONTEXT("set %s %d", (const char *)function, attribute);
    return (void)value, SUCCESS;
}

int cuTensorMapEncodeTiled(
    void *map, int type, unsigned rank, void *address, const uint64_t *sizes, const uint64_t *strides,
    const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill
) {
    NEEDS_CONTEXT("encode");
    (void)type, (void)rank, (void)address, (void)sizes, (void)strides, (void)box, (void)steps;
    (void)interleave, (void)swizzle, (void)promotion, (void)fill;
    memset(map, 1, 128);
    return SUCCESS;
}

int cuLaunchKernel(
    void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void *stream, void **parameters, void **extra
) {
    NEEDS_CONTEXT("launch %s", (const char *)function);
    (void)x, (void)y, (void)z, (void)bx, (void)by, (void)bz, (void)shared, (void)stream, (void)parameters, (void)extra;
    return SUCCESS;
}
