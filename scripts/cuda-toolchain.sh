#!/usr/bin/env bash
# Installs the CUDA compiler, without root and without a GPU, and prints the variables to set:
#
#     eval "$(scripts/cuda-toolchain.sh [FOLDER])"     # target/cuda-toolchain by default, about 270 MB
#
# Needs python3 with pip, and g++, which nvcc calls. A folder that is complete is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-${CARGO_TARGET_DIR:-target}/cuda-toolchain}")

# All of one release: ptxas refuses code of another, and drivers of the 580 series load nothing newer than 13.0.
packages=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    # The disassemblers read what older releases made; there are none of 13.0.
    nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
)
command -v g++ >/dev/null || { echo "nvcc needs g++" >&2; exit 1; }
stamp=$folder/packages
if [ "$(cat "$stamp" 2>/dev/null)" != "${packages[*]}" ]; then
    rm -rf "$folder/nvidia"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
        --upgrade --target "$folder" "${packages[@]}" >&2
    echo "${packages[*]}" >"$stamp"
fi
home=$folder/nvidia/cu13
"$home/bin/nvcc" --version >/dev/null

cat <<END
export CUDA_HOME=$home
export NVCC=$home/bin/nvcc
export CUDARC_CUDA_VERSION=13000
END
