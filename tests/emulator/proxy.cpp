// Ordinary writes to shared memory that the copy engine and products of warpgroups cannot see yet: each thread makes its own
// known by fence_proxy_async. Writes of vectors and of stmatrix are followed, in chunks of 16 bytes.
#include "block.hpp"

namespace emulator {

struct Write {
    uint64_t block;  // that of another block says nothing
    int thread;      // -1: the copy engine
    uint32_t fences;  // that the thread had passed
};

static Write writes[(227 << 10) / 16];
static uint64_t running;

void start_proxies() { ++running; }

void wrote(const void* at, size_t bytes) {
    ptrdiff_t offset = static_cast<const char*>(at) - here.shared;
    if (offset < 0 || size_t(offset) + bytes > block.shared_bytes) return;
    writes[offset / 16] = {running, here.thread, block.current().fences};
}

void fence_proxy_async() { ++block.current().fences; }

void check_is_fenced(const char* at, const char* what) {
    const Write& write = writes[(at - here.shared) / 16];
    if (write.block != running || write.thread < 0) return;
    if (block.threads[size_t(write.thread)]->fences != write.fences) return;
    fail("%s: thread %d wrote byte %td of shared memory without a fence_proxy_async", what, write.thread,
         at - here.shared);
}

void wrote_by_copy(const char* at) {
    check_is_fenced(at, "tensor_load");
    writes[(at - here.shared) / 16] = {running, -1, 0};
}

}  // namespace emulator
