"""What a rank computes with: a backend where the arrays are, and the ring whose link moves blocks in that memory."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import device
from .backends import HOST_NAMES, open_backend
from .backends.base import Backend
from .environment import launched_local_rank
from .errors import BackendError
from .homeward import Homeward
from .link import DirectLink, HostLink, StagedLink
from .mpi import Comm
from .phases import phase
from .ring import Ring
from .transport import Transport, choose

COMPILE_TIMEOUT = 600.0           # seconds at least: compiling is not being late
HOST = -1                         # where host arrays are, among the indices of GPUs


class Engine:
    """Opened on the host or on a GPU, and again elsewhere if the arrays are elsewhere. Collective over *comm*.

    Parameters
    ----------
    comm : Comm
    timeout : float
        Seconds to wait for other ranks.
    name : str
        Of the backend, or ``"auto"``.
    threads : int
    gpu_transport : str
        See `transport.choose`.
    allow_gpu_sharing : bool
        Let ranks of a node share a GPU.

    Attributes
    ----------
    backend : Backend
    ring : Ring
    homeward : Homeward
        What takes gradients home, over links of the ring's kind.
    gpus : list of str
        UUID of the GPU of each rank; empty on CPUs.
    transport : Transport or None
        None on CPUs.

    Raises
    ------
    BackendError
        If the backend can't run on some rank; the same on every rank.
    """

    backend: Backend
    ring: Ring
    homeward: Homeward

    def __init__(self, comm: Comm, timeout: float, name: str, threads: int, gpu_transport: str,
                 allow_gpu_sharing: bool) -> None:
        self._comm, self._timeout, self._threads = comm, timeout, threads
        self._name, self._gpu_transport, self._sharing = name, gpu_transport, allow_gpu_sharing
        self._places: NDArray[np.int64] | None = np.full(comm.size, HOST)      # None after an attempt that failed
        self._index: int | None = None
        self.gpus: list[str] = []
        self.transport: Transport | None = None
        self._open()

    def follow(self, places: NDArray[np.int64]) -> None:
        """Open the backend where the arrays are, unless it is open there. Collective over *comm*.

        Parameters
        ----------
        places : int array of shape (size,)
            Index of the GPU that each rank's arrays are on, as that rank counts; HOST for host arrays.

        Raises
        ------
        BackendError
            If the backend does not compute there; the same on every rank.
        """
        if self._places is not None and (places == self._places).all():
            return
        mine = int(places[self._comm.rank])
        if self._name in HOST_NAMES and mine != HOST:
            raise BackendError(f"backend {self._name} computes on CPUs, and the arrays are on GPUs; take "
                               "backend='auto' or 'cuda', or copy them to the host")
        stays = (mine == HOST and self._name == "cuda") or (places == self._indices).all()
        if self._places is not None and stays:             # the same on all ranks: on host arrays all agree
            self._places = places.copy()
            return
        self._places, self._index = None, None if mine == HOST else mine
        self.close()
        self._open()
        self._places = places.copy()

    def _open(self) -> None:
        on_gpu = self._name == "cuda" or self._index is not None
        name = "cuda" if on_gpu else self._name
        with self._comm.together(self._timeout):
            self.backend = open_backend(name, self._threads, self._gpu() if on_gpu else None)
        self.gpus, self.transport = [], None
        new_link: Callable[..., HostLink] = HostLink
        gpu = self.backend.device
        if gpu is not None:
            self.gpus = self._distinct(gpu.uuid)
            self.transport = choose(self._comm, self._gpu_transport, self._timeout)
            new_link = partial(DirectLink if self.transport.name == "direct" else StagedLink, gpu)
        self.ring = Ring(self._comm, self._timeout, new_link())
        self.homeward = Homeward(self._comm, new_link, self.backend.clear, self.backend.add)
        self._prepared: set[Any] = set()
        facts = self._comm.share([HOST if gpu is None else gpu.index, self.backend.compiles], self._timeout)
        self._indices = facts[:, 0]
        self._compiles = bool(facts[:, 1].any())       # "auto" may open different backends: all wait if one compiles

    def _gpu(self) -> device.Device:
        """Take the GPU of the arrays; for host arrays that of this rank's place on its node."""
        if self._index is not None:
            return device.open_device(self._index)
        launched = launched_local_rank()         # of all ranks; a communicator of the caller may have some of them
        local_rank = self._comm.local_rank if launched is None else launched
        return device.open_device(device.choose_index(local_rank, device.count(), self._sharing))

    def _distinct(self, uuid: str) -> list[str]:
        """Gather the GPUs of all ranks; refuse one that two ranks have, unless that is allowed."""
        uuids = [json.loads(text) for text in self._comm.share_text(json.dumps(uuid), self._timeout)]
        shared = [(gpu, [r for r, other in enumerate(uuids) if other == gpu])
                  for gpu, users in Counter(uuids).items() if users > 1]
        if shared and not self._sharing:
            gpu, ranks = shared[0]
            raise BackendError(f"backend cuda: expected a GPU for each rank, got {gpu} for ranks "
                               f"{', '.join(map(str, ranks))}; start fewer ranks on a node, let each rank see or "
                               "choose a GPU of its own, or allow_gpu_sharing (--allow-gpu-sharing)")
        return uuids

    def prepare(self, dtype: np.dtype[Any], kind: np.dtype[Any], dim: int, dim_v: int, *, plain: bool,
                backward: bool) -> float:
        """Compile what such a call needs, once; one rank of a node first. Collective over *comm*.

        Parameters
        ----------
        dtype, kind, dim, dim_v, plain, backward
            See `Backend.prepare`.

        Returns
        -------
        float
            Seconds that it took, waiting for other ranks included.
        """
        wanted = dtype, kind, dim, dim_v, plain, backward
        if not self._compiles or wanted in self._prepared:
            return 0.0
        start = time.perf_counter()
        with phase("compiling kernels"):
            self._comm.by_turns(lambda: self.backend.prepare(dtype, kind, dim, dim_v, plain=plain, backward=backward),
                                max(self._timeout, COMPILE_TIMEOUT))
        self._prepared.add(wanted)
        return time.perf_counter() - start

    def close(self) -> None:
        """Give buffers and threads back. Local."""
        self.ring = Ring(self._comm, self._timeout)
        self.homeward = Homeward(self._comm, HostLink, self.backend.clear, self.backend.add)
        self.backend.close()
