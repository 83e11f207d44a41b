// Sums of one warp in registers, and values per row of them. Algorithms see rows and columns, never lanes.
#pragma once

#include "../ptx/index.cuh"
#include "../ptx/math.cuh"
#include "../ptx/shuffle.cuh"

namespace attn::tile {

// Which two of the eight inner indices of a step the lanes with t = lane%4 bring to a product, the same ones on both sides:
// neighbours 2t and 2t + 1, which are the columns of a block of sums, or t and t + 4, as the instruction numbers them.
enum class Inner { neighbours, apart };

// Element i of a 16×8 block belongs to this row and column of it.
DEVICE int block_row(int i) { return ptx::lane() / 4 + 8 * (i / 2); }
DEVICE int block_column(int i) { return 2 * (ptx::lane() % 4) + i % 2; }

// x(0) and x(1), the lane's neighbours in a row of a tile whose rows are 4 banks apart: rows g and columns 2t then meet in
// banks 4g + 2t, unless half of the lanes take the second number first.
DEVICE int first_of_neighbours() { return ptx::lane() % 4 / 2; }

template <class Real, class Read>
DEVICE void read_neighbours(Real& first, Real& second, Read read) {
    int at = first_of_neighbours();
    Real x = read(at), y = read(1 - at);
    first = at ? y : x, second = at ? x : y;
}

template <class Real, class Write>
DEVICE void write_neighbours(Real first, Real second, Write write) {
    int at = first_of_neighbours();
    write(at, at ? second : first);
    write(1 - at, at ? first : second);
}

// A number for each of the 16·M rows of an accumulator; lanes that share a row hold the same number.
template <class Real, int M>
struct RowValues {
    Real value[M][2];

    DEVICE static RowValues filled(Real x) {
        RowValues rows;
#pragma unroll
        for (int m = 0; m < M; ++m) rows.value[m][0] = rows.value[m][1] = x;
        return rows;
    }

    // f(row, value&) for each of this lane's rows.
    template <class F>
    DEVICE void each(F f) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) f(16 * m + block_row(2 * half), value[m][half]);
        }
    }

    // f(value&, other's value) for each of this lane's rows.
    template <class F>
    DEVICE void with(const RowValues& other, F f) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) f(value[m][half], other.value[m][half]);
        }
    }

    // f folded over the lanes that share a row, where each holds a part of it.
    template <class F>
    DEVICE RowValues fold_lanes(F f) const {
        RowValues rows = *this;
        rows.each([f](int, Real& x) {
            x = f(x, ptx::shuffle_xor(x, 1));
            x = f(x, ptx::shuffle_xor(x, 2));
        });
        return rows;
    }

    // As `each`, but by one lane of those that share a row.
    template <class F>
    DEVICE void each_once(F f) {
        if (ptx::lane() % 4 == 0) each(f);
    }

    // Element of the row that the i-th number of block row m belongs to.
    DEVICE Real at(int m, int i) const { return value[m][i / 2]; }
};

// 16·M rows × 8·N columns of sums.
template <class Real, int M, int N>
struct Accumulator {
    Real value[M][N][4];

    DEVICE static Accumulator zero() {
        Accumulator sums;
        sums.each([](int, int, Real& x) { x = Real(0); });
        return sums;
    }

    // The columns from block `Count` on in the first ones' place.
    template <int Count>
    DEVICE void drop() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n + Count < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) value[m][n][i] = value[m][n + Count][i];
            }
        }
    }

    // Adds another to the columns from block `first` on.
    template <int Count>
    DEVICE void add(const Accumulator<Real, M, Count>& other, int first) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < Count; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) value[m][first + n][i] += other.value[m][n][i];
            }
        }
    }

    // f(row, column, value&) for each of this lane's numbers.
    template <class F>
    DEVICE void each(F f) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) f(16 * m + block_row(i), 8 * n + block_column(i), value[m][n][i]);
            }
        }
    }

    // f(row, column, value&, next value&) for each of this lane's neighbours in a row.
    template <class F>
    DEVICE void each_pair(F f) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    f(16 * m + block_row(i), 8 * n + block_column(0), value[m][n][i], value[m][n][i + 1]);
                }
            }
        }
    }

    // Takes the numbers from a row-major tile, read(row, column), and puts them into one, write(row, column, value).
    template <class Read>
    DEVICE void take(Read read) {
        each_pair([&](int row, int column, Real& x, Real& y) {
            read_neighbours(x, y, [&](int at) -> Real { return read(row, column + at); });
        });
    }

    template <class Write>
    DEVICE void put(Write write) {
        each_pair([&](int row, int column, Real& x, Real& y) {
            write_neighbours(x, y, [&](int at, Real z) { write(row, column + at, z); });
        });
    }

    // As `each`, with what RowValues::at takes: f(m, i, row, column, value&).
    template <class F>
    DEVICE void each_indexed(F f) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) f(m, i, 16 * m + block_row(i), 8 * n + block_column(i), value[m][n][i]);
            }
        }
    }

    // f(m, i, row, column, value&, other's value&)
    template <class F>
    DEVICE void with_indexed(Accumulator& other, F f) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    f(m, i, 16 * m + block_row(i), 8 * n + block_column(i), value[m][n][i], other.value[m][n][i]);
                }
            }
        }
    }

    // f(value&, row's value) for each number.
    template <class F>
    DEVICE void with_rows(const RowValues<Real, M>& rows, F f) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) f(value[m][n][i], rows.at(m, i));
            }
        }
    }

    DEVICE void scale_rows(const RowValues<Real, M>& factors) {
        with_rows(factors, [](Real& x, Real factor) { x *= factor; });
    }

    // f folded over this lane's numbers of each row; f is commutative and associative up to rounding.
    template <class F>
    DEVICE RowValues<Real, M> fold_lane(F f) const {
        RowValues<Real, M> rows;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Real x = f(value[m][0][2 * half], value[m][0][2 * half + 1]);
#pragma unroll
                for (int n = 1; n < N; ++n) x = f(x, f(value[m][n][2 * half], value[m][n][2 * half + 1]));
                rows.value[m][half] = x;
            }
        }
        return rows;
    }

    // f folded over each row and its value in `rows`, on all lanes that share it.
    template <class F>
    DEVICE RowValues<Real, M> fold_rows(RowValues<Real, M> rows, F f) const {
        RowValues<Real, M> folded = fold_lane(f).fold_lanes(f);
        rows.with(folded, [f](Real& x, Real y) { x = f(x, y); });
        return rows;
    }

    DEVICE RowValues<Real, M> row_maxima(RowValues<Real, M> rows) const {
        return fold_rows(rows, [](Real a, Real b) { return ptx::max(a, b); });
    }

    DEVICE RowValues<Real, M> row_sums(RowValues<Real, M> rows) const {
        return fold_rows(rows, [](Real a, Real b) { return a + b; });
    }
};

}  // namespace attn::tile
