"""Smooth a field on a globe by attention over each point's neighbourhood, weighted by area.

    mpiexec -n 2 python docs/examples/globe.py --shape 61x120 --window 4,8

Points are those of a latitude-longitude grid, poles included, flattened in C order and dealt out in bands of latitude.
Each sees a window around it that goes round the globe, and counts a neighbour by how alike they are and by the area
that it stands for: near the poles points lie close together. --shape 721x1440 --window 20,40 is a quarter of a degree.
"""

import argparse
import time

import numpy as np
from mpi4py import MPI

import ringmpi

DIM = 64


def numbers(separator):
    return lambda text: tuple(int(part) for part in text.split(separator))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shape", type=numbers("x"), default=(61, 120), help="latitudes x longitudes (default: 61x120)")
parser.add_argument("--window", type=numbers(","), default=(4, 8), help="points on either side (default: 4,8)")
arguments = parser.parse_args()
comm = MPI.COMM_WORLD
rows, columns = arguments.shape

# This rank's points: as equal bands as there can be.
first, last = (rows * number // comm.size * columns for number in (comm.rank, comm.rank + 1))
latitude, longitude = np.divmod(np.arange(first, last), columns)
latitude = np.pi * (latitude / (rows - 1) - 0.5)
longitude = 2 * np.pi * longitude / columns
area = np.cos(latitude) + 1e-3                        # of a point, up to a factor; a pole has a little too

# A field with a front, and noise on it; features by which points are alike, half of them the field's own.
rng = np.random.default_rng(comm.rank)
field = np.tanh(8 * np.sin(latitude - 0.3 * np.cos(2 * longitude))) + 0.3 * rng.standard_normal(len(latitude))
directions = np.random.default_rng(0).standard_normal((4, DIM // 2))
where = np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude),
                  field], axis=1) @ directions
features = np.concatenate([np.cos(where), np.sin(where)], axis=1).astype(np.float32)[:, None]       # (points, 1, dim)
values = np.stack([field, np.ones_like(field)], axis=1).astype(np.float32)[:, None]                 # (points, 1, 2)

mask = ringmpi.Grid(arguments.shape, window=arguments.window, periodic=(False, True))
with ringmpi.RingAttention(comm, mask=mask, scale=0.5) as attention:
    options = {"key_bias": np.log(area).astype(np.float32)}
    attention(features, features, values, **options)               # compiles kernels, the first time
    comm.Barrier()
    start = time.perf_counter()
    smooth = attention(features, features, values, **options)[:, 0]
    seconds = comm.allreduce(time.perf_counter() - start, MPI.MAX)
    sent, pairs = comm.allreduce(attention.trace.bytes_sent), comm.allreduce(attention.trace.pairs)

# An average keeps what is constant, and does away with noise.
assert np.abs(smooth[:, 1] - 1).max(initial=0) < 1e-5
rough, smoothed = (comm.allreduce(float((np.diff(x) ** 2).sum())) for x in (field, smooth[:, 0]))
halo = 2 * (comm.size - 1) * arguments.window[0] * columns * (DIM + 2) * 4
if comm.rank == 0:
    print(f"{rows} x {columns} points on {comm.size} ranks: {pairs / 1e6:.1f} million pairs in {seconds:.2f} s, "
          f"{sent / 2**20:.2f} MiB sent for a halo of {halo / 2**20:.2f} MiB")
    print(f"differences between neighbours, squared: {rough:.0f} before, {smoothed:.0f} after")
