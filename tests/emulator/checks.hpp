// Checks of the emulator itself.
#pragma once

namespace emulator {

// The number of checks that failed, after printing each.
int check_primitives();
int check_faults();

// Runs a fault, which should end the process with a report.
int run_fault(const char* name);

// Writes launches and expectations of the suite of primitives, as README.md lays them out.
void dump_primitives(const char* path);

}  // namespace emulator
