// In which order blocks of rows are worked on, and by which block of a grid.
//
// Heads, counted over the batch, are taken in sections of so many that the other side's rows of all of them fit in the L2
// cache. In a section the longest blocks of all heads come first.
#pragma once

#include "../ptx/index.cuh"
#include "params.sm90.cuh"

namespace attn::quadratic {

// Heads of a side whose blocks of `rows` rows are worked on.
struct Sections {
    unsigned heads, blocks, all_heads, section;
    int rows;

    DEVICE static Sections of(int64_t batch, int64_t heads, int64_t count, int rows, int section) {
        return {unsigned(heads), unsigned((count + rows - 1) / rows), unsigned(batch * heads), unsigned(section), rows};
    }

    // Heads of the section that starts with head `first`.
    DEVICE unsigned heads_from(unsigned first) const {
        return all_heads - first < section ? all_heads - first : section;
    }

    // Block `index` of the section: that of the last rows of each head come first.
    DEVICE RowBlock at(unsigned first, unsigned index) const {
        unsigned count = heads_from(first), head = first + index % count;
        return {int(head / heads), int(head % heads), int(blocks - 1 - index / count) * rows};
    }

    // Where there is a block for each.
    DEVICE RowBlock of_block(int64_t x) const {
        unsigned size = section * blocks, first = unsigned(x) / size;
        return at(first * section, unsigned(x) % size);
    }

    // The same with the first rows first.
    DEVICE RowBlock of_block_ascending(int64_t x) const {
        RowBlock block = of_block(x);
        block.first = int(blocks - 1) * rows - block.first;
        return block;
    }
};

// The blocks of rows that fall to one block of a grid of fewer. In each section the grid's blocks take turns, forwards and
// backwards alternately, so that who gets a longer one gets a shorter one next; they start where the section before ended.
class SectionWalk {
public:
    DEVICE explicit SectionWalk(const Sections& sections) : sections_(sections), place_(unsigned(ptx::block_x())) {}

    // Calls f(block) for each.
    template <class F>
    DEVICE void each(F f) {
        unsigned grid = unsigned(ptx::blocks_x());
#pragma unroll 1
        while (first_ < sections_.all_heads) {
            unsigned size = sections_.heads_from(first_) * sections_.blocks;
            unsigned index = turn_ * grid + (turn_ % 2 == 0 ? place_ : grid - 1 - place_);
            if (index < size) {
                f(sections_.at(first_, index));
                ++turn_;
            } else {
                place_ = (place_ + grid - size % grid) % grid;
                first_ += sections_.section;
                turn_ = 0;
            }
        }
    }

private:
    Sections sections_;
    unsigned place_, first_ = 0, turn_ = 0;
};

}  // namespace attn::quadratic
