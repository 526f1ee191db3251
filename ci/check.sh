#!/usr/bin/env bash
# The whole gate: no GPU needed, 2 cores are enough. Every step runs in an environment made here and thrown away.
#   1. README's two commands, copied as they stand: the demo, then the tests on the newest triton
#   2. lint and types
#   3. every kernel and tile compiled ahead of time for four GPUs
#   4. the kernels' tests, and sm_90 ahead of time, on the oldest triton supported
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TRITON_CACHE_DIR="$work/triton-cache"
unset TRITON_INTERPRET PYTHONPATH

step() { printf '\n=== %s (%d s) ===\n' "$1" "$SECONDS"; }

# The README's commands are the lines of its first fenced block.
readme_command() { awk '/^```/ { fence++; next } fence == 1' README.md | sed -n "${1}p"; }

step "README, first command: the demo"
python3 -m venv "$work/environment"
# shellcheck disable=SC1091
source "$work/environment/bin/activate"
demo=$(readme_command 1)
tests=$(readme_command 2)
printf '$ %s\n' "$demo"
bash -euo pipefail -c "$demo"
git diff --exit-code

step "README, second command: the tests"
printf '$ %s\n' "$tests"
bash -euo pipefail -c "$tests"

step "Lint and types"
ruff check .
ruff format --check .
pyright

step "Command line"
for command in "" demo check bench tune info aot; do
    cnnfast $command --help >"$work/help"
done
cnnfast check cnnfast.demo.digits:DigitNet --input 1x1x8x8
cnnfast bench resnet18 --mode infer,train --input 2x3x64x64 --seconds 0.1 --json "$work/bench.json"
cnnfast tune cnnfast.demo.digits:DigitNet --input 64x1x8x8 --mode train --dry-run

step "Ahead of time, newest triton: sm_80 sm_89 sm_90 sm_100"
cnnfast aot --arch sm_80 --arch sm_89 --arch sm_90 --arch sm_100 --json "$work/aot.json"

step "The kernels on triton 3.6.0"
python -m pip install --quiet "triton==3.6.0" "numpy<2.4"
pytest -q -n 2 tests/kernels tests/test_interpreter.py
cnnfast aot --arch sm_90 --json "$work/aot-oldest.json"

step "All checks passed"
