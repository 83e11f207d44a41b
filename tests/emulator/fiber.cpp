#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef ATTN_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef ATTN_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

// switch_context(save, load) stores the callee-saved registers on the stack and its top in *save, then goes on at load.
#if defined(__x86_64__) && !defined(ATTN_UCONTEXT)

extern "C" void attn_switch_context(void** save, void* load);
asm(R"(
.text
.type attn_switch_context, @function
attn_switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size attn_switch_context, .-attn_switch_context
)");

namespace emulator {

static void* new_context(const char*, char* top, void (*entry)()) {
    // Six registers, the entry and a null return address that leaves the stack as after a call.
    void** frame = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    return frame;
}

static void switch_context(void** save, void* load) { attn_switch_context(save, load); }

}  // namespace emulator

#else

#include <ucontext.h>

namespace emulator {

static void* new_context(const char* stack, char* top, void (*entry)()) {
    static_assert(sizeof(ucontext_t) < 8192, "the context lies at the end of the stack");
    ucontext_t* context = reinterpret_cast<ucontext_t*>(top - 8192);
    getcontext(context);
    context->uc_stack.ss_sp = const_cast<char*>(stack);
    context->uc_stack.ss_size = size_t(top - stack) - 8192;
    makecontext(context, entry, 0);
    return context;
}

static void switch_context(void** save, void* load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(load));
}

}  // namespace emulator

#endif

namespace emulator {

static constexpr size_t page = 4096;

static Fiber* running;
[[maybe_unused]] static Fiber* left;

Fiber::Fiber() {
#ifdef ATTN_THREAD_SANITIZER
    sanitizer = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(int index, void (*entry)()) : entry(entry), stack_bytes(256 << 10) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
        perror("stack of a fiber");
        abort();
    }
    stack = memory;
    // Tops at the same place of a page would all compete for the same few lines of the cache.
    top = static_cast<char*>(memory) + stack_bytes - index % 64 * 576;
#ifdef ATTN_THREAD_SANITIZER
    sanitizer = __tsan_create_fiber(0);
    char name[32];
    snprintf(name, sizeof name, "CUDA thread %d", index);
    __tsan_set_fiber_name(sanitizer, name);
#endif
}

void Fiber::enter() {
    running->arrive();
    running->entry();
}

void Fiber::rewind() {
#ifdef ATTN_ADDRESS_SANITIZER
    __asan_unpoison_memory_region(top - page, page);
    sanitizer = nullptr;
#endif
    context = new_context(static_cast<const char*>(stack), top, enter);
}

void Fiber::switch_to(Fiber& next) {
    left = this;
    running = &next;
#ifdef ATTN_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(&sanitizer, next.stack, next.stack_bytes);
#endif
#ifdef ATTN_THREAD_SANITIZER
    __tsan_switch_to_fiber(next.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(&context, next.context);
    arrive();
}

void Fiber::arrive() {
#ifdef ATTN_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(sanitizer, &left->stack, &left->stack_bytes);
#endif
}

}  // namespace emulator
