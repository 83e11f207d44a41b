// Expectations for kernels/primitives, computed by plain loops from the tables of the PTX ISA.
#include "expect.hpp"
#include "sums.hpp"

namespace emulator {

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Every 16-bit value of both formats, the floats halfway between neighbours and their neighbours, and random bits.
static std::vector<float> awkward_floats() {
    std::vector<float> floats = {INFINITY, -INFINITY, NAN, 3.4e38f, -0.0f, 0x1p-149f, 0x1p-127f, 1e-30f};
    for (const Format& format : formats) {
        for (size_t i = 0; i + 1 < format.values.size(); i += 5) {
            float middle = float((format.values[i] + format.values[i + 1]) / 2);
            for (float value : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)})
                floats.push_back(value);
            floats.push_back(-float(format.values[i]));
        }
    }
    while (floats.size() % 256) floats.push_back(from_bits(uint32_t(random_bits())));
    return floats;
}

static void check_conversions() {
    std::vector<float> floats = awkward_floats(), tf32, normal;
    std::vector<uint16_t> bits(65536);
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = uint16_t(i);
    const char* names[2][5] = {{"primitive_from_float_f16", "primitive_pack_f16", "primitive_to_float_f16",
                                "primitive_unpack_f16", "primitive_to_double_f16"},
                               {"primitive_from_float_bf16", "primitive_pack_bf16", "primitive_to_float_bf16",
                                "primitive_unpack_bf16", nullptr}};
    for (int i = 0; i < 2; ++i) {
        std::vector<uint16_t> narrow;
        std::vector<float> wide;
        for (float value : floats) narrow.push_back(formats[i].nearest(value));
        for (uint16_t value : bits) wide.push_back(formats[i].value(value));
        expect(names[i][0], blocks(floats.size()), floats, narrow);
        expect(names[i][1], blocks(floats.size() / 2), floats, narrow);
        expect(names[i][2], blocks(bits.size()), bits, wide);
        expect(names[i][3], blocks(bits.size() / 2), bits, wide);
        if (names[i][4]) expect(names[i][4], blocks(bits.size()), bits, std::vector<double>(wide.begin(), wide.end()));
    }
    expect("primitive_to_double_float", blocks(floats.size()), floats,
           std::vector<double>(floats.begin(), floats.end()));

    std::vector<double> doubles(floats.begin(), floats.end());
    for (double& value : doubles) value *= 1 + 0x1p-30;
    expect("primitive_from_double", blocks(doubles.size()), doubles,
           std::vector<float>(doubles.begin(), doubles.end()));

    // Beyond the normal numbers the instruction's results are not promised.
    for (float value : floats) normal.push_back(std::isnormal(value) && std::abs(value) < 3e38f ? value : 1.5f);
    for (float value : normal) {
        int exponent;
        std::frexp(value, &exponent);
        double unit = std::ldexp(1.0, exponent - 11);
        tf32.push_back(float(std::round(value / unit) * unit));
    }
    expect("primitive_round_to_tf32", blocks(normal.size()), normal, tf32);
}

static void check_index() {
    std::vector<int64_t> wanted;
    for (int64_t block = 0; block < 24; ++block) {
        for (int64_t thread = 0; thread < 96; ++thread) {
            int64_t all[10] = {thread, thread % 32, thread / 32, 96, block % 4, block / 4 % 3, block / 12, 4, 3, 2};
            wanted.insert(wanted.end(), all, all + 10);
        }
    }
    expect("primitive_index", {4, 3, 2}, std::vector<int>(1), wanted);
}

static void check_barriers() {
    const struct {
        const char* name;
        int group;
    } barriers[3] = {
        {"primitive_barrier_sync", 256}, {"primitive_barrier_sync_named", 128}, {"primitive_warp_sync", 32}};
    for (const auto& barrier : barriers) {
        std::vector<int> wanted;
        for (int i = 0; i < 3 * 256; ++i) {
            int thread = i % 256;
            wanted.push_back(thread / barrier.group * barrier.group + barrier.group - 1 - thread % barrier.group);
        }
        expect(barrier.name, {3, 1, 1}, std::vector<int>(1), wanted, 1024);
    }
}

template <class T>
static void check_shuffles(const char* exchange_xor, const char* exchange, const char* exchange_up) {
    std::vector<T> input;
    for (int i = 0; i < 64; ++i) input.push_back(T(random_bits()) / 3);
    std::vector<T> by_xor, by_lane, up;
    for (int mask : {1, 2, 4, 8, 16, 31}) {
        for (int i = 0; i < 64; ++i) by_xor.push_back(input[i / 32 * 32 + (i % 32 ^ mask)]);
    }
    for (int j = 0; j < 32; ++j) {
        for (int i = 0; i < 64; ++i) {
            by_lane.push_back(input[i / 32 * 32 + (i % 32 * j + j) % 32]);
            up.push_back(input[i % 32 < j ? i : i - j]);
        }
    }
    expect(exchange_xor, {1, 1, 1}, input, by_xor);
    expect(exchange, {1, 1, 1}, input, by_lane);
    expect(exchange_up, {1, 1, 1}, input, up);
}

