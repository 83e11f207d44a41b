// Exactly sized memory whose surroundings are watched: by AddressSanitizer, or by a pattern on both sides.
#pragma once

#include <cstddef>
#include <memory>

namespace emulator {

class Guarded {
  public:
    // All bytes 0xff: NaN in every element type. 256-byte aligned.
    explicit Guarded(size_t bytes);
    char* data() const { return start; }
    size_t size() const { return bytes; }
    void poison();
    // Whether a byte on either side has changed.
    bool overrun() const;

  private:
    struct Free {
        void operator()(char* memory) const;
    };
    std::unique_ptr<char, Free> memory;
    char* start;
    size_t bytes;
};

}  // namespace emulator
