#include "block.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>

#include "banks.hpp"
#include "guarded.hpp"

#if defined(ATTN_ADDRESS_SANITIZER) || defined(ATTN_THREAD_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

static const char* const operation_names[] = {
    "shuffle", "warp_sync", "ldmatrix_x2", "ldmatrix_x2_trans", "ldmatrix_x4",  "ldmatrix_x4_trans",
    "mma f16", "mma bf16",  "mma tf32",    "mma f64",           "stmatrix_x4",  "stmatrix_x4_trans",
    "barrier_sync", "mbarrier_wait", "wgmma_wait", "setmaxnreg", "exit",
};

Here here;
Block block;
Counters counters;
static const Launch* running;
static uint32_t started, finished;  // what the race checker knows the start and the end of a block by

// For the race checker the blocks of a launch are not ordered: each has its own memory and other threads than the last.
static constexpr bool separate_blocks = has_thread_sanitizer;

static Fiber& scheduler() {
    static Fiber fiber;
    return fiber;
}

static std::vector<const Kernel*>& table() {
    static std::vector<const Kernel*> kernels;
    return kernels;
}

Kernel::Kernel(const char* name, void (*run)(const void*), size_t params_size, int threads)
    : name(name), run(run), params_size(params_size), threads(threads) {
    table().push_back(this);
}

const std::vector<const Kernel*>& kernels() {
    std::sort(table().begin(), table().end(),
              [](const Kernel* a, const Kernel* b) { return std::string(a->name) < b->name; });
    return table();
}

void fail(const char* format, ...) {
    if (running) {
        fprintf(stderr, "kernel %s, block (%u, %u, %u)", running->kernel->name, here.block[0], here.block[1],
                here.block[2]);
        if (here.thread >= 0) fprintf(stderr, ", thread %d", here.thread);
        fputs(": ", stderr);
    }
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
#if defined(ATTN_ADDRESS_SANITIZER) || defined(ATTN_THREAD_SANITIZER)
    __sanitizer_print_stack_trace();
#endif
    fflush(nullptr);
    _Exit(1);
}

const char* name_of(Operation operation) { return operation_names[int(operation)]; }

// The thread of the running warp whose turn is next; none if all wait.
static Thread* next_ready() {
    for (int i = 1; i <= 32; ++i) {
        int turn = (block.turn + i) % 32;
        Thread& thread = *block.threads[block.order[turn]];
        if (thread.ready()) {
            block.turn = turn;
            here.thread = block.order[turn];
            return &thread;
        }
    }
    return nullptr;
}

void wait(Operation at, const uint32_t& generation) {
    Thread& self = block.current();
    self.at = at;
    self.generation = &generation;
    self.seen = generation;
    Thread* next = next_ready();
    self.fiber.switch_to(next ? next->fiber : scheduler());
}

// The barrier, at which one more has arrived; `release`d under the tag that is given.
static Barrier& arrive(int id, int threads, const uint64_t*& tag) {
    if (id < 0 || id > 15) fail("barrier_sync: there is no barrier %d", id);
    if (threads <= 0 || threads % 32) fail("barrier_sync: %d threads are not whole warps", threads);
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived && barrier.expected != threads) {
        fail("barrier_sync %d: waits for %d threads, others wait for %d there", id, threads, barrier.expected);
    }
    barrier.expected = threads;
    tag = &barrier.tags.of[barrier.generation % 2];
    release(tag);
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    return barrier;
}

void barrier(int id, int threads) {
    const uint64_t* tag;
    Barrier& barrier = arrive(id, threads, tag);
    if (barrier.arrived) wait(Operation::barrier_sync, barrier.generation);
    acquire(tag);
}

void barrier_arrive(int id, int threads) {
    const uint64_t* tag;
    arrive(id, threads, tag);
}

ptrdiff_t shared_offset(const void* at, size_t bytes, const char* what) {
    ptrdiff_t offset = static_cast<const char*>(at) - here.shared;
    if (offset < 0 || size_t(offset) + bytes > block.shared_bytes) {
        fail("%s: byte %td of %zu of shared memory", what, offset, block.shared_bytes);
    }
    return offset;
}

int elected_lane() { return block.elected; }

// Registers that a thread is launched with: all that a multiprocessor has, in eights.
static int launch_registers() { return std::min(65536 / here.threads / 8 * 8, 256); }

void set_registers(int count, bool rises) {
    Thread& self = block.current();
    if (count % 8 || count < 24 || count > 256) fail("setmaxnreg: %d is not a multiple of 8 in 24..256", count);
    int more = count - self.registers;
    if (rises ? more < 0 : more > 0) {
        fail("setmaxnreg.%s to %d registers, the thread has %d", rises ? "inc" : "dec", count, self.registers);
    }
    while (block.registers < more) wait(Operation::setmaxnreg, block.registers_generation);
    block.registers -= more;
    self.registers = count;
    if (!rises) ++block.registers_generation;
}

static void thread_main() {
    acquire(&started);
    running->kernel->run(running->params);
    Thread& self = block.current();
    if (!self.copies.empty()) fail("exits with %zu cp.async in flight", self.copies.size());
    check_products_are_done();
    release(&finished);
    wait(Operation::exit, finished);
    abort();
}

