// mbarriers, and tensor copies that are as late or as early as the rules allow.
#include <algorithm>
#include <cstring>

#include "block.hpp"
#include "tensor_map.hpp"

namespace emulator {

// What an initialised mbarrier's memory holds; something else means that it was written over.
static constexpr uint64_t written = 0x7265697272616263;

static Mbarrier* at_byte(ptrdiff_t at) {
    for (int i = 0; i < block.mbarrier_count; ++i) {
        if (block.mbarriers[i].at == at) return &block.mbarriers[i];
    }
    return nullptr;
}

void mbarrier_init(void* barrier, int arrivals) {
    check_aligned(barrier, 8, "mbarrier_init");
    ptrdiff_t at = shared_offset(barrier, 8, "mbarrier_init");
    if (arrivals < 1) fail("mbarrier_init: %d arrivals", arrivals);
    if (at_byte(at)) fail("mbarrier_init: the one at byte %td is there already", at);
    if (block.mbarrier_count == 64) fail("mbarrier_init: more than 64 of them");
    note_write(barrier, 8, __builtin_return_address(0));
    memcpy(barrier, &written, 8);
    block.mbarriers[block.mbarrier_count++] = {at, arrivals, arrivals, 0, 0, {}};
}

static Mbarrier& find(void* barrier, const char* what, const void* line) {
    Mbarrier* found = at_byte(shared_offset(barrier, 8, what));
    if (!found) fail("%s: no mbarrier was initialised there", what);
    note_read(barrier, 8, line);
    if (memcmp(barrier, &written, 8) != 0) fail("%s: the mbarrier was written over", what);
    return *found;
}

static void end_phase_if_complete(Mbarrier& barrier) {
    if (barrier.missing || barrier.bytes) return;
    barrier.missing = barrier.arrivals;
    ++barrier.generation;
}

void mbarrier_arrive(void* at, int bytes) {
    Mbarrier& barrier = find(at, "mbarrier_arrive", __builtin_return_address(0));
    release(&barrier.tags.of[barrier.generation % 2]);
    --barrier.missing;
    barrier.bytes += bytes;
    if (barrier.missing < 0) fail("mbarrier_arrive: more than %d arrivals in a phase", barrier.arrivals);
    end_phase_if_complete(barrier);
}

void mbarrier_wait(void* at, int parity) {
    Mbarrier& barrier = find(at, "mbarrier_wait", __builtin_return_address(0));
    // Whoever sleeps through a whole further phase waits for one more.
    while (int(barrier.generation % 2) == parity) wait(Operation::mbarrier_wait, barrier.generation);
    acquire(&barrier.tags.of[parity]);
}

std::string mbarrier_states() {
    std::string text;
    for (int i = 0; i < block.mbarrier_count; ++i) {
        const Mbarrier& barrier = block.mbarriers[i];
        if (barrier.missing == barrier.arrivals && barrier.bytes == 0) continue;
        text += "; mbarrier at byte " + std::to_string(barrier.at) + ", phase " + std::to_string(barrier.generation) + ": " +
                std::to_string(barrier.missing) + " arrivals and " + std::to_string(barrier.bytes) + " bytes missing";
    }
    return text;
}

struct TensorCopy {
    char* shared;
    TensorMap map;
    int at[4];
    Mbarrier* barrier;

    // f(where in shared memory, where in global memory, first and end of the bytes that are there) for each 16 bytes.
    template <class F>
    void each_chunk(F f) const {
        int64_t row = 0, row_bytes = int64_t(map.box[0]) * map.element_bytes;
        ptrdiff_t start = shared - here.shared;
        for (uint32_t l = 0; l < map.box[3]; ++l) {
            for (uint32_t k = 0; k < map.box[2]; ++k) {
                for (uint32_t j = 0; j < map.box[1]; ++j, ++row) {
                    const char* source = row_at(j, k, l);
                    for (int64_t byte = 0; byte < row_bytes; byte += 16) {
                        ptrdiff_t place = start + row * row_bytes + byte;
                        if (map.swizzle) place ^= place >> 3 & 0x70;
                        int64_t column = (int64_t(at[0]) * map.element_bytes) + byte;
                        int64_t end = int64_t(map.sizes[0] * map.element_bytes);
                        int low = int(std::min<int64_t>(std::max<int64_t>(-column, 0), 16));
                        int high = source ? int(std::max<int64_t>(std::min<int64_t>(end - column, 16), low)) : low;
                        f(here.shared + place, source + column, low, high);
                    }
                }
            }
        }
    }

