// Runs each kernel of faults.cu in a process of its own and looks for the report that its fault must cause.
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

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
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
};

static std::vector<char> output_of(const char* name, uint32_t seed) {
    for (const Kernel* kernel : kernels()) {
        if (strcmp(kernel->name, name) != 0) continue;
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

static void run_seeds(const Fault& fault) {
    for (uint32_t seed = 0; seed < 4; ++seed) {
        std::vector<char> output = output_of(fault.name, seed);
        if (fault.twin && output != output_of(fault.twin, seed)) fail("%s %s", fault.name, differs);
    }
}

// What the fault's process says on stderr.
static std::string report_of(const Fault& fault) {
    int ends[2];
    fflush(nullptr);
    if (pipe(ends) != 0) fail("no pipe");
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        run_seeds(fault);
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char part[4096];
    for (ssize_t length; (length = read(ends[0], part, sizeof part)) > 0;) text.append(part, size_t(length));
    close(ends[0]);
    int status;
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
        if (wanted == race || wanted == overrun) right = right && report.find("faults.cu:") != std::string::npos;
        ++checked;
        if (right) continue;
        ++failed;
        printf("%s: expected \"%s\", got \"%s\"\n", fault.name, wanted.c_str(), report.c_str());
    }
    printf("%d faults checked, %d wrong\n", checked, failed);
    return failed;
}

}  // namespace emulator