// Runs the threads of a warp until all wait; false if none could go on.
static bool run_warp(const int* order) {
    block.order = order;
    block.turn = 31;
    Thread* first = next_ready();
    if (first) scheduler().switch_to(first->fiber);
    return first;
}

// Where everyone stands, as "96 at barrier_sync, 32 at exit".
static std::string tally(int first, int count) {
    std::string text;
    for (int operation = 0; operation <= int(Operation::exit); ++operation) {
        int waiting = 0;
        for (int i = first; i < first + count; ++i) waiting += int(block.threads[i]->at) == operation;
        if (waiting) text += (text.empty() ? "" : ", ") + std::to_string(waiting) + " at " + operation_names[operation];
    }
    return text;
}

static void require_exit() {
    for (int i = 0; i < here.threads; ++i) {
        if (block.threads[i]->at != Operation::exit) {
            here.thread = -1;
            fail("deadlock: %s%s", tally(0, here.threads).c_str(), mbarrier_states().c_str());
        }
    }
}

// What runs beside the threads, when they can do nothing else.
static bool complete_something() {
    if (block.is_last_copy_first) return complete_tensor_copy() || complete_products();
    return complete_products() || complete_tensor_copy();
}

static void run_block(const std::vector<int>& order) {
    for (Barrier& barrier : block.barriers) barrier = {};
    for (Warp& warp : block.warps) warp = {};
    for (int i = 0; i < here.threads; ++i) {
        Thread& thread = *block.threads[i];
        thread.fiber.rewind();
        thread.generation = nullptr;
        thread.groups = 0;
        ProductsOfThread& products = thread.products;
        products.posted = products.waited = 0;
        products.group_count = 0;
        products.is_fenced = false;
        thread.fences = 0;
        thread.registers = launch_registers();
    }
    block.registers = 0;
    start_tensor_copies();
    start_products();
    start_proxies();
    release(&started);
    for (bool progress = true; progress;) {
        progress = false;
        for (int first = 0; first < here.threads; first += 32) progress |= run_warp(&order[first]);
        progress = progress || complete_something();
    }
    require_exit();
    check_products_are_whole();
}

// Threads in the order of a seed: warps permuted, lanes permuted within each.
static std::vector<int> thread_order(int threads, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<int> warps(threads / 32), order;
    std::iota(warps.begin(), warps.end(), 0);
    if (seed) std::shuffle(warps.begin(), warps.end(), random);
    for (int warp : warps) {
        int lanes[32];
        std::iota(lanes, lanes + 32, 32 * warp);
        if (seed) std::shuffle(lanes, lanes + 32, random);
        order.insert(order.end(), lanes, lanes + 32);
    }
    return order;
}

static void check(const Launch& launch) {
    here.thread = -1;
    for (int axis = 0; axis < 3; ++axis) {
        uint32_t limit = axis == 0 ? 0x7fffffff : 65535;
        if (launch.grid[axis] == 0 || launch.grid[axis] > limit)
            fail("a grid has 1 to %u blocks along axis %d", limit, axis);
    }
    if (launch.shared_bytes > 227 << 10) fail("%u bytes of shared memory, a block has 232448", launch.shared_bytes);
    if (here.threads % 32 || here.threads > 1024) fail("%d threads are not whole warps up to 1024", here.threads);
}

static void choose_threads(size_t turn) {
    size_t first = separate_blocks && turn % 2 ? 1024 : 0;
    while (block.fibers.size() < first + size_t(here.threads)) {
        block.fibers.emplace_back(int(block.fibers.size() % 1024), thread_main);
    }
    block.threads.resize(here.threads);
    for (int i = 0; i < here.threads; ++i) block.threads[i] = &block.fibers[first + i];
}

void run(const Launch& launch, uint32_t seed) {
    running = &launch;
    counters = {};
    if (counts_accesses) start_counting_accesses();
    here.threads = launch.kernel->threads;
    std::copy(launch.grid, launch.grid + 3, here.blocks);
    check(launch);
    block.warps.resize(here.threads / 32);
    block.shared_bytes = launch.shared_bytes;
    block.copies_are_early = seed % 2;
    block.is_last_copy_first = seed % 4 == 2;
    block.elected = int(seed * 11 % 32);

    std::vector<int> order = thread_order(here.threads, seed);
    std::vector<uint64_t> blocks(uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (seed) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(seed));
    std::deque<Guarded> shared;
    for (size_t turn = 0; turn < blocks.size(); ++turn) {
        here.block[0] = uint32_t(blocks[turn] % launch.grid[0]);
        here.block[1] = uint32_t(blocks[turn] / launch.grid[0] % launch.grid[1]);
        here.block[2] = uint32_t(blocks[turn] / launch.grid[0] / launch.grid[1]);
        if (shared.empty() || separate_blocks) shared.emplace_back(launch.shared_bytes);
        shared.back().poison();
        here.shared = shared.back().data();
        choose_threads(turn);
        run_block(order);
        if (counts_accesses) end_block_of_accesses();
        here.thread = -1;
        if (shared.back().overrun()) fail("writes outside its %u bytes of shared memory", launch.shared_bytes);
    }
    acquire(&finished);
    running = nullptr;
}

}  // namespace emulator
