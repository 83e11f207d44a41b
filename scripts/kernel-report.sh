#!/usr/bin/env bash
# Builds every kernel with the real compiler and prints what each needs on each architecture; fails if any spills
# registers to memory, if the assembler serialises products of warpgroups, or if the machine code of a kernel that is
# written with them (in a .sm90.cu file) has none. nvcc is found as the build finds it (see build.rs). The machine
# code is looked at with $CUOBJDUMP, or cuobjdump beside nvcc or in the path; without, the report says so.
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

# Products of warpgroups in the machine code. The suite of instructions has kernels for others, too.
nvcc=${NVCC:-${CUDA_HOME:-${CUDA_PATH:-}}/bin/nvcc}
cuobjdump=${CUOBJDUMP:-$(dirname "$nvcc")/cuobjdump}
command -v "$cuobjdump" >/dev/null || cuobjdump=cuobjdump
if ! command -v "$cuobjdump" >/dev/null; then
    echo "machine code not looked at: there is no cuobjdump"
    exit 0
fi
for fatbin in "$out"/*.sm90.fatbin; do
    PATH=$PATH:$(dirname "$cuobjdump") "$cuobjdump" -sass "$fatbin"
done | awk '
    /Function :/ { name = $3; products[name] += 0 }
    /HGMMA/ { products[name]++ }
    END {
        for (name in products) {
            if (name ~ /^primitive_/ && name !~ /wgmma/) continue
            printf "%-56s %4d products of warpgroups\n", name, products[name] | "sort"
            kernels++
            bad += products[name] == 0
        }
        close("sort")
        printf "%d kernels with products of warpgroups, %d without any in their machine code\n", kernels, bad
        exit bad > 0 || kernels == 0
    }
'
