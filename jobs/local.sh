#!/usr/bin/env bash
# Four ranks on this machine, from random numbers to a checked result: the twin of cpu.sbatch without Slurm.
#
#   jobs/local.sh [TOKENS]        needs ringmpi and an MPI in the environment: pip install 'ringmpi[mpich]'
set -eu -o pipefail

tokens=${1:-8192}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# BLAS pools would otherwise take every core in each rank while the file is made.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

ringmpi make random "$work/in.h5" --tokens "$tokens" --heads 8 --kv-heads 2 --dim 64
# --expect-ranks: if mpiexec belongs to another MPI than mpi4py loads, each rank would run alone, four times the job.
mpiexec -n 4 ringmpi attend "$work/in.h5" "$work/out.h5" --causal --layout striped --expect-ranks 4
ringmpi check "$work/in.h5" "$work/out.h5"
