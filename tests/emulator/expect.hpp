// What kernels of the suite of primitives must write, for the checks that compute it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "block.hpp"
#include "checks.hpp"
#include "guarded.hpp"
#include "tensor_map.hpp"

namespace emulator {

// Of all expectations so far.
inline int checked, failed;
inline FILE* dumped;  // where expectations go, if they are to be written instead of checked
inline std::mt19937 random_bits(1);

inline int below(int limit) { return int(random_bits() % uint32_t(limit)); }

// How far a result may be from its expectation, relative to it.
struct Tolerance {
    double relative;
};
constexpr Tolerance exact{0};

template <class T>
bool agree(T got, T wanted, Tolerance tolerance) {
    if (memcmp(&got, &wanted, sizeof(T)) == 0) return true;
    double g = double(got), w = double(wanted);
    return (std::isnan(g) && std::isnan(w)) || std::abs(g - w) <= tolerance.relative * std::abs(w);
}

inline void put(const void* bytes, size_t size) {
    if (fwrite(bytes, 1, size, dumped) != size) fail("--dump-primitives: cannot be written");
}

inline void put(uint32_t number) { put(&number, sizeof number); }

template <class T>
void put(const std::vector<T>& elements) {
    put(uint32_t(elements.size() * sizeof(T)));
    put(elements.data(), elements.size() * sizeof(T));
}

template <class In, class Out>
void dump(const Kernel& kernel, const std::vector<uint32_t>& grid, const std::vector<In>& input,
                 const std::vector<Out>& wanted, uint32_t shared_bytes, Tolerance tolerance,
          const TensorMap* map) {
    put(std::vector<char>(kernel.name, kernel.name + strlen(kernel.name)));
    for (uint32_t blocks : grid) put(blocks);
    put(uint32_t(kernel.threads));
    put(shared_bytes);
    put(std::is_floating_point<Out>::value ? uint32_t(sizeof(Out)) : 0);
    put(&tolerance.relative, sizeof tolerance.relative);
    put(input);
    put(wanted);
    put(uint32_t(map != nullptr));
    if (map) put(&map->sizes, sizeof(TensorMap) - offsetof(TensorMap, sizes) - sizeof(map->unused));
}

template <class In, class Out>
void expect(const char* name, std::vector<uint32_t> grid, const std::vector<In>& input,
                   const std::vector<Out>& wanted, uint32_t shared_bytes = 0, Tolerance tolerance = exact,
            const TensorMap* map = nullptr) {
    const std::vector<const Kernel*>& all = kernels();
    auto kernel = std::find_if(all.begin(), all.end(), [=](const Kernel* k) { return strcmp(k->name, name) == 0; });
    if (kernel == all.end()) fail("there is no kernel %s", name);
    if (dumped) return dump(**kernel, grid, input, wanted, shared_bytes, tolerance, map);
    size_t wrong = 0;
    for (uint32_t seed = 0; seed < 4; ++seed) {
        Guarded source(input.size() * sizeof(In)), target(wanted.size() * sizeof(Out));
        memcpy(source.data(), input.data(), source.size());
        struct alignas(128) {
            TensorMap map;
            char *source, *target;
        } params = {map ? *map : TensorMap{}, source.data(), target.data()};
        params.map.address = source.data();
        const void* given = map ? static_cast<void*>(&params) : &params.source;
        run({*kernel, {grid[0], grid[1], grid[2]}, shared_bytes, given}, seed);
        std::vector<Out> got(wanted.size());
        memcpy(got.data(), target.data(), target.size());
        for (size_t i = 0; i < got.size(); ++i) {
            if (agree(got[i], wanted[i], tolerance) || ++wrong > 1) continue;
            printf("%s, seed %u: element %zu is %.9g, not %.9g\n", name, seed, i, double(got[i]), double(wanted[i]));
        }
        if (source.overrun() || target.overrun()) fail("%s writes outside its buffers", name);
    }
    ++checked;
    failed += wrong != 0;
}

inline std::vector<uint32_t> blocks(size_t elements, uint32_t threads = 128) {
    return {uint32_t(elements / threads), 1, 1};
}

// A 16-bit format by its list of values: what bits 0, 1, 2, … mean, up to the first that is too large.
struct Format {
    std::vector<double> values;

    Format(int exponent_bits, int fraction_bits) {
        int bias = (1 << (exponent_bits - 1)) - 1,
            count = (1 << (exponent_bits + fraction_bits)) - (1 << fraction_bits);
        for (int bits = 0; bits <= count; ++bits) {
            int exponent = bits >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
            if (exponent) fraction += 1 << fraction_bits;
            values.push_back(std::ldexp(fraction, std::max(exponent, 1) - bias - fraction_bits));
        }
    }

    float value(uint16_t bits) const {
        size_t magnitude = bits & 0x7fff;
        double value = magnitude + 1 < values.size() ? values[magnitude] : INFINITY;
        if (magnitude >= values.size()) value = NAN;
        return float(bits & 0x8000 ? -value : value);
    }

    uint16_t nearest(float value) const {
        if (std::isnan(value)) return 0x7fff;
        double magnitude = std::min(double(std::abs(value)), values.back());
        size_t above = size_t(std::lower_bound(values.begin(), values.end(), magnitude) - values.begin());
        size_t bits = above;
        if (above) {
            double up = values[above] - magnitude, down = magnitude - values[above - 1];
            if (down < up || (down == up && above % 2)) bits = above - 1;
        }
        return uint16_t(bits | (std::signbit(value) ? 0x8000 : 0));
    }
};

inline const Format formats[2] = {{5, 10}, {8, 7}};  // f16, bf16

// Those of the instructions of sm_90.
void all_primitives_of_sm90();

}  // namespace emulator
