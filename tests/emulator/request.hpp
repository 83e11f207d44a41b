// A request of the runner, as README.md lays it out.
#pragma once

#include <string>
#include <vector>

#include "block.hpp"
#include "tensor_map.hpp"

namespace emulator {

struct Buffer {
    uint64_t bytes;
    bool output;
    std::vector<char> contents;  // empty: poisoned
};

struct Pointer {
    uint32_t offset, buffer;
    uint64_t buffer_offset;
};

// A tensor map in the parameters, whose address is that of the pointer.
struct MapOfPointer {
    Pointer pointer;
    TensorMap map;
};

struct RequestedLaunch {
    const Kernel* kernel;
    uint32_t grid[3];
    uint32_t shared_bytes;
    std::vector<char> params;
    std::vector<Pointer> pointers;
    std::vector<MapOfPointer> maps;
};

struct Request {
    std::vector<uint32_t> seeds;
    std::vector<Buffer> buffers;
    std::vector<RequestedLaunch> launches;
};

Request read_request(const std::string& path);
// Runs every seed and writes the outputs.
void answer(const Request& request, const std::string& response_path, bool prints_counters = false);

}  // namespace emulator
