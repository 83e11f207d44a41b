// Checks of the emulator itself.
#pragma once

namespace emulator {

// The number of checks that failed, after printing each.
int check_primitives();
int check_faults();

}  // namespace emulator
