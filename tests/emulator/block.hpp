// The running block: its threads, what they wait for, and the scheduler.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "emulator.hpp"
#include "fiber.hpp"
#include "watch.hpp"

namespace emulator {

// A cp.async that the thread has not waited for.
struct Copy {
    char* shared;
    const char* global;  // null: absent
    uint32_t group;
    bool done;
    const void* line;
};

// Where a thread is in the sequence of its warpgroup's products.
struct ProductsOfThread {
    uint64_t posted, waited;
    uint64_t groups[16];  // ends of those that were committed and not waited for
    int group_count;
    bool is_fenced;
};

struct Thread {
    Fiber fiber;
    Operation at;
    const uint32_t* generation;  // resumed when it differs from `seen`; null: at once
    uint32_t seen;
    std::vector<Copy> copies;
    uint32_t groups;  // committed
    ProductsOfThread products;
    uint32_t fences;  // fence_proxy_async
    int registers;

    Thread(int index, void (*entry)()) : fiber(index, entry) {}
    bool ready() const { return !generation || *generation != seen; }
};

// What a lane brings to a collective; results are written through its pointers.
struct Operands {
    void* result;
    const void* a;
    const void* b;
    int source;
};

// What the race checker knows a barrier by: two in turn, since a thread that is early at the next barrier must not be
// ordered before one that is late at this.
struct Tags {
    uint64_t of[2];
};

// Rendezvous of the 32 lanes of a warp.
struct Warp {
    Operation operation;
    int arrived;
    uint32_t generation;
    Operands posted[32];
    Tags tags;
};

struct Barrier {
    int expected, arrived;
    uint32_t generation;
    Tags tags;
};

struct Mbarrier {
    ptrdiff_t at;         // in shared memory
    int arrivals;         // of a phase
    int missing;          // of this phase
    int64_t bytes;        // announced and not written
    uint32_t generation;  // phases that have ended
    Tags tags;
};

struct Block {
    std::deque<Thread> fibers;
    std::vector<Thread*> threads;
    const int* order;  // of the 32 threads of the warp that runs
    int turn;          // the running thread's place in it
    std::vector<Warp> warps;
    Barrier barriers[16];
    Mbarrier mbarriers[64];
    int mbarrier_count;
    size_t shared_bytes;
    bool copies_are_early, is_last_copy_first;
    int elected;
    int registers;                 // that no thread has
    uint32_t registers_generation;  // how often there were more

    Thread& current() { return *threads[here.thread]; }
};
extern Block block;

const char* name_of(Operation operation);

struct Launch {
    const Kernel* kernel;
    uint32_t grid[3];
    uint32_t shared_bytes;
    const void* params;
};

// Every kernel of the program, by name.
const std::vector<const Kernel*>& kernels();
void run(const Launch& launch, uint32_t seed);

// What the launch that ran last did, over all its blocks.
struct Counters {
    uint64_t products;   // mma instructions
    uint64_t matrices;   // 8×8 matrices that ldmatrix loaded
    uint64_t conflicts;  // extra passes through the banks that they took
};
extern Counters counters;

// Where in shared memory a range lies, which must be inside.
ptrdiff_t shared_offset(const void* at, size_t bytes, const char* what);

// Tensor copies and mbarriers of a block. Copies under way are completed one by one when no thread can go on.
void start_tensor_copies();
bool complete_tensor_copy();
std::string mbarrier_states();

// Products of warpgroups; those that a warp waits for are completed for it when no thread can go on.
void start_products();
bool complete_products();
void check_products_are_done();
void check_products_are_whole();

// Writes that the copy engine and products must know of, of a block.
void start_proxies();
void check_is_fenced(const char* at, const char* what);
void wrote_by_copy(const char* at);

// Suspends the running thread until the generation changes.
void wait(Operation at, const uint32_t& generation);

}  // namespace emulator
