// Products of warpgroups, as late or as early as the rules allow.
//
// The n-th product of each of a warpgroup's 128 threads is the same product; nobody waits for the others to issue it. It
// is computed when all have, on odd seeds, or else when a thread waits for it and no thread can go on without. Each
// thread's sums are NaN until then, or until that thread waits.
#include <cstring>

#include "block.hpp"
#include "ptx/element.cuh"

namespace emulator {

static constexpr uint32_t poison = 0xffffffff;

static uint32_t bits(float x) { return attn::ptx::bit_cast<uint32_t>(x); }

struct SumsOfThread {
    float* target;
    int64_t earlier = -1;  // product that these sums go on from; -1: what `values` holds
    bool is_delivered = false;
    float values[128];
    uint32_t a[4];
};

struct Product {
    WarpgroupProduct what;
    int posted = 0, waited = 0;  // threads that have issued it, and waited for it
    uint32_t is_done = 0;        // waited for as a generation
    bool is_noted = false;       // the race checker knows that operands were read until the end
    uint64_t tag = 0;
    SumsOfThread threads[128];
};

struct Warpgroup {
    static constexpr uint64_t most = 128;
    Product products[most];  // those under way, in turn; the race checker follows what is allocated
    uint64_t wanted = 0;  // those before it are waited for
    uint64_t first = 0;   // number of the first of them; everyone has waited for all before
    uint64_t end = 0;

    Product& at(uint64_t number) { return products[number % most]; }

    void begin(const WarpgroupProduct& what) {
        if (end - first == most) fail("wgmma: more than %d under way", int(most));
        Product& product = at(end++);
        product.what = what;
        product.posted = product.waited = 0;
        product.is_done = 0;
        product.is_noted = false;
        for (SumsOfThread& sums : product.threads) sums.earlier = -1, sums.is_delivered = false;
    }
};

static Warpgroup warpgroups[8];

void start_products() {
    for (Warpgroup& warpgroup : warpgroups) warpgroup.wanted = warpgroup.first = warpgroup.end = 0;
}

static Warpgroup& own_warpgroup() {
    if (here.threads < (here.thread / 128 + 1) * 128) fail("wgmma: the warpgroup is not whole");
    return warpgroups[size_t(here.thread / 128)];
}

// Where an element of an operand lies in shared memory; `outer` counts rows of a or columns of b.
struct Operand {
    ptrdiff_t start, panel, rows_8;
    bool is_outer;

    Operand(uint64_t descriptor, bool is_outer)
        : start(ptrdiff_t(descriptor & 0x3fff) << 4), panel(ptrdiff_t(descriptor >> 16 & 0x3fff) << 4),
          rows_8(ptrdiff_t(descriptor >> 32 & 0x3fff) << 4), is_outer(is_outer) {
        if (descriptor >> 62 != 1) fail("wgmma: a descriptor of another swizzle than that of 128 bytes");
        if (descriptor >> 49 & 7) fail("wgmma: a descriptor with a base offset");
    }

    ptrdiff_t place(int outer, int k) const {
        ptrdiff_t at = is_outer ? start + outer / 64 * panel + k / 8 * rows_8 + k % 8 * 128 + outer % 64 * 2
                                : start + outer / 8 * rows_8 + outer % 8 * 128 + k * 2;
        at ^= at >> 3 & 0x70;
        if (at < 0 || size_t(at) + 2 > block.shared_bytes) {
            fail("wgmma: an operand reaches byte %td of %zu of shared memory", at, block.shared_bytes);
        }
        return at;
    }

