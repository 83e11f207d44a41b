// A stack and a place on it to go on from, for one CUDA thread; reused from block to block.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
  public:
    // The caller's own stack: the scheduler's.
    Fiber();
    Fiber(int index, void (*entry)());
    Fiber(const Fiber&) = delete;

    // The next switch here enters `entry` anew, which must not return.
    void rewind();
    // Leaves this fiber, which is the running one, for the other; returns when something switches back.
    void switch_to(Fiber& next);

  private:
    static void enter();
    void arrive();

    void (*entry)() = nullptr;
    const void* stack = nullptr;
    size_t stack_bytes = 0;
    char* top = nullptr;
    void* context = nullptr;
    void* sanitizer = nullptr;
};

// For the race checker: what was done before release(at) is seen after acquire(at). Without it, nothing.
void release(const void* at);
void acquire(const void* at);
// Tells the race checker of 16 bytes that an instruction accesses; `line` is an address in the kernel's code.
void note_read(const void* at, const void* line);
void note_write(const void* at, const void* line);
// Of 8 bytes.
void note_read_8(const void* at, const void* line);
void note_write_8(const void* at, const void* line);

}  // namespace emulator
