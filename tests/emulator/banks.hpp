// Bank conflicts of the kernels' ordinary accesses of shared memory, in the runner that is built for `counters`: there the
// compiler calls banks.cpp at each access, as it does for the race checker.
#pragma once

#include <cstdint>

namespace emulator {

#ifdef ATTN_COUNTERS
constexpr bool counts_accesses = true;
#else
constexpr bool counts_accesses = false;
#endif

// Before a launch, and behind each of its blocks.
void start_counting_accesses();
void end_block_of_accesses();
// Accesses by warps, extra passes through the banks, and for each place in the code that has any, its share.
void print_accesses();

}  // namespace emulator
