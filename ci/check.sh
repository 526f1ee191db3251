#!/usr/bin/env bash
# The whole gate: no GPU needed, 2 cores are enough. It runs in an environment that is made here and thrown away. First come README's
# two commands, copied as they stand: the second one runs all tests, on the triton that pip takes beside this machine's torch.
# A step is one line below: a title and a command.
set -euo pipefail
cd "$(dirname "$0")/.."

# The tritons: the oldest supported, the one that a CUDA build of ci/constraints.txt's torch asks for, which is what runs on GPUs, and
# the newest, which pip takes beside a CPU build, so that README's second command runs all tests on it.
oldest=3.6.0
from_torch=3.7.1
newest=3.9.0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TRITON_CACHE_DIR="$work/triton-cache"
unset TRITON_INTERPRET PYTHONPATH

step() {
    printf '\n=== %s (%d s) ===\n' "$1" "$SECONDS"
    "${@:2}"
}

# Line $1 of README's first fenced block.
readme_command() {
    local command
    command=$(awk '/^```/ { fence++; next } fence == 1' README.md | sed -n "${1}p")
    printf '$ %s\n' "$command"
    bash -euo pipefail -c "$command"
}

# What the tests interpret is recorded, for Triton's compiler to read afterwards.
tests() { PYTEST_ADDOPTS="--specialisations=$work/launches" readme_command 2; }
front_end() { python ci/specialisations.py front-end "$work/launches"; }
use_triton() { python -m pip install --quiet "triton==$1" "${@:2}"; }
# With them what depends on Triton's cache, and on what its launcher compiles, which differs from version to version.
kernel_tests() { pytest -q -n 2 tests/kernels tests/support/test_interpreter.py tests/cnnfast/test_warming.py; }
ahead_of_time() { cnnfast aot "${@/#/--arch=}"; }

python3 -m venv "$work/environment"
# shellcheck disable=SC1091
source "$work/environment/bin/activate"

step "README, first command: the demo" readme_command 1
step "It left the tree as it was" git diff --exit-code
step "README, second command: the tests" tests
step "Lint" ruff check .
step "Format" ruff format --check .
step "Types" pyright
step "Command line: check" cnnfast check cnnfast.demo.digits:DigitNet --input 1x1x8x8
step "Command line: bench" cnnfast bench resnet18 --mode infer,train --input 2x3x64x64 --seconds 0.1 --json "$work/bench.json"
step "Command line: tune" cnnfast tune cnnfast.demo.digits:DigitNet --input 64x1x8x8 --mode train --dry-run
step "Command line: freeze" cnnfast freeze cnnfast.demo.digits:DigitNet --input 1x1x8x8 --out "$work/net.cnnfast"
step "Command line: bench of augmentation" cnnfast bench augment --batch 4 --seconds 0.1
step "Command line: augment" cnnfast augment degrees=20 --count 6 --out "$work/sheet.png"
step "Command line: train" cnnfast train digits --epochs 2 --out "$work/run"
step "Command line: evaluate" cnnfast evaluate "$work/run" digits
step "Command line: bench of a file" cnnfast bench "$work/net.cnnfast" --provider eager --provider frozen --seconds 0.1

step "Triton $newest" use_triton "$newest"
step "Triton $newest: what the tests interpreted" front_end
step "Triton $newest: ahead of time" ahead_of_time sm_90
step "Triton $from_torch" use_triton "$from_torch"
step "Triton $from_torch: the kernels" kernel_tests
step "Triton $from_torch: what the tests interpreted" front_end
step "Triton $from_torch: ahead of time" ahead_of_time sm_80 sm_89 sm_90 sm_100
step "Triton $oldest" use_triton "$oldest" "numpy<2.4" # last: its interpreter asks for an older numpy
step "Triton $oldest: the kernels" kernel_tests
step "Triton $oldest: what the tests interpreted" front_end
step "Triton $oldest: ahead of time" ahead_of_time sm_90

step "All checks passed" true
