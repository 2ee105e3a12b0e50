"""Kernel regression of a field from scattered observations, in float64: cross-attention with few queries or many.

    mpiexec -n 3 python docs/examples/regression.py --observations 20000 --points 5000

The estimate of Nadaraya and Watson (1964) is an average of observations y_j at x_j with weights exp(-|x - x_j|² / 2h²).
The exponent is x·x_j / h² - |x_j|² / 2h², but for what all weights of a point x share: a score, and a bias for each
key. So it is attention with queries x, keys x_j, values y_j and scale 1 / h², exact and in memory that grows with
neither number squared. Observations stay on the rank that has them, however many that are.
"""

import argparse

import numpy as np
from mpi4py import MPI

import ringmpi

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--observations", type=int, default=20000, help="in all (default: 20000)")
parser.add_argument("--points", type=int, default=5000, help="where the field is wanted, in all (default: 5000)")
parser.add_argument("--width", type=float, default=0.05, help="h of the kernel, of a unit square (default: 0.05)")
arguments = parser.parse_args()
comm = MPI.COMM_WORLD


def field(x):
    return np.sin(6 * x[:, 0]) * np.cos(4 * x[:, 1])


def share(total):
    return total * (comm.rank + 1) // comm.size - total * comm.rank // comm.size


# What this rank has seen, and where it wants to know: numbers differ from rank to rank.
rng = np.random.default_rng(comm.rank)
seen_at = rng.random((share(arguments.observations), 2))
seen = np.stack([field(seen_at) + 0.2 * rng.standard_normal(len(seen_at))], axis=1)
wanted_at = rng.random((share(arguments.points), 2))

estimate = ringmpi.ring_attention(
    wanted_at[:, None], seen_at[:, None], seen[:, None], comm=comm, scale=arguments.width**-2,
    key_bias=-(seen_at**2).sum(axis=1) / (2 * arguments.width**2))[:, 0, 0]

# The same for some points by the definition, from all observations.
every_at, every = (np.concatenate(comm.allgather(x)) for x in (seen_at, seen[:, 0]))
some = wanted_at[:20]
weights = np.exp(-((some[:, None] - every_at) ** 2).sum(axis=2) / (2 * arguments.width**2))
dense = weights @ every / weights.sum(axis=1)
assert np.abs(estimate[:20] - dense).max(initial=0) < 1e-10

error = comm.allreduce(float(((estimate - field(wanted_at)) ** 2).sum())) / arguments.points
if comm.rank == 0:
    print(f"{arguments.points} points from {arguments.observations} observations on {comm.size} ranks: "
          f"root mean square error {error**0.5:.3f}, noise 0.200")
