#!/usr/bin/env bash
# Builds the tests of candle's CUDA tensors on a machine with nvcc alone, without CUDA's libraries or a driver:
#
#     scripts/candle-cuda-tests.sh FILE     the program; it starts where libcuda, libcublas, libcurand … of CUDA 13 are
#
# nvcc is found as the build finds it (build.rs); CUDARC_CUDA_VERSION as cuda-toolchain.sh prints it.
set -euo pipefail
file=$(realpath -m "$1")
cd "$(dirname "$0")/.."
nvcc=${NVCC:-${CUDA_HOME:-${CUDA_PATH:-}}/bin/nvcc}
nvcc=$(command -v "$nvcc" || command -v nvcc) || { echo "candle's kernels need nvcc" >&2; exit 1; }
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

# candle's kernels for quantised layers take ten minutes, and no test calls them.
touch "$stage/empty.cu"
cat >"$stage/nvcc" <<END
#!/usr/bin/env bash
arguments=()
for argument; do
    case \$argument in */moe_*.cu | */mmvq_*.cu | */mmq_*.cu) argument=$stage/empty.cu ;; esac
    arguments+=("\$argument")
done
exec "$nvcc" "\${arguments[@]}"
END
chmod +x "$stage/nvcc"

# Libraries that only say their names; their functions are looked up when first called.
link="-Clink-arg=-Wl,--unresolved-symbols=ignore-all,-z,lazy,--no-as-needed"
for name in cuda.so.1 cublas.so.13 cublasLt.so.13 curand.so.10 nvrtc.so.13 cudart.so.13; do
    cc -shared -x c /dev/null -Wl,-soname,"lib$name" -o "$stage/lib${name%%.*}.so"
    link+=" -Clink-arg=-l${name%%.*}"
done
export NVCC=$stage/nvcc CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
# shellcheck disable=SC2086
built=$(cargo rustc --profile release --features cuda --test main --message-format json -- \
    -L "native=$stage" -C relro-level=partial $link |
    sed -n 's/.*"reason":"compiler-artifact".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[ -f "$built" ] || { echo "the build gave no program" >&2; exit 1; }
install -m 755 "$built" "$file"
strip "$file"