static void check_copies() {
    std::vector<uint32_t> input(2 * 128 * 4), wanted(input.size());
    for (uint32_t& word : input) word = uint32_t(random_bits());
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 128; ++i) {
            for (int j = 0; j < 4; ++j) {
                uint32_t word = i % 3 == half ? 0 : input[(half * 128 + i) * 4 + j];
                wanted[(half * 128 + 127 - i) * 4 + j] = word;
            }
        }
    }
    expect("primitive_cp_async", {1, 1, 1}, input, wanted, 4096);

    const char* names[2][3] = {
        {"primitive_vector_4", "primitive_vector_8", "primitive_vector_16"},
        {"primitive_load_constant_4", "primitive_load_constant_8", "primitive_load_constant_16"}};
    for (int i = 0; i < 3; ++i) {
        for (auto& kind : names) expect(kind[i], blocks(input.size() >> i), input, input);
    }
}

static void check_ldmatrix() {
    std::vector<uint16_t> rows(32 * 8);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = uint16_t(i);
    const char* names[2][2] = {{"primitive_ldmatrix_x2", "primitive_ldmatrix_x2_trans"},
                               {"primitive_ldmatrix_x4", "primitive_ldmatrix_x4_trans"}};
    for (int i = 0; i < 4; ++i) {
        int count = i / 2 ? 4 : 2, transposed = i % 2;
        std::vector<uint16_t> wanted(32 * count * 2);
        for (int lane = 0; lane < 32; ++lane) {
            for (int matrix = 0; matrix < count; ++matrix) {
                for (int half = 0; half < 2; ++half) {
                    int row = lane / 4, column = lane % 4 * 2 + half;
                    if (transposed) std::swap(row, column);
                    wanted[(lane * count + matrix) * 2 + half] = rows[(8 * matrix + row) * 5 % 32 * 8 + column];
                }
            }
        }
        expect(names[i / 2][transposed], {1, 1, 1}, rows, wanted, 512);
    }
}

// Which element of an operand element `i` of lane `lane` is; from the figures of the section on mma.
struct Place {
    int row, column;
};

static Place place_a16(int lane, int i) {
    return {lane / 4 + (i % 4 < 2 ? 0 : 8), lane % 4 * 2 + i % 2 + (i < 4 ? 0 : 8)};
}
static Place place_b16(int lane, int i) { return {lane % 4 * 2 + i % 2 + (i < 2 ? 0 : 8), lane / 4}; }
static Place place_a8(int lane, int i) { return {lane / 4 + (i % 2 == 0 ? 0 : 8), lane % 4 + (i < 2 ? 0 : 4)}; }
static Place place_b8(int lane, int i) { return {lane % 4 + (i == 0 ? 0 : 4), lane / 4}; }
static Place place_a4(int lane, int) { return {lane / 4, lane % 4}; }
static Place place_b4(int lane, int) { return {lane % 4, lane / 4}; }
static Place place_d(int lane, int i) { return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + i % 2}; }

struct Shape {
    const char* name;
    int rows, depth, per_lane_a, per_lane_b, per_lane_d;
    Place (*a)(int, int);
    Place (*b)(int, int);
};

struct Product {
    double a[16][16] = {}, b[16][8] = {}, d[16][8] = {}, result[16][8] = {};

    double of_a(Place at) const { return a[at.row][at.column]; }
    double of_b(Place at) const { return b[at.row][at.column]; }
    double of_d(Place at) const { return d[at.row][at.column]; }
    double of_result(Place at) const { return result[at.row][at.column]; }
};

// Small whole numbers, whose sums are exact in any order.
static Product whole_numbers(const Shape& shape) {
    Product product;
    for (auto& row : product.a)
        for (double& value : row) value = below(17) - 8;
    for (auto& row : product.b)
        for (double& value : row) value = below(17) - 8;
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            double& sum = product.result[row][column];
            sum = product.d[row][column] = below(201) - 100;
            for (int k = 0; k < shape.depth; ++k) sum += product.a[row][k] * product.b[k][column];
        }
    }
    return product;
}

// ±(1 + 1.5 × 2^-24), which the nearest float to is above 1, and which tensor cores cut off; those of double do not.
static Product cut_off(bool is_double) {
    Product product;
    for (int row = 0; row < 16; ++row) {
        double sign = row % 2 ? -1 : 1;
        product.a[row][3] = sign * 0x1.8p-12;
        for (int column = 0; column < 8; ++column) {
            product.b[3][column] = 0x1p-12;
            product.d[row][column] = sign;
            product.result[row][column] = sign * (is_double ? 1 + 0x1.8p-24 : 1);
        }
    }
    return product;
}

