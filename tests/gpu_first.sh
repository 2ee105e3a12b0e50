#!/usr/bin/env bash
# What a GPU is asked first, in one command of nine minutes: are the kernels right, and how fast are they beside torch;
# the most important first. Each part has a limit of its own, writes what it finds when it finds it, and takes nothing
# with it when it fails or hangs. FOLDER gets five files: parts.tsv, results.jsonl, log.txt, and a page with its JSON.
#
#   tests/gpu_first.sh FOLDER [PART...]        all parts, or those that are named
#
# It runs in an uninstalled checkout, in an environment with CuPy and torch, and what else ringmpi depends on. Variables:
#   PYTHON           the Python of that environment (python3)
#   SECONDS_IN_ALL   540
#   WHEELS           a folder of wheels to take first (.whl): of mpich, say, where there is no MPI library
#   COMMIT           what the files are, where they are a copy without git
set -u -o pipefail
out=$(mkdir -p "${1:?usage: tests/gpu_first.sh FOLDER [PART...]}" && cd "$1" && pwd) || exit 2
shift
asked=" $* "
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
PATH=$(dirname "$(command -v "$python")"):$PATH        # the mpiexec of a virtual environment
ask=("$python" tests/gpu_first.py)
end=$((SECONDS + ${SECONDS_IN_ALL:-540}))
export RESULTS=$out/results.jsonl PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=4 XLA_PYTHON_CLIENT_PREALLOCATE=false     # JAX would take most of the memory
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
: >"$out/log.txt"
: >"$RESULTS"
printf 'part\tcode\tseconds\tcommand\n' >"$out/parts.tsv"

part() { # NAME LIMIT COMMAND...: within its own limit, and within what is left
    local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS code command
    shift 2
    command=$*
    command=${command//"$python"/python}
    [[ $asked == "  " || $asked == *" $name "* ]] || return 0
    if ((left < 20)); then
        printf '%s\tskipped\t0\t%s\n' "$name" "$command" | tee -a "$out/parts.tsv"
        return 0
    fi
    [ -z "${EMULATED:-}" ] || limit=$((4 * limit))            # compiling for the CPU, besides other tests
    ((limit > left - 8)) && limit=$((left - 8))
    echo "== $name (at most $limit s): $command" >>"$out/log.txt"
    timeout --kill-after=5 "$limit" "$@" >"$scratch/said" 2>&1 </dev/null
    code=$?
    cat "$scratch/said" >>"$out/log.txt"
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) "$command" | tee -a "$out/parts.tsv"
    ((code == 0)) || tail -n 3 "$scratch/said" | cut -c -300
    return 0
}

ranks() { # NAME LIMIT ARGUMENTS...: on two ranks, each with the limit, since a launcher that is killed may leave them
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" mpiexec -n 2 timeout --kill-after=5 "$limit" "${ask[@]}" "$@"
}

# pip --target would drop what mpich's wheel has under data/, its library and its launcher, so wheels are unpacked.
for wheel in "${WHEELS:-.whl}"/*.whl; do
    [ -e "$wheel" ] || continue
    "$python" -m zipfile -e "$wheel" "$scratch/wheels" 2>>"$out/log.txt"
done
[ -d "$scratch/wheels" ] && PYTHONPATH=$PYTHONPATH:$scratch/wheels
for data in "$scratch"/wheels/*.data/data; do
    [ -d "$data/bin" ] || continue
    chmod +x "$data"/bin/*
    export PATH=$data/bin:$PATH LD_LIBRARY_PATH=$data/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
done

# With the kernel for Hopper, which is the default there, and without it.
hopper=(env RINGMPI_HOPPER=1 "${ask[@]}")
common=(env RINGMPI_HOPPER=0 "${ask[@]}")
part about 40 "${ask[@]}" about

# Are they right: the common kernels, which this also compiles for the parts below, and the one for Hopper.
part prove 120 "${common[@]}" prove
part prove-hopper 60 "${hopper[@]}" prove
part masks 70 "${common[@]}" masks
part masks-hopper 25 "${hopper[@]}" masks

# How fast, beside torch.
part bfloat16 60 "${common[@]}" speed bfloat16
part bfloat16-hopper 45 "${hopper[@]}" speed bfloat16
part library 90 "${ask[@]}" library
part backward 45 "${ask[@]}" speed backward
part backward-own 45 "${ask[@]}" speed backward-own
part float32 30 "${ask[@]}" speed float32
part float64 30 "${ask[@]}" speed float64
part decode 30 "${ask[@]}" speed decode
ranks ring 100 ring

# Two ranks; arrays of torch and JAX; more keys.
ranks ranks 90 ranks
part dlpack 40 "${ask[@]}" dlpack
part decode-long 30 "${ask[@]}" speed decode-long

# In what is left of the time.
part long-hopper 25 "${hopper[@]}" long
part long 30 "${common[@]}" long
part memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 1 "${ask[@]}" proof bfloat16 64 64 plain forward
# The first five launches are those of the self-test.
part ncu 45 ncu --clock-control none --set basic --section WarpStateStats --section MemoryWorkloadAnalysis \
    --kernel-name regex:accumulate --launch-skip 5 --launch-count 1 \
    "${hopper[@]}" speed bfloat16 --kernels ringmpi --dim 128 --mask full --repeat 1

"$python" tests/gpu_page.py "$out"
exit 0
