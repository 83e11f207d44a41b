#!/usr/bin/env bash
# Builds every kernel with the real compiler and prints what each needs on each architecture; fails if any spills
# registers to memory. nvcc is found as the build finds it (see build/main.rs).
#
#     scripts/kernel-report.sh [FOLDER]     FOLDER gets a copy of the fatbins, for ATTN_KERNELS_FATBINS
set -euo pipefail
cd "$(dirname "$0")/.."
unset ATTN_KERNELS_STUB ATTN_KERNELS_FATBINS

# The build says where it has put fatbins and the assembler's logs.
messages=$(cargo check --release --no-default-features --features gpu --message-format json)
out=$(sed -n 's/.*"build-script-executed".*attn-kernels.*"out_dir":"\([^"]*\)".*/\1/p' <<<"$messages")
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    cp "$out"/*.fatbin "$out/stamp" "$1"
fi

cat "$out"/*.log | awk '
    /Compiling entry function/ { split($0, quoted, "\047"); name = quoted[2]; architecture = quoted[4] }
    /bytes stack frame/ { stack = $1; spills = $5 + $9 }
    /Used [0-9]+ registers/ {
        for (i = 1; i < NF; i++) if ($i == "Used") registers = $(i + 1)
        printf "%-56s %-8s %4d registers %6d bytes of stack %6d bytes spilled\n", name, architecture, registers, stack, spills | "sort"
        kernels++
        bad += spills > 0
    }
    /C7510|wgmma serialized/ { print; bad++ }
    END {
        close("sort")
        printf "%d compilations, %d with spills or serialised products\n", kernels, bad
        exit bad > 0 || kernels == 0
    }
'
