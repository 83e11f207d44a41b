// Products of warpgroups, as late or as early as the rules allow.
//
// The n-th product of each of a warpgroup's 128 threads is the same product; nobody waits for the others to issue it. Each
// warp has its share of it, 16 of the 64 rows, which is computed when its 32 threads have issued it, on odd seeds, so that
// a warp may be far ahead of the others; or else when all 128 have, the warp waits for it and no thread can go on without.
// Each thread's sums are NaN until then, or until that thread waits. Neither orders the threads' own accesses.
#include <cstring>

#include "block.hpp"
#include "ptx/element.cuh"
#include "sums.hpp"

namespace emulator {

static constexpr uint32_t poison = 0xffffffff;

static uint32_t bits(float x) { return attn::ptx::bit_cast<uint32_t>(x); }

struct SumsOfThread {
    float* target;
    int64_t earlier;  // share that these sums go on from; -1: what `values` holds
    bool is_delivered;
    float values[128];
    uint32_t a[4];
};

// A warp's part of a product.
struct Share {
    WarpgroupProduct what;
    int posted, waited;  // threads that have issued it, and waited for it
    uint32_t is_done;    // waited for as a generation
    SumsOfThread lanes[32];
};

struct Shares {
    static constexpr uint64_t most = 128;
    Share ring[most];  // those under way, in turn; in fixed memory
    uint64_t wanted;   // those before it are waited for
    uint64_t first;    // number of the first of them; all lanes have waited for all before
    uint64_t end;

    Share& at(uint64_t number) { return ring[number % most]; }

    void begin(const WarpgroupProduct& what) {
        if (end - first == most) fail("wgmma: more than %d under way", int(most));
        Share& share = at(end++);
        share.what = what;
        share.posted = share.waited = 0;
        share.is_done = 0;
        for (SumsOfThread& sums : share.lanes) sums.earlier = -1, sums.is_delivered = false;
    }
};

// What its warps must agree on.
struct Warpgroup {
    static constexpr uint64_t most = 4096;  // that a warp may be ahead
    WarpgroupProduct products[most];
    int posted[most];  // threads
    uint64_t end;

    WarpgroupProduct& at(uint64_t number) { return products[number % most]; }

    void agree(uint64_t number, const WarpgroupProduct& what) {
        if (number == end) {
            at(end) = what;
            posted[end++ % most] = 0;
        }
        if (end - number > most) fail("wgmma: a warp is more than %d behind", int(most));
        if (!(at(number) == what)) fail("wgmma: other operands than another thread's");
        ++posted[number % most];
    }
};

static Shares shares[32];
static Warpgroup warpgroups[8];

void start_products() {
    for (Shares& warp : shares) warp.wanted = warp.first = warp.end = 0;
    for (Warpgroup& warpgroup : warpgroups) warpgroup.end = 0;
}

static Warpgroup& own_warpgroup() {
    if (here.threads < (here.thread / 128 + 1) * 128) fail("wgmma: the warpgroup is not whole");
    return warpgroups[here.thread / 128];
}

// Where 16 bytes of an operand lie in shared memory; `outer` counts rows of a or columns of b.
struct Operand {
    ptrdiff_t start, panel, rows_8;
    bool is_outer;

    Operand(uint64_t descriptor, bool is_outer)
        : start(ptrdiff_t(descriptor & 0x3fff) << 4), panel(ptrdiff_t(descriptor >> 16 & 0x3fff) << 4),
          rows_8(ptrdiff_t(descriptor >> 32 & 0x3fff) << 4), is_outer(is_outer) {
        if (descriptor >> 62 != 1) fail("wgmma: a descriptor of another swizzle than that of 128 bytes");
        if (descriptor >> 49 & 7) fail("wgmma: a descriptor with a base offset");
    }

    const char* place(int outer, int k) const {
        ptrdiff_t at = is_outer ? start + outer / 64 * panel + k / 8 * rows_8 + k % 8 * 128 + outer % 64 * 2
                                : start + outer / 8 * rows_8 + outer % 8 * 128 + k * 2;
        at ^= at >> 3 & 0x70;
        if (at < 0 || size_t(at) + 16 > block.shared_bytes) {
            fail("wgmma: an operand reaches byte %td of %zu of shared memory", at, block.shared_bytes);
        }
        return here.shared + at;
    }

