#!/usr/bin/env bash
# Everything worth doing while a GPU is at hand for fifteen minutes: that the kernels are right there, how fast networks and layers are, and
# rows of measured tiles. Needs no installation. ci/visit/ does the work.
#     ci/gpu.sh                        # all parts: twelve minutes at most
#     ci/gpu.sh smoke tests            # these parts
#     ci/gpu.sh --plan                 # what each part will take; needs no GPU
#     ci/gpu.sh --recorded --out DIR   # all of it as far as a machine without a GPU goes
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
unset TRITON_INTERPRET
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec python3 -m ci.visit "$@"
