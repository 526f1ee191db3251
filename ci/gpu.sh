#!/usr/bin/env bash
# Everything worth doing when a GPU is at hand, in one call: correctness, the demo at full size in every dtype,
# the network and its layers against the strongest baselines, a small network tuned. Results are files in $OUT, by default
# benchmarks/results/<gpu>. Needs no installation: PYTHONPATH is set here.
#     ci/gpu.sh                  # all of it: 17 minutes at most
#     ci/gpu.sh tests layers     # these parts of it
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels" PYTHONUNBUFFERED=1

parts=(tests demo bench layers tune)
wanted=("$@")
[ $# -gt 0 ] || wanted=("${parts[@]}")
for part in "${wanted[@]}"; do
    [[ " ${parts[*]} " == *" $part "* ]] || { echo "$0: $part is none of: ${parts[*]}" >&2; exit 2; }
done

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
OUT=${OUT:-benchmarks/results/$gpu}
mkdir -p "$OUT"
failed=0

run() { # part, seconds, command
    local part=$1 seconds=$2
    shift 2
    [[ " ${wanted[*]} " == *" $part "* ]] || return 0
    printf '\n=== %s ===\n' "$*"
    timeout "$seconds" "$@" 2>&1 | tee "$OUT/$part.log" | tail -n 40 || { failed=1; echo "FAILED or out of time: $*"; }
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv | tee "$OUT/gpu.csv"
run tests 240 python3 -m pytest -q -n 8 -m "not compiled" tests
run demo 120 python3 -m cnnfast demo --out "$OUT/demo"
# Without max-autotune, which alone compiles for minutes: `cnnfast bench` has it, at every batch.
providers=(--provider eager --provider eager-graph --provider compile --provider cudnn-fused --provider cudnn-graph --provider nchw)
providers+=(--provider cnnfast --provider cnnfast-graph --provider cnnfast-kernels --provider cnnfast-compile)
run bench 300 python3 -m cnnfast bench resnet50 --mode infer,train --batch 32 --seconds 0.5 "${providers[@]}" \
    --json "$OUT/bench.json" --pictures "$OUT/bench"
run layers 200 python3 -m cnnfast bench --layers --seconds 0.05 --json "$OUT/layers.json" --pictures "$OUT/layers"
# Last: what is above shall not run by the table that this writes.
run tune 120 python3 -m cnnfast tune cnnfast.demo.digits:DigitNet --input 256x1x8x8 --mode train --json "$OUT/tune.json"
exit $failed
