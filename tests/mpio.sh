#!/usr/bin/env bash
# Builds an h5py with MPI beside Debian's HDF5 and MPICH, some minutes, and runs the tests of --output-driver mpio with it.
#
#   tests/mpio.sh FOLDER       an empty or new folder for the environment; as root it installs what is missing
#
# It needs libhdf5-mpich-dev and mpich of Debian or Ubuntu. mpi4py's wheels look for another name than Debian's MPICH has.
set -eu -o pipefail
folder=$(mkdir -p "${1:?usage: tests/mpio.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
if [ ! -d /usr/include/hdf5/mpich ] || ! command -v mpiexec.mpich >/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "install libhdf5-mpich-dev and mpich first" >&2; exit 1; }
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends libhdf5-mpich-dev mpich gcc
fi
libraries=$(dirname "$(find /usr/lib -name libmpich.so.12 -print -quit)")
mkdir -p "$folder/mpi"
ln -sf "$libraries/libmpich.so.12" "$folder/mpi/libmpi.so.12"
export LD_LIBRARY_PATH=$folder/mpi

if [ ! -x "$folder/venv/bin/python" ]; then
    python3 -m venv "$folder/venv"
    # Cython 3 and mpi4py first: with build isolation pip would compile mpi4py from source.
    "$folder/venv/bin/pip" install -q 'setuptools>=80' wheel Cython pkgconfig numpy mpi4py numba ml_dtypes threadpoolctl \
        tqdm pytest pytest-mpi pytest-xdist hypothesis psutil
    CC=mpicc.mpich HDF5_MPI=ON HDF5_INCLUDEDIR=/usr/include/hdf5/mpich HDF5_LIBDIR=$libraries/hdf5/mpich \
        "$folder/venv/bin/pip" install -q --no-cache-dir --no-build-isolation --no-binary=h5py --no-deps h5py
    printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v mpiexec.mpich)" >"$folder/venv/bin/mpiexec"
    chmod +x "$folder/venv/bin/mpiexec"
fi
"$folder/venv/bin/python" -m pytest -n 0 -p no:cacheprovider tests/test_mpio.py tests/test_shards.py
