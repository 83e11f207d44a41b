#include "sums.hpp"

#include <cstdlib>

#include "emulator.hpp"

namespace emulator {

static bool read_option() {
    const char* asked = getenv("ATTN_EMULATOR_SUMS");
    if (!asked || strcmp(asked, "cut") == 0) return true;
    if (strcmp(asked, "nearest") == 0) return false;
    fail("ATTN_EMULATOR_SUMS is cut or nearest, not %s", asked);
}

bool sums_are_cut_off() {
    static const bool are_cut_off = read_option();
    return are_cut_off;
}

}  // namespace emulator
