// Runs kernels on the host; README.md has the usage.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "checks.hpp"
#include "request.hpp"

namespace emulator {

static int usage() {
    fputs("usage: runner [--counters] REQUEST_FILE RESPONSE_FILE | --serve | --list | --check | --dump-primitives FILE\n", stderr);
    return 2;
}

static void list() {
    for (const Kernel* kernel : kernels()) printf("%s %zu %d\n", kernel->name, kernel->params_size, kernel->threads);
}

static void serve() {
    for (std::string line; std::getline(std::cin, line);) {
        size_t tab = line.find('\t');
        if (tab == std::string::npos) fail("--serve: no tab in \"%s\"", line.c_str());
        answer(read_request(line.substr(0, tab)), line.substr(tab + 1));
        std::cout << "done" << std::endl;
    }
}

#if !defined(ATTN_ADDRESS_SANITIZER) && !defined(ATTN_THREAD_SANITIZER)
static void on_bad_access(int, siginfo_t* information, void*) {
    fail("access to address %p, which is no memory", information->si_addr);
}

// On a stack of its own: a fiber's may be what overflowed.
static void report_bad_accesses() {
    static char stack[1 << 16];
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action {};
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}
#else
static void report_bad_accesses() {}
#endif

static int main(int count, char** arguments) {
    report_bad_accesses();
    std::string first = count > 1 ? arguments[1] : "";
    if (count == 4 && first == "--counters") {
        answer(read_request(arguments[2]), arguments[3], true);
    } else if (count == 3 && first == "--dump-primitives") {
        dump_primitives(arguments[2]);
    } else if (count == 3 && first == "--fault") {
        return run_fault(arguments[2]);
    } else if (count == 3) {
        answer(read_request(first), arguments[2]);
    } else if (first == "--list") {
        list();
    } else if (first == "--serve") {
        serve();
    } else if (first == "--check") {
        return check_primitives() + check_faults() ? 1 : 0;
    } else {
        return usage();
    }
    return 0;
}

}  // namespace emulator

int main(int count, char** arguments) { return emulator::main(count, arguments); }
