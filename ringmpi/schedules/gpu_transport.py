"""How K and V get from GPU to GPU: `direct`, MPI is given device memory, or `staged`, through the host; and why.

An MPI library that is not CUDA-aware crashes when it is given device memory, so `auto` takes that way only on proof.
Staged blocks go between ranks of one node through memory that they share, if all of them can, and else by MPI.
"""

from __future__ import annotations

import ctypes
import json
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..environment import GPU_TRANSPORT, gpu_transport, mpi_gpu_switches
from ..errors import BackendError, OptionError
from ..mpi.comm import Comm, load
from .shared_memory import LockedMemory
from .staging import CHUNK_BYTES, CHUNKS

TRANSPORTS = ("auto", "direct", "staged")
POLL_SECONDS = 1e-4
REFUSAL = "why memory is not shared"      # that all ranks have agreed on
CUDA = 0                   # MPIX_GPU_SUPPORT_CUDA in MPICH's mpi.h


@dataclass(frozen=True)
class Transport:
    """The transport that all ranks take.

    Attributes
    ----------
    name : str
        ``"direct"`` or ``"staged"``.
    reason : str
        Who asked for it, or what the MPI library says of itself; and how staged blocks go within a node.
    shares_memory : bool
        Whether staged blocks go between the ranks of a node through memory that they share.
    """

    name: str
    reason: str
    shares_memory: bool = False

    def neighbours(self, comm: Comm) -> tuple[bool, ...]:
        """Say of each rank whether this one shares memory with it; empty if with none but itself. Local."""
        if not self.shares_memory or comm.local_size == 1:
            return ()
        return tuple(node == comm.leader for node in comm.nodes)


def check_transport(name: str, what: str = "gpu_transport") -> None:
    """Raise `OptionError` unless `name` is one of `TRANSPORTS`. Local."""
    if name not in TRANSPORTS:
        raise OptionError(f"{what}: expected one of {', '.join(TRANSPORTS)}, got {name!r}")


def choose(comm: Comm, request: str, timeout: float, device: Any) -> Transport:
    """Choose one transport for all ranks. Collective over *comm*.

    Parameters
    ----------
    comm : Comm
    request : str
        ``"direct"``, ``"staged"``, or ``"auto"``: the variable RINGMPI_GPU_TRANSPORT decides or, if that is not set
        or ``auto`` too, `direct` is taken if every rank proves that its MPI library is CUDA-aware.
    timeout : float
        Seconds to wait for the others.
    device : Device
        This rank's GPU.

    Raises
    ------
    OptionError
        If the request or the variable is none of these, or ranks ask for different ones.
    """
    with comm.raise_on_all(timeout):
        wish, origin = _wish(request)
    comm.check_same_options({"gpu_transport": wish}, timeout)
    if wish == "staged":
        return _within_nodes(Transport("staged", origin), comm, timeout, device)
    with comm.raise_on_all(timeout):
        mine = cuda_awareness()
    proven, reason = _weakest([json.loads(text) for text in comm.allgather_text(json.dumps(mine), timeout)])
    if wish == "direct":
        return Transport("direct", f"{origin}; {reason}")
    if proven:
        return Transport("direct", reason)
    return _within_nodes(Transport("staged", reason), comm, timeout, device)


def choose_once(comm: Comm, request: str, timeout: float, device: Any) -> Transport:
    """Choose as `choose` does; for a request that was made on the communicator before, what was chosen then.

    Collective over *comm* the first time, local after that.
    """
    key = "gpu_transport", request
    if key not in comm.agreed:
        comm.agreed[key] = choose(comm, request, timeout, device)
    transport: Transport = comm.agreed[key]
    return transport


def choose_alone() -> Transport:
    """Say which transport this process would choose for itself. Local.

    Raises
    ------
    OptionError, LaunchError
        If the variable names none, or there is no MPI library.
    """
    wish, origin = _wish("auto")
    if wish != "auto":
        return Transport(wish, origin)
    proven, reason = cuda_awareness()
    return Transport("direct" if proven else "staged", reason)


def _within_nodes(transport: Transport, comm: Comm, timeout: float, device: Any) -> Transport:
    """Add how staged blocks go between the ranks of a node. Collective over *comm*, the first time."""
    if len(set(comm.nodes)) == comm.size:
        return transport
    if REFUSAL not in comm.agreed:
        comm.agreed[REFUSAL] = _refusal(comm, timeout, device)
    refusal = comm.agreed[REFUSAL]
    if refusal:
        return replace(transport, reason=f"{transport.reason}; by MPI within a node too, as {refusal}")
    return replace(transport, reason=f"{transport.reason}; within a node through shared memory", shares_memory=True)


