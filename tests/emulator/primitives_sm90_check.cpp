// Expectations for kernels/primitives/primitives.sm90.cu, by plain loops from the tables of the PTX ISA.
#include "expect.hpp"
#include "sums.hpp"

namespace emulator {

static void check_synchronisation() {
    std::vector<int> phases, arrivals, ones(128, 1), threads;
    for (int i = 0; i < 3 * 256; ++i) phases.push_back((255 - i % 256) * (i / 256 + 1));
    for (int i = 0; i < 128; ++i) arrivals.push_back(127 - i);
    for (int i = 0; i < 384; ++i) threads.push_back(i);
    expect("primitive_mbarrier", {1, 1, 1}, std::vector<int>(1), phases, 2048);
    expect("primitive_barrier_arrive", {1, 1, 1}, std::vector<int>(1), arrivals, 512);
    expect("primitive_elect", {1, 1, 1}, std::vector<int>(1), ones, 128);
    expect("primitive_setmaxnreg", {1, 1, 1}, std::vector<int>(1), threads);
}

static void check_stmatrix() {
    for (bool transposed : {false, true}) {
        std::vector<uint16_t> registers(32 * 8), rows(32 * 8);
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 8; ++i) {
                int row = lane / 4, column = lane % 4 * 2 + i % 2;
                if (transposed) std::swap(row, column);
                uint16_t value = uint16_t(random_bits());
                registers[lane * 8 + i] = value;
                rows[(8 * (i / 2) + row) * 5 % 32 * 8 + column] = value;
            }
        }
        expect(transposed ? "primitive_stmatrix_x4_trans" : "primitive_stmatrix_x4", {1, 1, 1}, registers, rows, 512);
    }
}

// A tensor of 70×37×3×2 elements with gaps between rows, after the coordinates of the boxes.
static void check_tensor_load() {
    const int sizes[4] = {70, 37, 3, 2}, box[4] = {64, 16, 2, 1}, strides[4] = {1, 80, 37 * 80 + 8, 3 * (37 * 80 + 8) + 24};
    const int starts[4][4] = {{0, 0, 0, 0}, {64, 30, 1, 1}, {-3, -5, -1, 0}, {16, 16, 2, 2}};
    // The kernel reads the coordinates from the tensor's first bytes.
    std::vector<uint16_t> tensor(size_t(2 * strides[3]));
    for (uint16_t& element : tensor) element = uint16_t(random_bits());
    memcpy(tensor.data(), starts, sizeof(starts));
    std::vector<uint16_t> wanted;
    for (const auto& start : starts) {
        std::vector<uint16_t> shared(64 * 16 * 2);
        for (int i = 0; i < 64 * 16 * 2; ++i) {
            int place[4] = {i % 64, i / 64 % 16, i / 64 / 16, 0}, at = 0;
            bool inside = true;
            for (int axis = 0; axis < 4; ++axis) {
                int index = start[axis] + place[axis];
                inside = inside && index >= 0 && index < sizes[axis];
                at += index * strides[axis];
            }
            // The swizzle of 128 bytes: of the address, bits 4 to 6 are changed by bits 7 to 9.
            int address = 2 * i;
            shared[size_t((address ^ (address >> 7 & 7) << 4) / 2)] = inside ? tensor[size_t(at)] : 0;
        }
        wanted.insert(wanted.end(), shared.begin(), shared.end());
    }
    TensorMap map{};
    map.magic = TensorMap::kMagic;
    for (int axis = 0; axis < 4; ++axis) {
        map.sizes[axis] = uint64_t(sizes[axis]);
        map.box[axis] = uint32_t(box[axis]);
        if (axis) map.strides[axis - 1] = uint64_t(2 * strides[axis]);
    }
    map.element_bytes = 2;
    map.swizzle = 128;
    expect("primitive_tensor_load", {1, 1, 1}, tensor, wanted, 4096 + 128, exact, &map);
}

// Byte of shared memory, from the operand's start, of an element of an operand whose inner dimension has 64 elements: in
// panels of 64 elements of 128 bytes, along the inner dimension or along the outer one, in which case they lie one after
// the other; in units of 8 rows of 128 bytes whose 16-byte parts are exchanged.
static size_t place_in_shared(bool is_outer, int outer, int k) {
    int row = is_outer ? k : outer, column = is_outer ? outer % 64 : k, panel = is_outer ? outer / 64 : 0;
    int rows = is_outer ? 64 : 0;
    return size_t((panel * rows + row) * 128 + ((column / 8 ^ row % 8) * 8 + column % 8) * 2);
}

