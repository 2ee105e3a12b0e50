#!/usr/bin/env bash
# All that there is to ask of a GPU, in one run: are the kernels right, and how fast are they beside torch. Run it in the
# environment that ringmpi, its test extra, its cuda extra and a CUDA build of torch are installed in; the answers are
# kept, whatever fails.
#
#   tests/gpu.sh FOLDER
set -eu -o pipefail
folder=$(mkdir -p "${1:?usage: tests/gpu.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

answer() { # NAME SECONDS COMMAND...: a kernel that hangs must not take the time of the others
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    timeout --kill-after=10 "$seconds" "$@" >"$folder/$name.txt" 2>&1 || echo "   ended with code $?"
    tail -n 25 "$folder/$name.txt"
}

bench() { # NAME [OPTIONS]
    local name=$1
    shift
    answer "$name" 120 python -m ringmpi bench kernel --backend cuda --json "$folder/$name.json" "$@"
}

answer info 60 python -m ringmpi info
answer kernels 200 python -m pytest -m gpu -q -x tests/test_cuda.py
answer gradients 300 python -m pytest -m gpu -q -x tests/test_cuda_gradients.py
answer hopper 100 python -m pytest -m gpu -q -x tests/test_hopper.py
answer large 200 python -m pytest -m gpu -q tests/test_gpu.py
answer large-hopper 200 env RINGMPI_HOPPER=1 python -m pytest -m gpu -q tests/test_gpu.py

for hopper in 0 1; do
    export RINGMPI_HOPPER=$hopper
    bench "16-bit-$hopper" --dtype bfloat16 --dim 64 128 --heads 16 --shape 16384x16384
done
export RINGMPI_HOPPER=0
bench float32 --dtype float32 --dim 128 --heads 16 --shape 16384x16384 --repeat 3
bench float64 --dtype float64 --dim 128 --heads 2 --shape 16384x16384 --repeat 3
bench backward --pass backward --dtype bfloat16 --dim 64 128 --heads 16 --shape 16384x16384 --repeat 3
bench backward-float32 --pass backward --dtype float32 --dim 64 128 --heads 8 --shape 8192x8192 --repeat 3
bench state --dtype bfloat16 --dim 128 --heads 16 --mask full --shape 65536x65536 --repeat 3 --kernels ringmpi
bench decode --dtype bfloat16 float32 --dim 128 --heads 8 --kv-heads 8 --mask full --shape 1x1048576
bench grouped --dtype bfloat16 --dim 128 --heads 32 --kv-heads 8 --shape 8192x8192
