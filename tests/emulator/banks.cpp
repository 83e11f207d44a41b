#include "banks.hpp"

#include <algorithm>
#include <cstdio>
#include <map>
#include <tuple>
#include <vector>

#include "block.hpp"

namespace emulator {

// What the lanes of a warp do together: their n-th access at one place in the code since what they last did as a warp.
struct Access {
    uint32_t lanes = 0;  // a bit for each that has come
    uint32_t addresses[32];
};

// A thread's accesses at a place since its warp's last rendezvous.
struct Count {
    uint32_t generation, number;
};

struct Place {
    int bytes;
    std::vector<Count> counts;                                                    // of this block's threads
    std::map<std::tuple<int, uint32_t, uint32_t>, Access> under_way;  // by warp, generation and number
    uint64_t accesses = 0, extra_passes = 0;
};

static std::map<const char*, Place> places;

// 32 banks of 4 bytes serve 128 bytes in a pass: a word for all lanes that want it, two words of a bank one after the other.
static int extra_passes(const Access& access, int bytes) {
    int together = bytes <= 4 ? 32 : 128 / bytes, extra = 0;
    for (int first = 0; first < 32; first += together) {
        std::vector<uint32_t> words;
        for (int lane = first; lane < first + together; ++lane) {
            if (!(access.lanes >> lane & 1)) continue;
            for (uint32_t byte = 0; byte < uint32_t(bytes); byte += 4) words.push_back((access.addresses[lane] + byte) / 4);
        }
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        int rivals[32] = {}, most = 1;
        for (uint32_t word : words) most = std::max(most, ++rivals[word % 32]);
        extra += most - 1;
    }
    return extra;
}

static void finish(Place& place, const Access& access) {
    ++place.accesses;
    place.extra_passes += uint64_t(extra_passes(access, place.bytes));
}

void start_counting_accesses() { places.clear(); }

void end_block_of_accesses() {
    for (auto& [line, place] : places) {
        for (const auto& [number, access] : place.under_way) finish(place, access);
        place.under_way.clear();
        place.counts.clear();
    }
}

void print_accesses() {
    extern const char start asm("__executable_start");
    uint64_t accesses = 0, extra = 0;
    for (const auto& [line, place] : places) accesses += place.accesses, extra += place.extra_passes;
    printf("    %lu ordinary accesses of shared memory by warps, %lu extra passes\n", accesses, extra);
    for (const auto& [line, place] : places) {
        if (!place.extra_passes) continue;
        printf("    code 0x%tx: %lu extra passes in %lu accesses of %d bytes\n", line - &start - 1, place.extra_passes,
               place.accesses, place.bytes);
    }
}

[[maybe_unused]] static void access(const void* at, int bytes, const void* line) {
    if (here.thread < 0) return;
    ptrdiff_t offset = static_cast<const char*>(at) - here.shared;
    if (offset < 0 || size_t(offset) >= block.shared_bytes) return;
    Place& place = places[static_cast<const char*>(line)];
    place.bytes = bytes;
    place.counts.resize(size_t(here.threads));
    Count& count = place.counts[size_t(here.thread)];
    int warp = here.thread / 32;
    uint32_t generation = block.warps[size_t(warp)].generation;
    if (count.generation != generation) count = {generation, 0};
    auto key = std::make_tuple(warp, generation, count.number++);
    Access& together = place.under_way[key];
    int lane = here.thread % 32;
    together.addresses[lane] = uint32_t(offset);
    together.lanes |= 1u << lane;
    if (together.lanes != ~0u) return;
    finish(place, together);
    place.under_way.erase(key);
}

}  // namespace emulator

#ifdef ATTN_COUNTERS

#define ACCESS(name, bytes) \
    extern "C" void name(const void* at) { emulator::access(at, bytes, __builtin_return_address(0)); }
#define ACCESSES(bytes)                                                                  \
    ACCESS(__tsan_read##bytes, bytes) ACCESS(__tsan_write##bytes, bytes)                 \
    ACCESS(__tsan_unaligned_read##bytes, bytes) ACCESS(__tsan_unaligned_write##bytes, bytes) \
    ACCESS(__tsan_volatile_read##bytes, bytes) ACCESS(__tsan_volatile_write##bytes, bytes)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
extern "C" void __tsan_read_range(const void*, unsigned long) {}
extern "C" void __tsan_write_range(const void*, unsigned long) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(const void*) {}
extern "C" void __tsan_func_exit() {}

#endif
