// Stages of shared memory that one thread fills by tensor copies while warpgroups read others.
//
// Each stage has two mbarriers: `full` ends a phase when its bytes have come, `empty` when all readers have released it.
// Who fills and who reads takes the stages in the same order, each with a Turn of its own.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/tensor_copy.cuh"
#include "../ptx/warpgroup.cuh"
#include "native.cuh"

namespace attn::tile {

// Which stage comes next, and the parity of its phase.
template <int Stages>
struct Turn {
    int stage = 0, parity = 0;

    DEVICE void advance() {
        if (++stage == Stages) stage = 0, parity ^= 1;
    }
};

// initialise(), which sets up all mbarriers of a block, by one thread for all.
template <class F>
DEVICE void initialise_barriers(F initialise) {
    if (ptx::thread() == 0) {
        initialise();
        ptx::fence_mbarrier_init();
    }
    ptx::barrier_sync();
}

// Waits for the end of the phase of this parity.
DEVICE void wait_for_phase(ptx::Mbarrier* barrier, int parity) {
    while (!ptx::mbarrier_try_wait_parity(barrier, parity)) continue;
}

template <int Stages>
struct Pipeline {
    static constexpr int kBarriers = 2 * Stages;
    ptx::Mbarrier* barriers;

    DEVICE ptx::Mbarrier* full(int stage) const { return barriers + stage; }
    DEVICE ptx::Mbarrier* empty(int stage) const { return barriers + Stages + stage; }

    // Inside of initialise_barriers. `readers` are warpgroups; `arrivals`, beside the bytes, fill a stage.
    DEVICE void initialise(int readers, int arrivals = 1) const {
#pragma unroll
        for (int stage = 0; stage < Stages; ++stage) {
            ptx::mbarrier_init(full(stage), arrivals);
            ptx::mbarrier_init(empty(stage), 4 * readers);
        }
    }

    // Waits until the stage is free; what signals the arrival of the `bytes` that the caller then copies to it.
    DEVICE ptx::Mbarrier* fill(const Turn<Stages>& turn, int bytes) const {
        wait_for_phase(empty(turn.stage), turn.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full(turn.stage), bytes);
        return full(turn.stage);
    }

    // Waits until the stage is filled.
    DEVICE void wait(const Turn<Stages>& turn) const { wait_for_phase(full(turn.stage), turn.parity); }

    // By all threads of a warpgroup, when products that read the stage have been waited for. Each warp arrives for itself:
    // neither its wait for products nor what it reads on its own says anything of the other warps.
    DEVICE void release(const Turn<Stages>& turn) const {
        ptx::warp_sync();
        if (ptx::lane() == 0) ptx::mbarrier_arrive(empty(turn.stage));
    }
};

// Copies `panels` × 64 columns of a tile of `rows` rows, from the row, head and column at which it starts; the map's box is
// 64 columns of so many rows. By one thread; `arrived` gets all bytes of the tile.
template <class Element>
DEVICE void load_panels(const SwizzledTile<Element>& into, int panels, const ptx::TensorMap& map, int64_t row,
                        int64_t head, int64_t batch, ptx::Mbarrier* arrived, int column = 0) {
    for (int panel = 0; panel < panels; ++panel) {
        const int at[4] = {column + panel * kPanelColumns, int(row), int(head), int(batch)};
        ptx::tensor_load(into.data + panel * into.rows * kPanelColumns, map, arrived, at);
    }
}

}  // namespace attn::tile
