#!/usr/bin/env bash
# Stands in for nvcc where Rust code for CUDA is to be checked but not run: says what the build scripts of dependencies
# ask for, and leaves an empty file wherever an output is expected. Nothing that it leaves can be linked or loaded.
set -euo pipefail
case " $* " in
*" --version "*)
    printf '%s\n' "nvcc: NVIDIA (R) Cuda compiler driver" "Copyright (c) NVIDIA Corporation" "Built without a compiler" \
        "Cuda compilation tools, release 13.0, V13.0.88"
    ;;
*" --list-gpu-code "*) printf 'sm_%s\n' 75 80 86 89 90 100 120 ;;
*)
    while [ $# -gt 0 ]; do
        case $1 in
        -o | --output-file) touch "$2" ;;
        --output-directory) folder=$2 ;;
        *.cu) sources+=("$1") ;;
        esac
        shift
    done
    for source in ${folder:+"${sources[@]}"}; do touch "$folder/$(basename "$source" .cu).ptx"; done
    ;;
esac
