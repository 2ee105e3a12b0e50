"""What a rank computes with: a backend where the arrays are, and the schedule whose links move blocks in that memory.

Calls on one communicator come one after the other, so its objects share what they compute with: a model of many layers
has the buffers of one.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import device
from .backends import GPU_NAMES, HOST_NAMES, open_backend
from .backends.base import Backend
from .call import ON_HOST
from .environment import hopper_kernel, launched_local_rank, rates_file
from .errors import BackendError, InternalError, OptionError
from .mpi.comm import Comm
from .phases import phase
from .schedules.device_links import device_link
from .schedules.gpu_transport import Transport, choose
from .schedules.grid import Grid
from .schedules.links import HostLink, Link
from .schedules.machine import Machine
from .schedules.movers import Movers
from .schedules.rates import CPU, GPU, Rates
from .softmax import State

RATES = "rates"                   # that all ranks have agreed on
COMPILE_TIMEOUT = 180.0           # seconds at least: compiling is not being late
NO_FACTS = np.zeros(5, np.int64).view(np.uint8)      # of a rank that has failed


def rates_of_this_machine(on_gpu: bool) -> str | None:
    """Read the rates that `bench network` has kept, as text; None, with a warning unless there are none. Local.

    They are of CPUs: there are none of GPUs.
    """
    path = None if on_gpu else rates_file()
    try:
        return None if path is None else Rates.load(path).as_text()
    except FileNotFoundError:
        return None
    except (OptionError, OSError) as error:
        warnings.warn(f"{error}; schedules are chosen by default rates", stacklevel=2)
        return None


class Workspace:
    """A backend, and what moves blocks and holds sums for it: shared by the objects of a communicator. Local.

    Buffers are there while an object is; the backend, and its threads, as long as the communicator. Page-locked memory
    that ranks of a node share stays for the life of the process: see `LockedMemory`.

    Parameters
    ----------
    comm : Comm
    backend : Backend
    number : int
        Of the workspaces of the communicator on this rank, in the order in which they were made.
    """

    def __init__(self, comm: Comm, backend: Backend, number: int) -> None:
        self._comm = comm
        self.backend = backend
        self.number = number
        self.users = 0
        self._movers: dict[tuple[Grid, str], Movers] = {}
        self._states: tuple[Any, list[State]] = (None, [])

    def movers(self, grid: Grid, transport: Transport | None) -> Movers:
        """Give what moves bytes on a grid: in host memory, or from GPU to GPU by a transport."""
        key = grid, transport.name if transport else "host"
        if key not in self._movers:
            new_link: Callable[[], Link] = HostLink
            if transport is not None:
                new_link = partial(device_link, transport, self.backend.device, self._comm)
            self._movers[key] = Movers(self._comm, grid, new_link, self.backend.clear, self.backend.add)
        return self._movers[key]

    def states(self, batch: int, n_q: int, heads: int, dim_v: int, acc_dtype: np.dtype[Any]) -> list[State]:
        """Give states of these sizes, one for each element of the batch; those of the last call if they fit."""
        key = batch, n_q, heads, dim_v, acc_dtype
        if self._states[0] != key:
            self._states = None, []            # the old memory goes before the new comes
            self._states = key, [self.backend.new_state(n_q, heads, dim_v, acc_dtype) for _ in range(batch)]
        return self._states[1]

    def give_states(self) -> list[State]:
        """Give the states of the last call away: the next call's are made anew."""
        states = self._states[1]
        self._states = None, []
        return states

    def leave(self) -> None:
        """Take note that an object is done with it; the last one's buffers go."""
        self.users -= 1
        if self.users == 0:
            self._movers = {}
            self._states = None, []
            self.backend.release()

    def close(self) -> None:
        """End the backend, when its communicator goes."""
        self._movers = {}
        self.backend.close()


