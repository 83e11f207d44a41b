// A stack of its own and a place to go on from, for one CUDA thread; reused from block to block.
#pragma once

#include <cstddef>

namespace attn::emulator {

class Fiber {
  public:
    Fiber(int index, void (*entry)());
    Fiber(const Fiber&) = delete;

    // The next resume() enters `entry` anew. Entry must not return: it ends in suspend().
    void rewind();
    // From the scheduler: runs the fiber until it suspends.
    void resume();
    // From the fiber: back to the scheduler.
    void suspend();

  private:
    static void enter();

    void (*entry)();
    char* stack;
    char* top;
    void* context = nullptr;
    void* sanitizer = nullptr;
};

// For the race checker: what was done before release(at) is seen after acquire(at). Without it, nothing.
void release(const void* at);
void acquire(const void* at);
// Tells the race checker of 16 bytes that an instruction accesses; `line` is an address in the kernel's code.
void note_read(const void* at, const void* line);
void note_write(const void* at, const void* line);

}  // namespace attn::emulator
