#!/usr/bin/env bash
# Builds a folder that checks and times the kernels on a machine with a GPU, without Rust or CUDA there:
#
#     scripts/gpu-bundle.sh [FOLDER]     target/gpu-bundle by default; copy it over and start FOLDER/run.sh
#
# With PyTorch there, other libraries are timed beside; wheels in the folder (fla-core, einops) are taken up.
#
# Needs Rust, g++, make, xz, and nvcc as the build finds it (build.rs; installed by cuda-toolchain.sh if there is
# none) or ATTN_KERNELS_FATBINS.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
folder=$(realpath -m "${1:-$target/gpu-bundle}")
limit=$((55 << 20)) # bytes

export CUDARC_CUDA_VERSION=${CUDARC_CUDA_VERSION:-13000}
unset ATTN_KERNELS_STUB
if [ -z "${ATTN_KERNELS_FATBINS:-}${NVCC:-}${CUDA_HOME:-}${CUDA_PATH:-}" ] && ! command -v nvcc >/dev/null; then
    toolchain=$(scripts/cuda-toolchain.sh)
    eval "$toolchain"
fi

# Paths of the programs of a build, from cargo's messages.
built() {
    cargo "$@" --profile release --no-default-features --features gpu --message-format json |
        sed -n 's/.*"reason":"compiler-artifact".*"executable":"\([^"]*\)".*/\1/p'
}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
take() { # FILE NAME
    [ -f "$1" ] || { echo "the build gave no $2" >&2; exit 1; }
    install -m 755 "$1" "$stage/$2"
    strip "$stage/$2"
}
take "$(built test --no-run --test main | tail -n 1)" tests
take "$(built bench --no-run --bench length_scaling | tail -n 1)" bench
# The programs hold the crate once more, with the kernels that are compiled already.
fatbins=$(cargo check --profile release --no-default-features --features gpu --message-format json |
    sed -n 's/.*"build-script-executed".*attn-kernels.*"out_dir":"\([^"]*\)".*/\1/p')
for program in length_scaling validate peer_bench; do
    take "$(ATTN_KERNELS_FATBINS=${ATTN_KERNELS_FATBINS:-$fatbins} built build --example "$program" | tail -n 1)" "$program"
done
scripts/candle-cuda-tests.sh "$stage/tests-candle" || echo "without the tests of candle's CUDA tensors" >&2

mkdir "$stage/peers"
cp benches/peers/*.py "$stage/peers"

# Expectations for single instructions, computed on this machine.
tests/emulator/build.sh "$target/tmp/emulator" >&2
"$target/tmp/emulator/runner" --dump-primitives "$stage/primitives"
git describe --always --dirty >"$stage/commit" 2>/dev/null || echo unknown >"$stage/commit"

rm -rf "$folder"
mkdir -p "$folder"
tar -cf - -C "$stage" . | xz -9 -T1 >"$folder/payload.tar.xz"
install -m 755 scripts/gpu-bundle-run.sh "$folder/run.sh"
size=$(du -sb "$folder" | cut -f 1)
printf '%s: %d bytes in all; unpacked:\n' "$folder" "$size"
(cd "$stage" && find . -type f -exec wc -c -- {} +)
[ "$size" -le "$limit" ] || { echo "larger than $limit bytes" >&2; exit 1; }
