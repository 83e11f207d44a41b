#!/bin/bash
# matrix.sh OUT_DIR [FILTER]: the emulator's checks with every compiler that is here, for every set of instructions that the
# processor has, at -O1 and -O2, without and with each sanitizer; only combinations whose name contains FILTER. Each must
# find every planted fault, and no file of the emulator may call what a sanitizer watches.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
watched='U (mem(cpy|move|set|cmp|chr)|bcmp|strlen|__mem[a-z]*_chk)$'
failed=0

runs() { /lib64/ld-linux-x86-64.so.2 --help | grep -q "$1 (supported" || [ "$1" = x86-64 ]; }

check() {
    local name=$1 compiler=$2 march=$3 level=$4 sanitizer=$5 folder=$out/$1
    mkdir -p "$folder"
    if ! make -s -j"$(nproc)" -f tests/emulator/Makefile OUT="$folder" ONLY=checks CXX="$compiler" MARCH="$march" \
        LEVEL="$level" EMULATOR_LEVEL="$level" SANITIZER="$sanitizer" >"$folder/log" 2>&1; then
        echo "$name: does not compile, see $folder/log" && failed=1
    elif nm "$folder"/tests/emulator/*.cpp.o | grep -E "$watched"; then
        echo "$name: calls what sanitizers watch" && failed=1
    elif ! "$folder/runner" --check >"$folder/log" 2>&1; then
        echo "$name: wrong, see $folder/log" && failed=1
    else
        echo "$name: $(grep checked "$folder/log" | tr '\n' ' ')"
    fi
}

for compiler in g++-11 g++-12 g++-13 g++-14 clang++-14 clang++-16 clang++-19; do
    command -v "$compiler" >/dev/null || continue
    for march in x86-64 x86-64-v3 x86-64-v4; do
        runs "$march" || continue
        for level in -O1 -O2; do
            for sanitizer in "" address thread; do
                name=$compiler$level-$march${sanitizer:+-$sanitizer}
                [[ $name == *"${2:-}"* ]] && check "$name" "$compiler" "$march" "$level" "$sanitizer"
            done
        done
    done
done
exit $failed
