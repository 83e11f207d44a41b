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

}  // namespace emulator