    const char* row_at(uint32_t j, uint32_t k, uint32_t l) const {
        int64_t indices[3] = {at[1] + int64_t(j), at[2] + int64_t(k), at[3] + int64_t(l)};
        const char* row = map.address;
        for (int i = 0; i < 3; ++i) {
            if (indices[i] < 0 || indices[i] >= int64_t(map.sizes[i + 1])) return nullptr;
            row += indices[i] * int64_t(map.strides[i]);
        }
        return row;
    }

    int64_t bytes() const { return int64_t(map.box[0]) * map.box[1] * map.box[2] * map.box[3] * map.element_bytes; }
};

// Those from `first` to `end`, in turn; in fixed memory.
static struct {
    TensorCopy ring[256];
    unsigned first, end;

    unsigned count() const { return end - first; }
    TensorCopy& at(unsigned number) { return ring[number % 256]; }
} under_way;

static void complete(const TensorCopy& copy) {
    copy.each_chunk([](char* to, const char* from, int low, int high) {
        char chunk[16] = {};
        if (high - low == 16) {
            memcpy(chunk, from, 16);
        } else {
            for (int i = low; i < high; ++i) chunk[i] = from[i];
        }
        memcpy(to, chunk, 16);
    });
    copy.barrier->bytes -= copy.bytes();
    end_phase_if_complete(*copy.barrier);
}

void start_tensor_copies() {
    block.mbarrier_count = 0;
    under_way.first = under_way.end = 0;
}

bool complete_tensor_copy() {
    if (under_way.count() == 0) return false;
    bool everyone_left = true;
    for (int i = 0; i < here.threads; ++i) everyone_left = everyone_left && block.threads[i]->at == Operation::exit;
    here.thread = -1;
    if (everyone_left) fail("all threads exit with %u tensor copies in flight", under_way.count());
    complete(under_way.at(block.is_last_copy_first ? --under_way.end : under_way.first++));
    return true;
}

const char* TensorMap::refusal() const {
    if (magic != kMagic) return "no tensor map is there";
    if (reinterpret_cast<uintptr_t>(address) % 16) return "the tensor's address is not a multiple of 16";
    for (uint64_t size : sizes) {
        if (size == 0 || size > uint64_t(1) << 32) return "a size that is not in 1..2^32";
    }
    for (uint64_t stride : strides) {
        if (stride == 0 || stride % 16 || stride >> 40) return "a stride that is no multiple of 16 below 2^40";
    }
    for (uint32_t size : box) {
        if (size == 0 || size > 256) return "a box whose size is not in 1..256";
    }
    if (uint64_t(box[0]) * element_bytes % 16) return "rows of a box that are not multiples of 16 bytes";
    if (swizzle != 0 && swizzle != 128) return "a swizzle of neither 0 nor 128 bytes";
    if (swizzle && uint64_t(box[0]) * element_bytes != 128) return "swizzled rows that are not 128 bytes";
    return nullptr;
}

void tensor_load(void* shared, const void* map, void* at, const int* where) {
    const void* line = __builtin_return_address(0);
    TensorCopy copy{static_cast<char*>(shared), {}, {where[0], where[1], where[2], where[3]}, nullptr};
    memcpy(&copy.map, map, sizeof(copy.map));
    const char* why = copy.map.refusal();
    if (why) fail("tensor_load: %s", why);
    copy.barrier = &find(at, "tensor_load", line);
    ptrdiff_t offset = shared_offset(shared, size_t(copy.bytes()), "tensor_load");
    if (offset % (copy.map.swizzle ? 1024 : 128)) fail("tensor_load: byte %td of shared memory is misaligned", offset);
    copy.each_chunk([=](char* to, const char* from, int low, int high) {
        if (high > low) note_read(from + low, size_t(high - low), line);
        note_write(to, 16, line);
        wrote_by_copy(to);
        if (!block.copies_are_early) memset(to, 0xff, 16);
    });
    // Whoever waits for the phase sees what is written.
    release(&copy.barrier->tags.of[copy.barrier->generation % 2]);
    if (block.copies_are_early) return complete(copy);
    if (under_way.count() == 256) fail("tensor_load: more than 256 copies in flight");
    under_way.at(under_way.end++) = copy;
}

}  // namespace emulator