struct WarpgroupShape {
    const char* name;
    int format, columns;  // of `formats`
    bool is_a_in_registers, is_a_outer, is_b_outer;
};

// Row and k of element i of a thread's part of a, column of element i of its part of d; figures of the section on wgmma.
static int a_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2 ? 8 : 0); }
static int a_k(int thread, int i) { return thread % 4 * 2 + i % 2 + (i / 4 ? 8 : 0); }
static int d_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i % 4 / 2 ? 8 : 0); }
static int d_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Of small whole numbers, whose sums are exact; or of what is cut off: 1 + 1.5 × 2^-24, of which the first is a product of
// the first instruction and the second one of the second.
static void check_product(const WarpgroupShape& shape, bool is_cut_off) {
    int n = shape.columns;
    float a[64][64] = {};
    std::vector<float> b(size_t(64 * n));
    auto whole = [=] { return is_cut_off ? 0 : float(below(17) - 8); };
    for (auto& row : a)
        for (float& value : row) value = whole();
    for (float& value : b) value = whole();
    for (int i = 0; is_cut_off && i < 64; ++i) a[i][0] = 1, a[i][20] = 0x1.8p-12f;
    for (int i = 0; is_cut_off && i < n; ++i) b[size_t(i)] = 1, b[size_t(20 * n + i)] = 0x1p-12f;
    const Format& format = formats[shape.format];
    std::vector<uint16_t> of_a(64 * 64), of_b(size_t((n + 63) / 64 * 64 * 64));
    for (int k = 0; k < 64; ++k) {
        for (int row = 0; row < 64; ++row) {
            of_a[place_in_shared(shape.is_a_outer, row, k) / 2] = format.nearest(a[row][k]);
        }
        for (int column = 0; column < n; ++column) {
            of_b[place_in_shared(shape.is_b_outer, column, k) / 2] = format.nearest(b[size_t(k * n + column)]);
        }
    }
    std::vector<uint16_t> input = of_a;
    input.insert(input.end(), of_b.begin(), of_b.end());
    if (shape.is_a_in_registers) {
        input = of_b;
        for (int i = 0; i < 4 * 128 * 8; ++i) {
            int step = i / 1024, thread = i / 8 % 128;
            input.push_back(format.nearest(a[a_row(thread, i % 8)][16 * step + a_k(thread, i % 8)]));
        }
    }
    std::vector<float> wanted;
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < n / 2; ++i) {
            float sum = shape.is_a_in_registers ? 0 : float(thread % 7 - i % 5);
            for (int k = 0; k < (is_cut_off ? 16 : 64); ++k) sum += a[d_row(thread, i)][k] * b[size_t(k * n + d_column(thread, i))];
            wanted.push_back(sum);
        }
    }
    expect(shape.name, {1, 1, 1}, input, wanted, uint32_t((of_a.size() + of_b.size()) * 2));
}

void all_primitives_of_sm90() {
    check_synchronisation();
    check_stmatrix();
    check_tensor_load();
    const WarpgroupShape shapes[] = {{"primitive_wgmma_bf16_inner_inner_64", 1, 64, false, false, false},
                                     {"primitive_wgmma_f16_inner_outer_128", 0, 128, false, false, true},
                                     {"primitive_wgmma_bf16_outer_outer_192", 1, 192, false, true, true},
                                     {"primitive_wgmma_f16_outer_inner_80", 0, 80, false, true, false},
                                     {"primitive_wgmma_bf16_registers_outer_64", 1, 64, true, false, true},
                                     {"primitive_wgmma_f16_registers_outer_256", 0, 256, true, false, true},
                                     {"primitive_wgmma_bf16_registers_inner_176", 1, 176, true, false, false}};
    for (const WarpgroupShape& shape : shapes) check_product(shape, false);
    for (const WarpgroupShape& shape : shapes) {
        if (shape.is_a_in_registers && sums_are_cut_off()) check_product(shape, true);
    }
}

}  // namespace emulator