template <class Append>
static void lay_out(const Shape& shape, const Product& product, int lane, Append append) {
    for (int i = 0; i < shape.per_lane_a; ++i) append(product.of_a(shape.a(lane, i)), true);
    for (int i = 0; i < shape.per_lane_b; ++i) append(product.of_b(shape.b(lane, i)), true);
    for (int i = 0; i < shape.per_lane_d; ++i) append(product.of_d(place_d(lane, i)), false);
}

static void check_product(const Shape& shape, int kind, const Product& product) {
    std::vector<uint16_t> input;
    std::vector<double> doubles, wanted;
    auto append = [&](double value, bool operand) {
        doubles.push_back(value);
        if (operand && kind < 2) return input.push_back(formats[kind].nearest(float(value)));
        float number = float(value);
        uint32_t bits;
        memcpy(&bits, &number, 4);
        if (operand) bits |= random_bits() & 0x1fff;  // which tf32 ignores
        input.push_back(uint16_t(bits));
        input.push_back(uint16_t(bits >> 16));
    };
    for (int lane = 0; lane < 32; ++lane) {
        lay_out(shape, product, lane, append);
        for (int i = 0; i < shape.per_lane_d; ++i) wanted.push_back(product.of_result(place_d(lane, i)));
    }
    if (kind == 3) {
        expect(shape.name, {1, 1, 1}, doubles, wanted);
    } else {
        expect(shape.name, {1, 1, 1}, input, std::vector<float>(wanted.begin(), wanted.end()));
    }
}

static void check_products() {
    const Shape shapes[4] = {{"primitive_mma_f16", 16, 16, 8, 4, 4, place_a16, place_b16},
                             {"primitive_mma_bf16", 16, 16, 8, 4, 4, place_a16, place_b16},
                             {"primitive_mma_tf32", 16, 8, 4, 2, 4, place_a8, place_b8},
                             {"primitive_mma_f64", 8, 4, 1, 1, 2, place_a4, place_b4}};
    for (int kind = 0; kind < 4; ++kind) {
        check_product(shapes[kind], kind, whole_numbers(shapes[kind]));
        if (sums_are_cut_off()) check_product(shapes[kind], kind, cut_off(kind == 3));
    }
}

// `Exact` has more digits than T.
template <class T, class Exact>
static void check_math(const char* name, Tolerance tolerance) {
    std::vector<T> input = {T(0),         T(-0.0), T(1), T(INFINITY), T(2),   T(-3),
                            T(-INFINITY), T(1),    T(1), T(1),        T(NAN), T(0),
                            T(0x1p-130),  T(1),    T(1), T(-0x1p-130), T(1),  T(1)};
    while (input.size() < 3 * 1024) input.push_back(T(below(40001) - 20000) / T(below(1000) + 251));
    std::vector<T> wanted;
    for (size_t i = 0; i < input.size(); i += 3) {
        T a = input[i], b = input[i + 1];
        Exact x = a, y = b, z = input[i + 2];
        bool a_or_b = std::isnan(b) || a > b;
        Exact all[12] = {std::exp2(x),
                         std::log2(x),
                         std::exp(x),
                         std::log(x),
                         std::tanh(x),
                         std::sqrt(x),
                         1 / std::sqrt(x),
                         std::abs(x),
                         1 / (sizeof(T) == 4 && std::abs(x) < 0x1p-126 ? x * 0 : x),  // subnormals are flushed
                         a_or_b ? x : y,
                         a_or_b && !std::isnan(b) ? y : x,
                         x * y + z};
        for (Exact value : all) wanted.push_back(T(value));
    }
    expect(name, blocks(1024), input, wanted, 0, tolerance);
}

static void all_primitives() {
    check_conversions();
    check_index();
    check_barriers();
    check_shuffles<float>("primitive_shuffle_xor_float", "primitive_shuffle_float", "primitive_shuffle_up_float");
    check_shuffles<double>("primitive_shuffle_xor_double", "primitive_shuffle_double", "primitive_shuffle_up_double");
    check_shuffles<int>("primitive_shuffle_xor_int", "primitive_shuffle_int", "primitive_shuffle_up_int");
    check_shuffles<uint32_t>("primitive_shuffle_xor_uint32", "primitive_shuffle_uint32", "primitive_shuffle_up_uint32");
    check_copies();
    check_ldmatrix();
    check_products();
    check_math<float, double>("primitive_math_float", {0x1p-21});
    check_math<double, long double>("primitive_math_double", {0x1p-50});
    all_primitives_of_sm90();
}

int check_primitives() {
    all_primitives();
    printf("%d primitives checked, %d wrong\n", checked, failed);
    return failed;
}

void dump_primitives(const char* path) {
    dumped = fopen(path, "wb");
    if (!dumped) fail("%s: cannot be written", path);
    all_primitives();
    if (fclose(dumped) != 0) fail("%s: cannot be written", path);
}

}  // namespace emulator
