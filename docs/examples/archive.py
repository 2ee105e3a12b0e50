"""Which documents of a packed archive a question looks at: attention with its weights summed by document.

    mpiexec -n 2 python docs/examples/archive.py

Documents of unequal lengths lie one behind the other over all ranks. A question, whose queries all ranks have, attends
to all of them, and `mass_by_group` says how much of its attention each document got.
"""

import numpy as np
from mpi4py import MPI

import ringmpi
import ringmpi.analysis

HEADS = 2
DIM = 32
DOCUMENTS = 40
ANSWER = 27                    # the document that the question is about

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)                        # the same on all ranks, which then keep their own part
lengths = rng.integers(50, 400, DOCUMENTS)
number = np.repeat(np.arange(DOCUMENTS), lengths)     # of each token's document
topics = rng.standard_normal((DOCUMENTS, HEADS, DIM))
keys = topics[number] + 0.5 * rng.standard_normal((len(number), HEADS, DIM))
values = rng.standard_normal((len(number), HEADS, DIM))
question = topics[ANSWER] + 0.5 * rng.standard_normal((3, HEADS, DIM))          # three tokens
mine = slice(len(number) * comm.rank // comm.size, len(number) * (comm.rank + 1) // comm.size)

out, lse = ringmpi.ring_attention(question, keys[mine], values[mine], comm=comm, layout="replicated", return_lse=True)
mass = ringmpi.analysis.mass_by_group(question, keys[mine], lse, number[mine], DOCUMENTS, comm=comm,
                                      layout="replicated")

# By document, of all tokens and heads of the question together.
share = mass.mean(axis=(0, 1))
assert np.abs(share.sum() - 1) < 1e-12
heaviest = np.argsort(share)[::-1][:3]
assert heaviest[0] == ANSWER
if comm.rank == 0:
    print(f"{DOCUMENTS} documents of {len(number)} tokens on {comm.size} ranks: the question looked at " + ", ".join(
        f"document {document} ({share[document]:.0%})" for document in heaviest))
