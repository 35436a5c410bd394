#!/usr/bin/env bash
# What one GPU says of kvcomp in at most ten minutes, without a network: tests of the kernels on the device, attention,
# prefill, decoding; results in $OUT as lines of JSON and summary.md. Wheels that the machine lacks are taken from
# $WHEELS, if that is set. TINY=1: the same with tiny sizes, also without a GPU; FAKE=1 besides: there, with triton's
# kernels, compiled for one and never launched.
#
#   OUT=results WHEELS=wheels benchmarks/gpu/run.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-gpu-results}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
PYTHON="${PYTHON:-python3}"
SITE="$OUT/.site"
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$SITE" "$WHEELS"/*.whl || echo "run.sh: wheels were not installed"
fi
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$OUT/.triton}"
TINY_FLAG=(${TINY:+--tiny} ${FAKE:+--fake})

# seconds, name, command: cut off when it takes longer; what it wrote stays, and the next one runs
phase() {
    local seconds=$1 name=$2
    shift 2
    local began=$SECONDS
    timeout --signal=INT --kill-after=5 "$seconds" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    echo "{\"name\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - began))}" | tee -a "$OUT/phases.jsonl.txt"
}

{
    date -u
    git log -1 --format=%H 2>/dev/null
    nvidia-smi 2>/dev/null
    "$PYTHON" -c 'import torch, sys; print(sys.version); print("torch", torch.__version__)'
    "$PYTHON" -c 'import triton; print("triton", triton.__version__)'
    "$PYTHON" -c 'import transformers; print("transformers", transformers.__version__)'
} >"$OUT/env.txt" 2>&1

run() { phase "$1" "$2" "$PYTHON" benchmarks/gpu/phases.py "$2" "${TINY_FLAG[@]}"; }

run 30 copy
phase 60 host "$PYTHON" benchmarks/gpu/phases.py host
if [ -n "${TINY:-}" ]; then
    phase 60 tests "$PYTHON" -m pytest -q tests/kernels/test_triton_assembly.py
else
    WORKERS=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && WORKERS=(-n 12)
    phase 130 tests "$PYTHON" -m pytest -q "${WORKERS[@]}" --junitxml "$OUT/junit.xml" \
        tests/kernels/test_triton_{kernels,records,tokens,parts,decode,many}.py
fi
run 180 attention
run 60 prefill
run 140 decode
run 20 summary
rm -rf "$SITE" "$OUT/.triton"
