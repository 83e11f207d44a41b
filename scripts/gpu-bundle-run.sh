#!/usr/bin/env bash
# Runs a bundle (scripts/gpu-bundle.sh): all checks of the kernels on this machine's first usable GPU, then the benches.
#
#     run.sh [OUTPUT_FOLDER]     $OUT, or out/ beside this script, by default
#     STEPS='primitives,cases-*' run.sh            only these steps, by patterns of their names
#     STEPS=peers PEERS='--recipes A,D --minutes 8' run.sh     with options of peers/gpu.py, which goes on where it stopped
#
# Logs, JSON and a table go to the output folder. The status is 0 if everything passed, 2 if no step has a chosen name, 3 if
# there is no usable GPU.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:-${OUT:-$here/out}}")
bin=$(mktemp -d) && mkdir -p "$out" || exit 1
trap 'rm -rf "$bin"' EXIT
tar -xJf "$here/payload.tar.xz" -C "$bin" || { echo "payload.tar.xz cannot be unpacked (is xz there?)" >&2; exit 1; }
export ATTN_PRIMITIVES=$bin/primitives
: >"$out/steps.tsv"
failed=0
IFS=, read -ra chosen <<<"${STEPS:-*}"

# is_chosen NAME: whether the step is to run.
is_chosen() {
    local pattern
    for pattern in "${chosen[@]}"; do
        # shellcheck disable=SC2053
        [[ $1 == $pattern ]] && return
    done
    return 1
}

# step NAME SECONDS COMMAND...: if it is chosen, runs it within the time, keeps its output, and notes how it ended.
step() {
    local name=$1 seconds=$2 start=$SECONDS status
    is_chosen "$name" || return 0
    shift 2
    printf '== %s\n' "$name"
    (cd "$out" && timeout -k 10 "$seconds" "$@") >"$out/$name.log" 2>&1
    status=$?
    case $status in
    0) status=passed ;;
    124 | 137) status="stopped after $seconds s" ;;
    *) status="failed with status $status" ;;
    esac
    [ "$status" = passed ] || { failed=1; tail -n 15 "$out/$name.log"; }
    printf '%s\t%s\t%d s\n' "$name" "$status" $((SECONDS - start)) >>"$out/steps.tsv"
}

# What tests skip they say, and pass.
on_gpu() { step "$1" "$2" "$bin/tests" --exact --nocapture "${@:3}"; }

chosen+=(info)
step info 60 "$bin/tests" --exact --nocapture on_gpu::info
cat "$bin/commit" "$out/info.log" | grep -v -e '^running' -e '^test ' -e '^$'
if grep -q '^no GPU is used' "$out/info.log"; then
    echo "no usable GPU: nothing was run"
    printf 'all\tnot run, no usable GPU\t0 s\n' >>"$out/steps.tsv"
    exit 3
fi

checks() {
    on_gpu primitives 120 primitives::gpu
    on_gpu calls 120 gpu_calls::threads_share_a_device gpu_calls::graphs_replay
    for operation in softmax diag gau linear performer norm mixed_chunk; do
        on_gpu "cases-$operation" 900 "on_gpu::$operation"
    done
    if is_chosen cases-candle && [ -f "$bin/tests-candle" ]; then
        # Beside the driver it needs CUDA's libraries, which PyTorch, for one, brings.
        libraries=$(python3 -c 'import glob, nvidia; print(*glob.glob(nvidia.__path__[0] + "/**/lib", recursive=True), sep=":")' 2>/dev/null)
        export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries
        if "$bin/tests-candle" --list >"$out/cases-candle.log" 2>&1; then
            step cases-candle 900 "$bin/tests-candle" --exact --nocapture on_gpu::candle
        else
            printf 'cases-candle\tno libraries of CUDA 13\t0 s\n' >>"$out/steps.tsv"
        fi
    fi
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
            step "$tool" 900 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$bin/tests" --exact --nocapture on_gpu::smallest primitives::gpu
        done
    elif is_chosen memcheck; then
        printf 'compute-sanitizer\tnot there\t0 s\n' >>"$out/steps.tsv"
    fi
}

benches() {
    validate=("$bin/validate" --json "$out/validate.json")
    "$bin/validate" --help | grep -q -- --device && validate+=(--device gpu)
    step validate 600 "${validate[@]}"
    for pass in fwd bwd; do
        for dtype in f32 bf16; do
            step "length_scaling-$pass-$dtype" 600 "$bin/length_scaling" --device gpu --pass $pass --dtype $dtype \
                --out "$out/length_scaling-$pass-$dtype"
        done
    done
    CRITERION_HOME=$out/criterion step bench 900 "$bin/bench" --bench --noplot
}

# Other libraries beside ours; wheels may lie beside this script. What is absent is named in the results.
peers() {
    local python=${PYTHON:-python3} wheel
    is_chosen peers || return 0
    if "$python" -c 'import torch' 2>/dev/null; then
        for wheel in "$here"/*.whl; do
            [ -f "$wheel" ] && "$python" -m zipfile -e "$wheel" "$bin/wheels"
        done
        PYTHONPATH=$bin/wheels${PYTHONPATH:+:$PYTHONPATH} step peers 3600 "$python" "$bin/peers/gpu.py" \
            --program "$bin/peer_bench" --commit "$(cat "$bin/commit")" --out "$out/peers" ${PEERS:-}
    else
        printf 'peers\tskipped, %s has no PyTorch\t0 s\n' "$python" >>"$out/steps.tsv"
    fi
}

checks
benches
peers

if [ "$(wc -l <"$out/steps.tsv")" -eq 1 ]; then
    echo "no step is called ${STEPS:-}" >&2
    exit 2
fi
printf '\n'
column -t -s $'\t' "$out/steps.tsv" 2>/dev/null || cat "$out/steps.tsv"
exit $failed
