#!/bin/sh
# build.sh OUT_DIR [address|thread|counters|""] [checks]: compiles what changed of kernels/ and the emulator into
# OUT_DIR/runner; with `checks` only the kernels that --check runs.
set -e
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
exec make --no-print-directory -f tests/emulator/Makefile OUT="$out" SANITIZER="$2" ONLY="$3"
