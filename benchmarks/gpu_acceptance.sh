#!/usr/bin/env bash
# What must hold on a Hopper GPU, within 8 minutes: the attention suite on the device, the kernel and the engine
# against their goals, one table at the end. Everything measured is kept under the folder that is named.
#
#   benchmarks/gpu_acceptance.sh [FOLDER]      (default: benchmarks/results/gpu-DATE)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-benchmarks/results/gpu-$(date +%F)}
python=${PYTHON:-python3}
mkdir -p "$out"
export JAX_PLATFORMS=cuda PYTHONUNBUFFERED=1

# part SECONDS NAME COMMAND...: one of the measurements, with a limit of its own so that all get their turn.
part() {
    local limit=$1 name=$2
    shift 2
    printf '\n=== %s\n' "$name"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    printf '%s %d\n' "$name" "$status" >>"$out/status.txt"
}

: >"$out/status.txt"
part 155 kernels "$python" -m benchmarks.kernels \
    --layer qwen3-8b llama-3.1-8b gpt-oss-20b deepseek-v3 'deepseek-v3 tp8' \
    --work 'decode 1 x 128k' 'decode 64 x 8k' 'prefill 8k' 'mixed 64 x 2k and 1984' \
    --json "$out/kernels.json" --plot "$out/roofline.png"
part 170 engine "$python" -m benchmarks.throughput --shape qwen3-8b --dtype bfloat16 \
    --row '1x128->128' --row '64x128->128' --repeats 2 --json "$out/engine.json"
part 150 suite "$python" -m pytest -q -p no:cacheprovider \
    tests/kernels/test_gpu.py tests/kernels/test_ragged_paged_attention.py
"$python" -m benchmarks.gpu_acceptance "$out"
