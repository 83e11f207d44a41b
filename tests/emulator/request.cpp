#include "request.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

#include "banks.hpp"
#include "guarded.hpp"

namespace emulator {

// Takes numbers and bytes off the front of a file.
class Reader {
  public:
    explicit Reader(const std::string& path) : path(path) {
        std::ifstream file(path, std::ios::binary);
        if (!file) fail("%s: cannot be read", path.c_str());
        bytes.assign(std::istreambuf_iterator<char>(file), {});
    }

    template <class T = uint32_t>
    T number() {
        T value;
        memcpy(&value, take(sizeof(T)), sizeof(T));
        return value;
    }

    std::vector<char> run(uint64_t length) {
        const char* start = take(length);
        return {start, start + length};
    }

    bool at_end() const { return position == bytes.size(); }

  private:
    const char* take(uint64_t length) {
        if (length > bytes.size() - position) fail("%s: ends too early", path.c_str());
        position += length;
        return bytes.data() + position - length;
    }

    std::string path;
    std::vector<char> bytes;
    size_t position = 0;
};

static Buffer read_buffer(Reader& reader) {
    Buffer buffer;
    buffer.bytes = reader.number<uint64_t>();
    uint32_t flags = reader.number();
    buffer.output = flags & 2;
    if (flags & 1) buffer.contents = reader.run(buffer.bytes);
    return buffer;
}

static const Kernel* find_kernel(const std::string& name) {
    for (const Kernel* kernel : kernels()) {
        if (name == kernel->name) return kernel;
    }
    fail("there is no kernel %s", name.c_str());
}

// An address that goes to `bytes` of the parameters, at a multiple of `align`.
static Pointer read_pointer(Reader& reader, const RequestedLaunch& launch, const std::vector<Buffer>& buffers,
                            uint32_t bytes, uint32_t align) {
    const char* kernel = launch.kernel->name;
    Pointer pointer{};
    pointer.offset = reader.number();
    pointer.buffer = reader.number();
    pointer.buffer_offset = reader.number<uint64_t>();
    if (pointer.offset + uint64_t(bytes) > launch.params.size() || pointer.offset % align) {
        fail("%s: no %s at byte %u of its parameters", kernel, bytes > 8 ? "tensor map" : "pointer", pointer.offset);
    }
    if (pointer.buffer >= buffers.size() || pointer.buffer_offset > buffers[pointer.buffer].bytes) {
        fail("%s: byte %lu of buffer %u does not exist", kernel, pointer.buffer_offset, pointer.buffer);
    }
    return pointer;
}

static TensorMap read_map(Reader& reader) {
    TensorMap map{};
    map.magic = TensorMap::kMagic;
    map.element_bytes = reader.number();
    for (uint64_t& size : map.sizes) size = reader.number<uint64_t>();
    for (uint64_t& stride : map.strides) stride = reader.number<uint64_t>();
    for (uint32_t& size : map.box) size = reader.number();
    map.swizzle = reader.number();
    return map;
}

static RequestedLaunch read_launch(Reader& reader, const std::vector<Buffer>& buffers) {
    RequestedLaunch launch;
    std::vector<char> name = reader.run(reader.number());
    launch.kernel = find_kernel(std::string(name.begin(), name.end()));
    for (uint32_t& blocks : launch.grid) blocks = reader.number();
    uint32_t threads = reader.number();
    launch.shared_bytes = reader.number();
    launch.params = reader.run(reader.number());

    const char* kernel = launch.kernel->name;
    if (int(threads) != launch.kernel->threads)
        fail("%s has %d threads, not %u", kernel, launch.kernel->threads, threads);
    if (launch.params.size() != launch.kernel->params_size) {
        fail("%s has %zu bytes of parameters, not %zu", kernel, launch.kernel->params_size, launch.params.size());
    }
    for (uint32_t count = reader.number(); count; --count) {
        launch.pointers.push_back(read_pointer(reader, launch, buffers, 8, 8));
    }
    for (uint32_t count = reader.number(); count; --count) {
        Pointer pointer = read_pointer(reader, launch, buffers, sizeof(TensorMap), 64);
        launch.maps.push_back({pointer, read_map(reader)});
    }
    return launch;
}

Request read_request(const std::string& path) {
    Reader reader(path);
    if (reader.number() != 0x4e545441 || reader.number() != 2) fail("%s: not a request of version 2", path.c_str());
    Request request;
    request.seeds.resize(reader.number());
    for (uint32_t& seed : request.seeds) seed = reader.number();
    for (uint32_t count = reader.number(); count; --count) request.buffers.push_back(read_buffer(reader));
    for (uint32_t count = reader.number(); count; --count) {
        request.launches.push_back(read_launch(reader, request.buffers));
    }
    if (!reader.at_end()) fail("%s: more bytes than a request has", path.c_str());
    return request;
}

static void run_launch(const RequestedLaunch& launch, const std::vector<Guarded>& buffers, uint32_t seed) {
    // Aligned as the kernel's structure is, at most.
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines((launch.params.size() + 63) / 64);
    char* params = lines.data()->bytes;
    std::copy(launch.params.begin(), launch.params.end(), params);
    for (const Pointer& pointer : launch.pointers) {
        char* address = buffers[pointer.buffer].data() + pointer.buffer_offset;
        memcpy(params + pointer.offset, &address, sizeof(address));
    }
    for (const auto& [pointer, map] : launch.maps) {
        TensorMap filled = map;
        filled.address = buffers[pointer.buffer].data() + pointer.buffer_offset;
        memcpy(params + pointer.offset, &filled, sizeof(filled));
        if (const char* why = filled.refusal()) fail("kernel %s: a tensor map with %s", launch.kernel->name, why);
    }
    run({launch.kernel, {launch.grid[0], launch.grid[1], launch.grid[2]}, launch.shared_bytes, params}, seed);
    for (size_t i = 0; i < buffers.size(); ++i) {
        if (buffers[i].overrun())
            fail("kernel %s: writes outside buffer %zu of %zu bytes", launch.kernel->name, i, buffers[i].size());
    }
}

static void print_counters(const char* kernel, uint32_t seed) {
    printf("%s, seed %u: %lu mma, %lu matrices by ldmatrix, %lu bank conflicts\n", kernel, seed, counters.products,
           counters.matrices, counters.conflicts);
    if (counts_accesses) print_accesses();
}

void answer(const Request& request, const std::string& response_path, bool prints_counters) {
    std::ofstream response(response_path, std::ios::binary);
    for (uint32_t seed : request.seeds) {
        std::vector<Guarded> buffers;
        for (const Buffer& buffer : request.buffers) {
            buffers.emplace_back(buffer.bytes);
            std::copy(buffer.contents.begin(), buffer.contents.end(), buffers.back().data());
        }
        for (const RequestedLaunch& launch : request.launches) {
            run_launch(launch, buffers, seed);
            if (prints_counters) print_counters(launch.kernel->name, seed);
        }
        for (size_t i = 0; i < buffers.size(); ++i) {
            if (request.buffers[i].output) response.write(buffers[i].data(), std::streamsize(buffers[i].size()));
        }
    }
    response.close();
    if (!response) fail("%s: cannot be written", response_path.c_str());
}

}  // namespace emulator
