// Runs each kernel of faults.cu in a process of its own and looks for the report that its fault must cause.
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "block.hpp"
#include "checks.hpp"
#include "guarded.hpp"
#include "tensor_map.hpp"

namespace emulator {

#if defined(ATTN_ADDRESS_SANITIZER)
enum { plain, address, thread, build = address };
#elif defined(ATTN_THREAD_SANITIZER)
enum { plain, address, thread, build = thread };
#else
enum { plain, address, thread, build = plain };
#endif

static constexpr const char *silent = "", *differs = "differs from its sound twin";

struct Fault {
    const char* name;
    const char* twin;        // without the fault; null if there is none
    const char* reports[3];  // without sanitizer, with AddressSanitizer, with ThreadSanitizer
};

static const char *const race = "data race", *const overrun = "heap-buffer-overflow";
static const char *const bytes = "bytes missing", *const arrivals = "more than 1 arrivals",
                  *const under_way = "exits with wgmma under way", *const waiting = "at mbarrier_wait",
                  *const others = "other operands than another thread's", *const in_flight = "tensor copies in flight",
                  *const outside = "tensor_load: byte 32768", *const unfenced = "without a fence_proxy_async";
static const Fault faults[] = {
    {"sound_barrier", nullptr, {silent, silent, silent}},
    {"sound_warp_sync", nullptr, {silent, silent, silent}},
    {"sound_reuse", nullptr, {silent, silent, silent}},
    {"sound_copy", nullptr, {silent, silent, silent}},
    {"sound_shuffles", nullptr, {silent, silent, silent}},
    {"sound_products", nullptr, {silent, silent, silent}},
    {"sound_refill", nullptr, {silent, silent, silent}},
    {"sound_matrix", nullptr, {silent, silent, silent}},
    {"fault_barrier", "sound_barrier", {differs, differs, race}},
    {"fault_warp_sync", "sound_warp_sync", {silent, silent, race}},
    {"fault_reuse", "sound_reuse", {differs, differs, race}},
    {"fault_wait", "sound_copy", {differs, differs, race}},
    {"fault_refill", "sound_refill", {differs, differs, race}},
    {"fault_matrix", "sound_matrix", {silent, silent, race}},
    {"fault_in_flight", nullptr, {"cp.async in flight", "cp.async in flight", "cp.async in flight"}},
    {"fault_copy_outside", nullptr, {"byte 2048 of 2048", "byte 2048 of 2048", "byte 2048 of 2048"}},
    {"fault_divergence", nullptr, {"divergence: at ", "divergence: at ", "divergence: at "}},
    {"fault_deadlock",
     nullptr,
     {"96 at barrier_sync, 32 at exit", "96 at barrier_sync, 32 at exit", "96 at barrier_sync"}},
    {"fault_barrier_count", nullptr, {"others wait for", "others wait for", "others wait for"}},
    {"fault_shared_overrun", nullptr, {"outside its 2048 bytes", overrun, "outside its 2048 bytes"}},
    {"fault_global_overrun", nullptr, {"outside its output", overrun, "outside its output"}},
    {"fault_blocks", nullptr, {silent, silent, race}},
    {"fault_null", nullptr, {"which is no memory", "SEGV", "SEGV"}},
    {"sound_pipeline", nullptr, {silent, silent, silent}},
    {"sound_read_tile", nullptr, {silent, silent, silent}},
    {"fault_released_by_one", "sound_read_tile", {differs, differs, race}},
    {"fault_released_unsynced", "sound_read_tile", {silent, silent, race}},
    {"sound_rewrite", "sound_pipeline", {silent, silent, silent}},
    {"fault_rewrite_unfenced", "sound_rewrite", {unfenced, unfenced, unfenced}},
    {"fault_rewrite_behind", "sound_rewrite", {unfenced, unfenced, unfenced}},
    {"fault_no_barrier", nullptr, {"no mbarrier was", "no mbarrier was", race}},
    {"fault_no_full_wait", "sound_pipeline", {arrivals, arrivals, race}},
    {"fault_no_empty_wait", "sound_pipeline", {arrivals, arrivals, arrivals}},
    {"fault_wrong_phase", "sound_pipeline", {arrivals, arrivals, race}},
    {"fault_more_bytes", nullptr, {bytes, bytes, bytes}},
    {"fault_fewer_bytes", nullptr, {bytes, bytes, bytes}},
    {"fault_no_bytes", nullptr, {in_flight, in_flight, race}},
    {"fault_early_release", "sound_pipeline", {differs, differs, race}},
    {"fault_more_arrivals", nullptr, {waiting, waiting, race}},
    {"fault_no_product_wait", nullptr, {under_way, under_way, under_way}},
    {"fault_no_fence", nullptr, {"no wgmma_fence", "no wgmma_fence", "no wgmma_fence"}},
    {"fault_touched_sums", "sound_pipeline", {differs, differs, differs}},
    {"fault_wrong_stride", "sound_pipeline", {differs, differs, differs}},
    {"fault_own_descriptor", nullptr, {others, others, others}},
    {"fault_missing_warp", nullptr, {"96 at wgmma_wait", "96 at wgmma_wait", "96 at wgmma_wait"}},
    {"fault_copy_at_exit", nullptr, {in_flight, in_flight, in_flight}},
    {"fault_no_registers", nullptr, {"256 at setmaxnreg", "256 at setmaxnreg", "256 at setmaxnreg"}},
    {"fault_tensor_copy_outside", nullptr, {outside, outside, outside}},
    {"fault_misaligned_copy", nullptr, {"misaligned", "misaligned", "misaligned"}},
};

// Of the kernels of faults_sm90.cu: products of small whole numbers.
static std::vector<char> output_with_map(const Kernel& kernel, uint32_t seed) {
    static const uint16_t numbers[4] = {0, 0x3c00, 0x4000, 0xbc00};  // 0, 1, 2, -1 as f16
    Guarded input(64 * 256 * 2), output(2 * 128 * 4);
    for (int i = 0; i < 64 * 256; ++i) memcpy(input.data() + 2 * i, numbers + (i * 7 + i / 64 * 5 + i / 4096) % 11 % 4, 2);
    struct alignas(64) {
        TensorMap map;
        char *input, *output;
    } params = {{}, input.data(), output.data()};
    params.map = {TensorMap::kMagic, input.data(), {64, 256, 1, 1}, {128, 128, 128}, {64, 64, 1, 1}, 2, 128, {}};
    run({&kernel, {2, 1, 1}, 2 * 64 * 64 * 2 + 128, &params}, seed);
    return {output.data(), output.data() + output.size()};
}

static std::vector<char> output_of(const char* name, uint32_t seed) {
    for (const Kernel* kernel : kernels()) {
        if (strcmp(kernel->name, name) != 0) continue;
        if (kernel->params_size > sizeof(TensorMap)) return output_with_map(*kernel, seed);
        Guarded input(128 * 16), output(2 * 128 * 4);
        memset(input.data(), 0x3f, input.size());
        struct {
            char *input, *output;
            int64_t count;
        } params = {input.data(), output.data(), 0};
        run({kernel, {2, 1, 1}, 2048, &params}, seed);
        if (output.overrun()) fail("%s writes outside its output", name);
        return {output.data(), output.data() + output.size()};
    }
    fail("there is no kernel %s", name);
}

int run_fault(const char* name) {
    for (const Fault& fault : faults) {
        if (strcmp(fault.name, name) != 0) continue;
        for (uint32_t seed = 0; seed < 4; ++seed) {
            std::vector<char> output = output_of(fault.name, seed);
            if (fault.twin && output != output_of(fault.twin, seed)) fail("%s %s", fault.name, differs);
        }
        // Without what else a process ends with.
        _exit(0);
    }
    fail("there is no fault %s", name);
}

// What the fault's process says on stderr. It is this program anew: of one that has as much mapped as the sanitizers need
// there may be no fork.
static std::string report_of(const Fault& fault) {
    int ends[2];
    if (pipe(ends) != 0) fail("no pipe");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    std::string words[] = {"runner", "--fault", fault.name};
    char* arguments[] = {words[0].data(), words[1].data(), words[2].data(), nullptr};
    pid_t child;
    int error = posix_spawn(&child, "/proc/self/exe", &actions, nullptr, arguments, environ);
    if (error) fail("no process for a fault: error %d", error);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    std::string text;
    char part[4096];
    for (ssize_t length; (length = read(ends[0], part, sizeof part)) > 0;) text.append(part, size_t(length));
    close(ends[0]);
    int status = -1;
    waitpid(child, &status, 0);
    if ((status == 0) != text.empty()) text += " [ended with status " + std::to_string(status) + "]";
    return text;
}

int check_faults() {
    int failed = 0, checked = 0;
    for (const Fault& fault : faults) {
        std::string report = report_of(fault), wanted = fault.reports[build];
        bool right = wanted.empty() ? report.empty() : report.find(wanted) != std::string::npos;
        // What a sanitizer finds it names by the kernel's line.
        if (wanted == race || wanted == overrun) right = right && report.find("faults") != std::string::npos;
        ++checked;
        if (right) continue;
        ++failed;
        printf("%s: expected \"%s\", got \"%s\"\n", fault.name, wanted.c_str(), report.c_str());
    }
    printf("%d faults checked, %d wrong\n", checked, failed);
    return failed;
}

}  // namespace emulator
