// cp.async, as late or as early as the rules allow.
#include <cstring>

#include "block.hpp"

namespace emulator {

static void complete(Copy& copy) {
    if (copy.global) {
        memcpy(copy.shared, copy.global, 16);
    } else {
        memset(copy.shared, 0, 16);
    }
    copy.done = true;
}

void copy_async(void* shared, const void* global, bool present) {
    check_aligned(shared, 16, "cp_async_16 to shared memory");
    shared_offset(shared, 16, "cp_async_16");
    const void* line = __builtin_return_address(0);
    Thread& self = block.current();
    Copy copy{static_cast<char*>(shared), nullptr, self.groups, false, line};
    if (present) {
        check_aligned(global, 16, "cp_async_16 from global memory");
        copy.global = static_cast<const char*>(global);
        note_read(global, 16, line);
    }
    note_write(shared, 16, line);
    if (block.copies_are_early) {
        complete(copy);
    } else {
        memset(shared, 0xff, 16);
    }
    self.copies.push_back(copy);
}

void copy_commit() { ++block.current().groups; }

void copy_wait(int groups) {
    Thread& self = block.current();
    size_t kept = 0;
    for (Copy& copy : self.copies) {
        bool waited_for = copy.group < self.groups && self.groups - copy.group > uint32_t(groups);
        if (!waited_for) {
            self.copies[kept++] = copy;
            continue;
        }
        if (!copy.done) complete(copy);
        note_write(copy.shared, 16, copy.line);
    }
    self.copies.resize(kept);
}

}  // namespace emulator