    // f(16 bytes of shared memory) for `count` rows or columns.
    template <class F>
    void each_chunk(int count, F f) const {
        for (int outer = 0; outer < count; outer += is_outer ? 8 : 1) {
            for (int k = 0; k < 16; k += is_outer ? 1 : 8) f(here.shared + place(outer, k));
        }
    }
};

// Tells the race checker of part `index` of `parts` of what is read.
static void note_operands(const WarpgroupProduct& what, int index, int parts, const void* line) {
#ifdef ATTN_THREAD_SANITIZER
    int chunk = 0;
    auto note = [&](const char* at) {
        if (chunk++ % parts == index) note_read(at, line);
    };
    if (!what.is_a_in_registers) Operand(what.a, what.is_a_outer).each_chunk(64, note);
    Operand(what.b, what.is_b_outer).each_chunk(what.columns, note);
#else
    (void)what, (void)index, (void)parts, (void)line;
#endif
}

template <class E>
static float element(ptrdiff_t place) {
    E x;
    memcpy(&x, here.shared + place, 2);
    return attn::ptx::to_float(x);
}

template <class E>
static void read_operands(const Product& product, float (&a)[64][16], float (&b)[16][256]) {
    const WarpgroupProduct& what = product.what;
    Operand right(what.b, what.is_b_outer);
    for (int column = 0; column < what.columns; ++column) {
        for (int k = 0; k < 16; ++k) b[k][column] = element<E>(right.place(column, k));
    }
    if (!what.is_a_in_registers) {
        Operand left(what.a, what.is_a_outer);
        for (int row = 0; row < 64; ++row) {
            for (int k = 0; k < 16; ++k) a[row][k] = element<E>(left.place(row, k));
        }
        return;
    }
    for (int thread = 0; thread < 128; ++thread) {
        E x[8];
        memcpy(x, product.threads[thread].a, 16);
        for (int i = 0; i < 8; ++i) {
            int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, k = thread % 4 * 2 + i % 2 + i / 4 * 8;
            a[row][k] = attn::ptx::to_float(x[i]);
        }
    }
}

// Register i of a thread's sums.
static int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
static int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

static void compute(Warpgroup& warpgroup, Product& product) {
    float a[64][16], b[16][256];
    static float d[64][256];
    const WarpgroupProduct& what = product.what;
    what.is_bf16 ? read_operands<attn::ptx::bf16>(product, a, b) : read_operands<attn::ptx::f16>(product, a, b);
    int count = what.columns / 2;
    for (int thread = 0; thread < 128; ++thread) {
        SumsOfThread& sums = product.threads[thread];
        const float* from = sums.earlier < 0 ? sums.values : warpgroup.at(uint64_t(sums.earlier)).threads[thread].values;
        for (int i = 0; i < count; ++i) d[row_of(thread, i)][column_of(thread, i)] = what.accumulates ? from[i] : 0;
    }
    for (int row = 0; row < 64; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < what.columns; ++column) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int thread = 0; thread < 128; ++thread) {
        SumsOfThread& sums = product.threads[thread];
        for (int i = 0; i < count; ++i) sums.values[i] = d[row_of(thread, i)][column_of(thread, i)];
    }
    product.is_done = 1;
    ++counters.products;
}

// Hands a thread its sums, or to its next product into the same.
static void deliver(Warpgroup& warpgroup, uint64_t number, int thread) {
    Product& product = warpgroup.at(number);
    SumsOfThread& sums = product.threads[thread];
    if (sums.is_delivered) return;
    sums.is_delivered = true;
    int count = product.what.columns / 2;
    for (uint64_t later = number + 1; later < warpgroup.end; ++later) {
        SumsOfThread& next = warpgroup.at(later).threads[thread];
        if (next.earlier != int64_t(number)) continue;
        next.earlier = -1;
        for (int i = 0; !warpgroup.at(later).is_done && i < count; ++i) next.values[i] = sums.values[i];
        return;
    }
    for (int i = 0; i < count; ++i) {
        if (bits(sums.target[i]) != poison) fail("wgmma: the sums were changed before the product was waited for");
        sums.target[i] = sums.values[i];
    }
}

// Computes the products before the given number that everyone has issued; false if there are none.
static bool compute_up_to(Warpgroup& warpgroup, uint64_t end) {
    bool any = false;
    for (uint64_t number = warpgroup.first; number < end && number < warpgroup.end; ++number) {
        Product& product = warpgroup.at(number);
        if (product.posted < 128) break;
        if (product.is_done) continue;
        compute(warpgroup, product);
        any = true;
    }
    return any;
}