def _refusal(comm: Comm, timeout: float, device: Any) -> str:
    """Try whether all ranks of each node share page-locked memory; say why not, empty if they do.

    Each rank's GPU writes some numbers there, which the GPUs of the others of its node must read. Collective over
    *comm*.
    """
    def agree(mine: str) -> str:
        reports = comm.allgather_text(mine, timeout)
        return next((f"rank {rank} {report}" for rank, report in enumerate(reports) if report), "")

    # Each rank offers some, and then opens that of the others of its node.
    memory, segment = LockedMemory.of(device), None
    handle, failure = [0], ""
    written = np.frombuffer(uuid.uuid4().bytes, np.uint8)
    try:
        with device.current():
            segment = memory.take(CHUNKS * CHUNK_BYTES)          # as much as a channel has, and keeps
            _copy(device, written, segment.memory[:len(written)], timeout)
            handle = segment.handle().tolist()
    except (OSError, BackendError) as error:
        failure = f"can't share memory: {error}"
    offers = [json.loads(text) for text in comm.allgather_text(json.dumps([handle, written.tolist()]), timeout)]
    refusal = agree(failure)
    if refusal:
        return refusal
    for rank, node in enumerate(comm.nodes):
        if node != comm.leader or rank == comm.rank:
            continue
        try:
            handle, expected = offers[rank]
            found = np.empty_like(written)
            with device.current():
                _copy(device, memory.there(np.array(handle, np.uint64))[:len(written)], found, timeout)
        except (OSError, BackendError) as error:
            failure = f"can't open the memory of rank {rank}: {error}"
            break
        if found.tolist() != expected:
            failure = f"does not find in the memory of rank {rank} what its GPU wrote"
            break
    refusal = agree(failure)
    if segment is not None:
        memory.give_back(segment)
    return refusal


def _copy(device: Any, source: NDArray[np.uint8], target: NDArray[np.uint8], timeout: float) -> None:
    """Copy from host to host by way of the GPU, on a stream of its own, in time for the other ranks.

    Raises
    ------
    BackendError
        If it takes longer than half of what they wait.
    """
    stream, there = device.new_stream(), device.empty(source.shape, source.dtype)
    device.upload(there, source, stream)
    device.download(target, there, stream)
    event = device.record(stream)
    latest = time.monotonic() + timeout / 2
    while not event.done:
        if time.monotonic() > latest:
            raise BackendError(f"its GPU copies nothing for {timeout / 2:g} s")
        time.sleep(POLL_SECONDS)


def _weakest(reports: list[tuple[bool, str]]) -> tuple[bool, str]:
    """Give the report of the first rank that has no proof, else that of rank 0."""
    without = [rank for rank, (proven, _) in enumerate(reports) if not proven]
    proven, reason = reports[without[0] if without else 0]
    return proven, f"{reason} (on rank {without[0]})" if 0 < len(without) < len(reports) else reason


def _wish(request: str) -> tuple[str, str]:
    """Give the transport that is asked for, and by whom."""
    for name, wish in (("gpu_transport", request), (GPU_TRANSPORT, gpu_transport() or "auto")):
        check_transport(wish, name)
        if wish != "auto":
            return wish, f"asked for by {name}={wish}"
    return "auto", ""


def cuda_awareness() -> tuple[bool, str]:
    """Say whether the MPI library is proven to take device memory, and by what. Local.

    In this order: what Cray's and Intel's libraries are told by their variables; the memory kinds of MPI 4.1; the
    queries that Open MPI, MPICH and their kin have. MPICH's older query ends the process in MPICH before 4.0 without
    CUDA, so it is asked only where the newer one is missing.

    Returns
    -------
    bool
        False if the library is not CUDA-aware, and also if nobody knows.
    str
        The reason.
    """
    mpi, switches = load(), mpi_gpu_switches()
    vendor = mpi.Get_library_version()
    if "CRAY" in vendor.upper() and switches["MPICH_GPU_SUPPORT_ENABLED"] != "1":
        return False, "MPI is not told to take GPU memory: MPICH_GPU_SUPPORT_ENABLED is not 1"
    if "Intel" in vendor:
        offload, mode = switches["I_MPI_OFFLOAD"], switches["I_MPI_OFFLOAD_MODE"]
        proven = offload not in ("", "0") and mode == "cuda"
        return proven, (f"MPI is {'' if proven else 'not '}told to take CUDA memory: I_MPI_OFFLOAD is "
                        f"{offload or 'not set'}, I_MPI_OFFLOAD_MODE is {mode or 'not set'}")
    kinds = _memory_kinds()
    if {"cuda", "cuda:device"} & set(kinds):
        return True, f"MPI is CUDA-aware: mpi_memory_alloc_kinds is {','.join(kinds)}"
    answer, query = _ask_library(mpi.__file__)
    if answer is None:
        return False, f"MPI is not known to be CUDA-aware: it has {query}"
    return answer, f"MPI is {'' if answer else 'not '}CUDA-aware: {query} says {'yes' if answer else 'no'}"


def _memory_kinds() -> list[str]:
    """Give the kinds of memory that MPI says it takes; empty before MPI 4.1."""
    info = load().COMM_SELF.Get_info()
    try:
        return [kind.strip() for kind in (info.Get("mpi_memory_alloc_kinds") or "").split(",") if kind.strip()]
    finally:
        info.Free()


def _ask_library(path: str) -> tuple[bool | None, str]:
    """Ask the library behind mpi4py itself; None if it has no such question."""
    library = ctypes.CDLL(path)
    if hasattr(library, "MPIX_GPU_query_support"):
        answer = ctypes.c_int(0)
        failed = library.MPIX_GPU_query_support(CUDA, ctypes.byref(answer))
        return not failed and bool(answer.value), "MPIX_GPU_query_support"
    if hasattr(library, "MPIX_Query_cuda_support"):
        return library.MPIX_Query_cuda_support() == 1, "MPIX_Query_cuda_support"
    return None, "neither memory kinds nor a query for it"
