"""What a cache is made of: what its ranks agree on, what computes, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import GPU_NAMES, check_name
from ..backends.base import Backend
from ..checks import check_bias_numbers, check_threads, check_timeout
from ..dtypes import accumulator as accumulator_of
from ..engine import Engine, agreed
from ..errors import BackendError, OptionError
from ..mask import Mask
from ..mpi.comm import digest_of, private_comm
from ..mpi.threads import check_thread
from ..problem import Problem
from .contents import Contents
from .decoder import Decoder
from .file import read_blocks
from .sizes import Sizes


class Core:
    """The inside of a `KVCache`. Collective over *comm*.

    Parameters
    ----------
    comm : MPI.Intracomm
        The caller's.
    sizes : mapping
        What `Sizes.check` takes.
    options : mapping
        mask, scale, softcap, alibi, accumulator, backend, threads, timeout and allow_gpu_sharing: what a
        `RingAttention` is given too.

    Attributes
    ----------
    given : MPI.Intracomm
        The caller's communicator.
    comm : Comm
        The private one on it.
    timeout : float
    passed_on : dict
        The options as they were given, for a `RingAttention`.
    problem : Problem
    sizes : Sizes
    accumulator : dtype
    engine : Engine
    agreed : dict
        The options that all ranks have agreed on, with the number of this object.
    digest : int
        Of these.
    contents : Contents
    decoder : Decoder
    """

    problem: Problem
    sizes: Sizes
    accumulator: np.dtype[Any]

    def __init__(self, comm: Any, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        check_thread()
        self.given = comm
        self.timeout, wrong = check_timeout(options["timeout"])
        self.comm = private_comm(comm, self.timeout)
        self.agreed: dict[str, Any] = {}
        engine: Engine | None = None
        with self.comm.noting() as failures:
            if wrong:
                raise OptionError(wrong)
            mask = Mask(causal=True) if options["mask"] is None else options["mask"]
            self.passed_on = {**options, "mask": mask}
            self.problem = Problem.check(mask, "contiguous", None, options["scale"], options["softcap"],
                                         options["alibi"], 0.0, options["accumulator"])
            self.problem.mask.check_growing()
            self.sizes = Sizes.check(**sizes)
            self.accumulator = accumulator_of(self.sizes.dtype, options["accumulator"])
            self.problem.check_range(np.finfo(self.accumulator))
            check_name(options["backend"])
            if options["backend"] in GPU_NAMES and (self.sizes.key_bias or self.sizes.in_keys):
                raise BackendError(f"{'key_bias' if self.sizes.key_bias else 'values_in_keys'}: backend "
                                   f"{options['backend']} has none yet; expected backend numba or numpy")
            self.agreed = {**self.problem.describe(), **self.sizes.describe(), "backend": options["backend"]}
            engine = Engine(self.comm, self.timeout, options["backend"],
                            check_threads(options["threads"]) or self.comm.threads, "auto",
                            bool(options["allow_gpu_sharing"]))
        self.engine = agreed(engine, self.comm, "KVCache", self.timeout, failures, self.agreed)
        try:
            self.prepare(self.problem.softcap is None and self.problem.alibi is None and not self.sizes.key_bias)
        except BaseException:
            self.engine.close()
            raise
        self.agreed["KVCache (by the order in which they were made)"] = self.comm.next_object()
        self.digest = digest_of(self.agreed)
        self.contents = Contents(self.sizes, self.problem.mask, self.comm.rank, self.comm.size, self.backend.empty,
                                 self.accumulator)
        self.decoder = Decoder(self.comm, self.engine, self.problem, self.accumulator, self.sizes)

    def prepare(self, plain: bool) -> None:
        """Compile what computes, once: scores that are `plain`, or any. Collective over *comm*."""
        self.engine.prepare(self.sizes.dtype, self.accumulator, self.sizes.dim, self.sizes.dim_v, plain=plain,
                            backward=False)

    @property
    def backend(self) -> Backend:
        """What computes."""
        return self.engine.backend

    @property
    def options(self) -> dict[str, Any]:
        """What all ranks must have alike in every call."""
        return {**self.agreed, **self.contents.alike}

    def fill(self, path: Path, found: Mapping[str, Any]) -> None:
        """Take this rank's share of a cache that was saved; `found` is its description. Local."""
        contents, backend, sizes = self.contents, self.backend, self.sizes
        contents.check_capacity(found["length"])
        blocks = read_blocks(path, found, contents.seen(found["length"]), self.comm.rank, self.comm.size)
        contents.store.make_room(found["tokens"] // self.comm.size)
        with backend.current():
            for positions, *arrays in blocks:
                mine = [backend.to_device(x[None] if sizes.batch is None else np.moveaxis(x, 0, 1)) for x in arrays]
                if sizes.key_bias:
                    mine[-1] = check_bias_numbers(mine[-1], self.accumulator)
                contents.store.append(positions, *mine)
        contents.length = found["length"]
        contents.dropped = found["dropped"]
