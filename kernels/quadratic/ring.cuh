// Stages of shared memory that are filled while others are used.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/cp_async.cuh"

namespace attn::quadratic {

// `load(stage)` fills a stage with what the next step that has not been loaded needs, or does nothing past the end. With
// two stages it runs one step ahead: its copies are under way while the threads work on the other stage.
template <class Load>
class Ring {
public:
    DEVICE Ring(int stages, Load& load) : load_(load), stages_(stages) {
        if (stages_ > 1) fill(0);
    }

    // The stage of the next step, filled for all threads, which are done with the step before.
    DEVICE int next() {
        int ready = current_;
        current_ = stages_ - 1 - current_;
        if (stages_ > 1) ptx::cp_async_wait<0>();
        ptx::barrier_sync();
        fill(current_);
        if (stages_ == 1) {
            ptx::cp_async_wait<0>();
            ptx::barrier_sync();
        }
        return ready;
    }

private:
    DEVICE void fill(int stage) {
        load_(stage);
        ptx::cp_async_commit();
    }

    Load& load_;
    int stages_;
    int current_ = 0;
};

}  // namespace attn::quadratic