bool complete_products() {
    bool any = false;
    for (Warpgroup& warpgroup : warpgroups) any |= compute_up_to(warpgroup, warpgroup.wanted);
    return any;
}

static void check_is_fenced(const WarpgroupProduct& what) {
    auto check = [](const char* at) { check_is_fenced(at, "wgmma"); };
    if (!what.is_a_in_registers) Operand(what.a, what.is_a_outer).each_chunk(64, check);
    Operand(what.b, what.is_b_outer).each_chunk(what.columns, check);
}

static void post(Warpgroup& warpgroup, uint64_t number, float* d, const uint32_t* a) {
    Product& product = warpgroup.at(number);
    int thread = here.thread % 128;
    SumsOfThread& sums = product.threads[thread];
    sums.target = d;
    sums.earlier = -1;
    for (uint64_t earlier = warpgroup.first; earlier < number; ++earlier) {
        const SumsOfThread& other = warpgroup.at(earlier).threads[thread];
        if (other.target == d && !other.is_delivered) sums.earlier = int64_t(earlier);
    }
    for (int i = 0; sums.earlier < 0 && i < product.what.columns / 2; ++i) {
        sums.values[i] = d[i];
        d[i] = attn::ptx::bit_cast<float>(poison);
    }
    for (int i = 0; a && i < 4; ++i) sums.a[i] = a[i];
}

void wgmma(const WarpgroupProduct& what, float* d, const uint32_t* a) {
    const void* line = __builtin_return_address(0);
    Warpgroup& warpgroup = own_warpgroup();
    ProductsOfThread& own = block.current().products;
    if (!own.is_fenced) fail("wgmma: no wgmma_fence since the start or the last wait");
    uint64_t number = own.posted++;
    if (number == warpgroup.end) {
        // Whoever is first has passed the barrier behind which all have written.
        check_is_fenced(what);
        warpgroup.begin(what);
    }
    Product& product = warpgroup.at(number);
    if (!(product.what == what)) fail("wgmma: other operands than another thread's");
    note_operands(what, here.thread % 128, 128, line);
    release(&product.tag);
    post(warpgroup, number, d, a);
    if (++product.posted < 128 || !block.copies_are_early) return;
    compute_up_to(warpgroup, number + 1);
    for (int thread = 0; thread < 128; ++thread) deliver(warpgroup, number, thread);
}

void wgmma_fence() { block.current().products.is_fenced = true; }

void wgmma_commit() {
    ProductsOfThread& own = block.current().products;
    if (own.group_count == 16) fail("wgmma_commit: more than 16 groups under way");
    own.groups[own.group_count++] = own.posted;
}

void wgmma_wait(int groups) {
    const void* line = __builtin_return_address(0);
    Warpgroup& warpgroup = own_warpgroup();
    ProductsOfThread& own = block.current().products;
    own.is_fenced = false;
    int waited = own.group_count - groups;
    if (waited <= 0) return;
    uint64_t end = own.groups[waited - 1];
    own.group_count = groups;
    for (int i = 0; i < groups; ++i) own.groups[i] = own.groups[waited + i];
    if (end > warpgroup.wanted) warpgroup.wanted = end;
    while (own.waited < end) {
        uint64_t number = own.waited;
        Product& product = warpgroup.at(number);
        while (!product.is_done) wait(Operation::wgmma_wait, product.is_done);
        if (!product.is_noted) {
            product.is_noted = true;
            note_operands(product.what, 0, 1, line);
            release(&product.tag);
        }
        acquire(&product.tag);
        deliver(warpgroup, number, here.thread % 128);
        ++own.waited;
        if (++product.waited < 128) continue;
        ++warpgroup.first;
    }
}

void check_products_are_done() {
    const ProductsOfThread& own = block.current().products;
    if (own.waited < own.posted) fail("exits with wgmma under way");
}

}  // namespace emulator