class Engine:
    """A workspace on the host or on a GPU, and another one if the arrays are elsewhere.

    Made on each rank alone; `connect` comes next, with the facts of all ranks.

    Parameters
    ----------
    comm : Comm
    timeout : float
        Seconds to wait for other ranks.
    name : str
        Of the backend, or ``"auto"``.
    threads : int
    gpu_transport : str
        See `gpu_transport.choose`.
    allow_gpu_sharing : bool
        Let ranks of a node share a GPU.
    bfloat16_products : str
        What is wished for; see `Backend.settle`.
    canonical : bool
        Whether sums are made in canonical order.
    gpu_kernels : str
        Whose kernels are to differentiate on a GPU; see `open_backend`.

    Attributes
    ----------
    backend : Backend
        What computes; it can be asked about, though no longer used, after `close`.
    gpus : list of str
        UUID of the GPU of each rank; empty on CPUs.
    transport : Transport or None
        None on CPUs.

    Raises
    ------
    BackendError
        If the backend can't run on this rank.
    """

    backend: Backend

    def __init__(self, comm: Comm, timeout: float, name: str, threads: int, gpu_transport: str,
                 allow_gpu_sharing: bool, bfloat16_products: str = "auto", canonical: bool = False,
                 gpu_kernels: str = "auto") -> None:
        self._comm, self._timeout, self._threads = comm, timeout, threads
        self._name, self._gpu_transport, self._sharing = name, gpu_transport, allow_gpu_sharing
        self._products = bfloat16_products
        self._canonical = canonical
        self._gpu_kernels = gpu_kernels
        self._places: NDArray[np.int64] | None = np.full(comm.size, ON_HOST)      # None after an attempt that failed
        self._index: int | None = None
        self._workspace: Workspace | None = None
        self.gpus: list[str] = []
        self.transport: Transport | None = None
        self._open()

    def movers(self, grid: Grid) -> Movers:
        """Give what moves bytes on a grid: queries, K and V, and their gradients. Local."""
        movers = self._shared.movers(grid, self.transport)
        movers.set_timeout(self._timeout)
        return movers

    def raise_on_all(self) -> AbstractContextManager[None]:
        """Run a block that may fail on some ranks; see `Comm.raise_on_all`. Collective over *comm*."""
        return self._comm.raise_on_all(self._timeout)

    def share(self, mine: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Give the bytes that each rank brings to all of them. Collective over *comm*."""
        return self._comm.exchange("", self._timeout, mine)

    @property
    def _shared(self) -> Workspace:
        if self._workspace is None:
            raise BackendError("this backend is closed; make a new RingAttention")
        return self._workspace

    def states(self, batch: int, n_q: int, heads: int, dim_v: int, acc_dtype: np.dtype[Any]) -> list[State]:
        """Give the states of a call, one for each element of the batch; see `Workspace.states`. Local."""
        return self._shared.states(batch, n_q, heads, dim_v, acc_dtype)

    def give_states(self) -> list[State]:
        """Give the states of the last call away; see `Workspace.give_states`. Local."""
        return self._shared.give_states()

    def move_to(self, places: NDArray[np.int64]) -> None:
        """Open the backend where the arrays are, unless it is open there. Collective over *comm*.

        Parameters
        ----------
        places : int array of shape (size,)
            Index of the GPU that each rank's arrays are on, as that rank counts; ON_HOST for host arrays.

        Raises
        ------
        BackendError
            If the backend does not compute there; the same on every rank.
        """
        if self._places is not None and (places == self._places).all():
            return
        mine = int(places[self._comm.rank])
        if self._name in HOST_NAMES and mine != ON_HOST:
            raise BackendError(f"backend {self._name} computes on CPUs, and the arrays are on GPUs; take "
                               "backend='auto' or 'cuda', or copy them to the host")
        stays = (mine == ON_HOST and self._name in GPU_NAMES) or (places == self._indices).all()
        if self._places is not None and stays:             # the same on all ranks: on host arrays all agree
            self._places = places.copy()
            return
        self._places, self._index = None, None if mine == ON_HOST else mine
        with self._comm.noting() as failures:
            self.close()
            self._open()
        rows = self._comm.exchange("", self._timeout, self.facts(), failures=failures)
        self.connect(rows)
        self._places = places.copy()

    def _open(self) -> None:
        """Take the workspace that these options are about, a new one if there is none. Local."""
        on_gpu = self._name in GPU_NAMES or self._index is not None
        gpu = self._gpu() if on_gpu else None
        name = GPU_NAMES[0] if on_gpu else self._name
        kernels = (hopper_kernel(), self._gpu_kernels) if on_gpu else ()
        key = name, self._threads, gpu, self._products, kernels, self._canonical
        workspaces = self._comm.shared
        if key not in workspaces:
            backend = open_backend(name, self._threads, gpu, self._canonical, self._gpu_kernels)
            workspaces[key] = Workspace(self._comm, backend, len(workspaces))
        self._workspace = workspaces[key]
        self._workspace.users += 1
        self.backend = self._workspace.backend

    def facts(self) -> NDArray[np.uint8]:
        """Give what the other ranks must know of this rank's backend. Local."""
        if self._workspace is None:
            return NO_FACTS
        gpu = self.backend.device
        return np.array([ON_HOST if gpu is None else gpu.index, self.backend.compiles, self._workspace.number,
                         self.backend.ways, self.backend.threads], np.int64).view(np.uint8)

    def connect(self, rows: list[NDArray[np.uint8]]) -> None:
        """Take the facts of all ranks, and on GPUs agree on how blocks travel. Collective over *comm* there.

        Raises
        ------
        BackendError, OptionError
            If ranks share a GPU, or ask for different ways; the same on every rank.
        """
        self._facts = np.concatenate(rows)
        facts = self._facts.view(np.int64).reshape(self._comm.size, -1)
        self.backend.settle(self._products, facts[:, 3].tolist())
        self._indices = facts[:, 0]
        self._compiles = bool(facts[:, 1].any())       # "auto" may open different backends: all wait if one compiles
        self.gpus, self.transport = [], None
        gpu = self.backend.device
        if gpu is not None:
            self.gpus = self._distinct(gpu.uuid)
            self.transport = choose(self._comm, self._gpu_transport, self._timeout, gpu)

    def machine(self) -> Machine:
        """Describe what computes, as all ranks know it: with the rates that rank 0 has. Collective over *comm*."""
        comm = self._comm
        on_gpu = self.transport is not None
        if RATES not in comm.agreed:
            mine = ""
            with comm.raise_on_all(self._timeout):       # a warning may be an error
                if comm.rank == 0:
                    mine = rates_of_this_machine(False) or ""
            comm.agreed[RATES] = comm.allgather_text(mine, self._timeout)[0]
        text = "" if on_gpu else comm.agreed[RATES]
        here = max(Counter(comm.nodes).values())
        threads = self._facts.view(np.int64).reshape(comm.size, -1)[:, 4].tolist()
        return Machine(comm.size, here, max(threads), comm.cores, on_gpu, here if on_gpu else 1,
                       Rates.from_text(text) if text else GPU if on_gpu else CPU)

    def _gpu(self) -> device.Device:
        """Take the GPU of the arrays; for host arrays that of this rank's place on its node."""
        if self._index is not None:
            return device.open_device(self._index)
        launched = launched_local_rank()         # of all ranks; a communicator of the caller may have some of them
        local_rank = self._comm.local_rank if launched is None else launched
        return device.open_device(device.choose_index(local_rank, device.count(), self._sharing))

    def _distinct(self, uuid: str) -> list[str]:
        """Gather the GPUs of all ranks; refuse one that two ranks have, unless that is allowed."""
        uuids = [json.loads(text) for text in self._comm.allgather_text(json.dumps(uuid), self._timeout)]
        shared = [(gpu, [r for r, other in enumerate(uuids) if other == gpu])
                  for gpu, users in Counter(uuids).items() if users > 1]
        if shared and not self._sharing:
            gpu, ranks = shared[0]
            raise BackendError(f"backend cuda: expected a GPU for each rank, got {gpu} for ranks "
                               f"{', '.join(map(str, ranks))}; start fewer ranks on a node, let each rank see or "
                               "choose a GPU of its own, or allow_gpu_sharing (--allow-gpu-sharing)")
        return uuids

    def prepare(self, dtype: np.dtype[Any], acc_dtype: np.dtype[Any], dim: int, dim_v: int, *, plain: bool,
                biased: bool = False, relative: bool = False, several: bool = False, backward: bool = False,
                weights: bool = False) -> float:
        """Compile what such a call needs, once; one rank of a node first. Collective over *comm*.

        Parameters
        ----------
        dtype, acc_dtype, dim, dim_v, plain, biased, relative, several, backward, weights
            See `Backend.prepare`.

        Returns
        -------
        float
            Seconds that it took, waiting for other ranks included.
        """
        # by the facts of all ranks, so that all know alike what is there
        prepared: set[Any] = self._comm.prepared
        wanted = (self._facts.tobytes(), dtype, acc_dtype, dim, dim_v, plain, biased, relative, several, backward,
                  weights)
        if not self._compiles or wanted in prepared:
            return 0.0
        start = time.perf_counter()
        self._comm.place = ", compiling kernels"
        with phase("compiling kernels"):
            self._comm.node_leader_first(
                lambda: self.backend.prepare(dtype, acc_dtype, dim, dim_v, plain=plain, biased=biased,
                                             relative=relative, several=several, backward=backward, weights=weights),
                max(self._timeout, COMPILE_TIMEOUT))
        prepared.add(wanted)
        return time.perf_counter() - start

    def close(self) -> None:
        """Let go of the workspace; the last object's buffers go. Local."""
        if self._workspace is not None:
            workspace, self._workspace = self._workspace, None
            workspace.leave()


def agreed(engine: Engine | None, comm: Comm, what: str, timeout: float, failures: list[Exception],
           options: Mapping[str, Any]) -> Engine:
    """Agree on the options of an object, and on what computes. Collective over *comm*.

    Parameters
    ----------
    engine : Engine, optional
        None if it could not be made on this rank: then `failures` say why, and all ranks raise it.
    comm : Comm
    what : str
        Is made: "RingAttention".
    timeout : float
        Seconds.
    failures : list of Exception
        Of this rank, by `Comm.noting`.
    options : mapping
        That must be the same on all ranks.
    """
    try:
        rows = comm.exchange(what, timeout, NO_FACTS if engine is None else engine.facts(), failures=failures,
                             options=options)
        if engine is None:
            raise InternalError(f"a {what} without an engine")
        engine.connect(rows)
    except BaseException:
        if engine is not None:
            engine.close()
        raise
    return engine


def connected(comm: Comm, timeout: float, *options: Any) -> Engine:
    """Make an engine, and agree with all ranks on what computes. Collective over *comm*.

    Parameters
    ----------
    comm, timeout, *options
        See `Engine`.
    """
    engine: Engine | None = None
    with comm.noting() as failures:
        engine = Engine(comm, timeout, *options)
    return agreed(engine, comm, "Engine", timeout, failures, {})