    // f(8 elements in shared memory, their row or column, their k) for `count` rows or columns from `first` on; the
    // elements follow each other along the outer dimension if it lies along the 128 bytes, else along k.
    template <class F>
    void each_chunk(int first, int count, F f) const {
        for (int outer = first; outer < first + count; outer += is_outer ? 8 : 1) {
            for (int k = 0; k < 16; k += is_outer ? 1 : 8) f(place(outer, k), outer, k);
        }
    }

    // f(element, its row or column from `first` on, its k).
    template <class E, class F>
    void each(int first, int count, F f) const {
        each_chunk(first, count, [&](const char* at, int outer, int k) {
            E elements[8];
            memcpy(elements, at, 16);
            for (int i = 0; i < 8; ++i) {
                f(attn::ptx::to_float(elements[i]), outer - first + (is_outer ? i : 0), is_outer ? k : k + i);
            }
        });
    }
};

// f(16 bytes of shared memory) of all that a warp reads.
template <class F>
static void each_read_of(const WarpgroupProduct& what, int warp, F f) {
    auto visit = [&](const char* at, int, int) { f(at); };
    if (!what.is_a_in_registers) Operand(what.a, what.is_a_outer).each_chunk(warp % 4 * 16, 16, visit);
    Operand(what.b, what.is_b_outer).each_chunk(0, what.columns, visit);
}

// Tells the race checker of the running thread's part of what is read: of its warp's 32 chunks of a, and of b, which all
// four warps read, of each 128th.
static void note_operands(const WarpgroupProduct& what, const void* line) {
    if (!has_thread_sanitizer) return;
    int of_warp = what.is_a_in_registers ? 0 : 32, chunk = 0;
    each_read_of(what, here.thread / 32, [&](const char* at) {
        bool is_own = chunk < of_warp ? chunk % 32 == here.thread % 32 : (chunk - of_warp) % 128 == here.thread % 128;
        if (is_own) note_read(at, 16, line);
        ++chunk;
    });
}

template <class E>
static void read_operands(const Share& share, int warp, float (&a)[16][16], float (&b)[16][256]) {
    const WarpgroupProduct& what = share.what;
    Operand(what.b, what.is_b_outer).each<E>(0, what.columns, [&](float x, int column, int k) { b[k][column] = x; });
    if (!what.is_a_in_registers) {
        Operand left(what.a, what.is_a_outer);
        return left.each<E>(warp % 4 * 16, 16, [&](float x, int row, int k) { a[row][k] = x; });
    }
    for (int lane = 0; lane < 32; ++lane) {
        E x[8];
        memcpy(x, share.lanes[lane].a, 16);
        for (int i = 0; i < 8; ++i) {
            a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = attn::ptx::to_float(x[i]);
        }
    }
}

// Register i of a lane's sums.
static int sum_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
static int sum_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

static void compute(int warp, Share& share) {
    float a[16][16];
    alignas(32) float b[16][256], d[16][256];
    const WarpgroupProduct& what = share.what;
    what.is_bf16 ? read_operands<attn::ptx::bf16>(share, warp, a, b) : read_operands<attn::ptx::f16>(share, warp, a, b);
    int count = what.columns / 2;
    for (int lane = 0; lane < 32; ++lane) {
        const SumsOfThread& sums = share.lanes[lane];
        const float* from =
            sums.earlier < 0 ? sums.values : shares[warp].at(uint64_t(sums.earlier)).lanes[lane].values;
        for (int i = 0; i < count; ++i) d[sum_row(lane, i)][sum_column(lane, i)] = what.accumulates ? from[i] : 0;
    }
    auto at = [](float* columns) -> Row& { return *reinterpret_cast<Row*>(columns); };
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < what.columns; column += 8) {
            Row products[16];
            for (int k = 0; k < 16; ++k) products[k] = a[row][k] * at(b[k] + column);
            Row& sums = at(d[row] + column);
            sums = add_products<16, of_warpgroup.extra_bits>(sums, products);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        SumsOfThread& sums = share.lanes[lane];
        for (int i = 0; i < count; ++i) sums.values[i] = d[sum_row(lane, i)][sum_column(lane, i)];
    }
    share.is_done = 1;
    if (warp % 4 == 0) ++counters.products;
}

// Hands a lane its sums, or to its next product into the same.
static void deliver(Shares& warp, uint64_t number, int lane) {
    Share& share = warp.at(number);
    SumsOfThread& sums = share.lanes[lane];
    if (sums.is_delivered) return;
    sums.is_delivered = true;
    int count = share.what.columns / 2;
    for (uint64_t later = number + 1; later < warp.end; ++later) {
        SumsOfThread& next = warp.at(later).lanes[lane];
        if (next.earlier != int64_t(number)) continue;
        next.earlier = -1;
        for (int i = 0; !warp.at(later).is_done && i < count; ++i) next.values[i] = sums.values[i];
        return;
    }
    for (int i = 0; i < count; ++i) {
        if (bits(sums.target[i]) != poison) fail("wgmma: the sums were changed before the product was waited for");
        sums.target[i] = sums.values[i];
    }
}

// Computes what a warp waits for of the products that everyone has issued; false if there are none.
static bool complete_shares(int warp) {
    Shares& own = shares[warp];
    const Warpgroup& warpgroup = warpgroups[warp / 4];
    bool any = false;
    for (uint64_t number = own.first; number < own.wanted; ++number) {
        if (warpgroup.posted[number % Warpgroup::most] < 128) break;
        Share& share = own.at(number);
        if (share.is_done) continue;
        compute(warp, share);
        any = true;
    }
    return any;
}

// Of one warp, in the order of the elected lane, for the others to be behind.
bool complete_products() {
    int warps = here.threads / 32;
    for (int i = 0; i < warps; ++i) {
        if (complete_shares((i + block.elected) % warps)) return true;
    }
    return false;
}

static void post(Shares& warp, uint64_t number, float* d, const uint32_t* a) {
    Share& share = warp.at(number);
    int lane = here.thread % 32;
    SumsOfThread& sums = share.lanes[lane];
    sums.target = d;
    for (uint64_t earlier = warp.first; earlier < number; ++earlier) {
        const SumsOfThread& other = warp.at(earlier).lanes[lane];
        if (other.target == d && !other.is_delivered) sums.earlier = int64_t(earlier);
    }
    for (int i = 0; sums.earlier < 0 && i < share.what.columns / 2; ++i) {
        sums.values[i] = d[i];
        d[i] = attn::ptx::bit_cast<float>(poison);
    }
    for (int i = 0; a && i < 4; ++i) sums.a[i] = a[i];
    ++share.posted;
}

void wgmma(const WarpgroupProduct& what, float* d, const uint32_t* a) {
    const void* line = __builtin_return_address(0);
    ProductsOfThread& own = block.current().products;
    if (!own.is_fenced) fail("wgmma: no wgmma_fence since the start or the last wait");
    uint64_t number = own.posted++;
    own_warpgroup().agree(number, what);
    int warp = here.thread / 32;
    Shares& of_warp = shares[warp];
    if (number == of_warp.end) {
        // Whoever is first has passed the barrier behind which all have written.
        each_read_of(what, warp, [](const char* at) { check_is_fenced(at, "wgmma"); });
        of_warp.begin(what);
    }
    note_operands(what, line);
    post(of_warp, number, d, a);
    Share& share = of_warp.at(number);
    if (share.posted < 32 || !block.copies_are_early) return;
    compute(warp, share);
    for (int lane = 0; lane < 32; ++lane) deliver(of_warp, number, lane);
}

void wgmma_fence() { block.current().products.is_fenced = true; }

void wgmma_commit() {
    ProductsOfThread& own = block.current().products;
    if (own.group_count == 16) fail("wgmma_commit: more than 16 groups under way");
    own.groups[own.group_count++] = own.posted;
}

void wgmma_wait(int groups) {
    const void* line = __builtin_return_address(0);
    Shares& warp = shares[here.thread / 32];
    ProductsOfThread& own = block.current().products;
    own.is_fenced = false;
    int waited = own.group_count - groups;
    if (waited <= 0) return;
    uint64_t end = own.groups[waited - 1];
    own.group_count = groups;
    for (int i = 0; i < groups; ++i) own.groups[i] = own.groups[waited + i];
    if (end > warp.wanted) warp.wanted = end;
    for (; own.waited < end; ++own.waited) {
        uint64_t number = own.waited;
        Share& share = warp.at(number);
        while (!share.is_done) wait(Operation::wgmma_wait, share.is_done);
        note_operands(share.what, line);
        deliver(warp, number, here.thread % 32);
        if (++share.waited == 32) ++warp.first;
    }
}

void check_products_are_done() {
    const ProductsOfThread& own = block.current().products;
    if (own.waited < own.posted) fail("exits with wgmma under way");
}

void check_products_are_whole() {
    for (int i = 0; i < here.threads; ++i) {
        uint64_t posted = block.threads[i]->products.posted, all = warpgroups[i / 128].end;
        here.thread = i;
        if (posted < all) fail("exits after %lu products, others of its warpgroup after %lu", posted, all);
    }
}

}  // namespace emulator
