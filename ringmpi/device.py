"""One GPU as this package uses it: memory, copies, streams, events and kernels, through CuPy.

The only module that imports CuPy, and only when it is asked about a GPU. What is here is all that the CUDA backend and
the transports ask of a GPU, so that tests can put another class, over host memory, in its place.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .compiler import binary_of, usable_cache
from .dtypes import BFLOAT16
from .environment import launched_local_rank
from .errors import BackendError

PIECE_BYTES = 2**25                # of an array on its way between host and device, page-locked twice
INSTALL = "pip install 'ringmpi[cuda12]' or 'ringmpi[cuda13]', by the version of CUDA that nvidia-smi says"

HOST_REGISTER_PORTABLE = 1         # cudaHostRegisterPortable, of driver_types.h

# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT16, _INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_L2_256B and
# _FLOAT_OOB_FILL_NONE.
UINT16, NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS = 1, 0, 3, 3, 0

# What CuPy adds to the options of its own compiler: denormals are 0, and functions run on the GPU unless they say else.
OPTIONS = "-ftz=true", "--device-as-default-execution-space"

Array = Any                        # a cupy.ndarray; named so that CuPy is not needed to read this
Read = Callable[[int, NDArray[Any]], None]      # puts rows from a number on into an array


def reason_missing() -> str | None:
    """Say why no GPU can be used here; None if one can. Local."""
    try:
        cupy = _cupy()
    except ImportError as error:
        return f"CuPy is not installed or can't be loaded ({str(error).splitlines()[0]}): {INSTALL}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no GPU: {error}"
    return None if count else "no GPU: none is visible; look at CUDA_VISIBLE_DEVICES"


def count() -> int:
    """Give the number of GPUs that this process sees. Local."""
    return 0 if reason_missing() else int(_cupy().cuda.runtime.getDeviceCount())


def describe() -> list[str]:
    """Describe each GPU that this process sees: name, UUID, compute capability, memory. Local."""
    found = []
    for index in range(count()):
        gpu = open_device(index)
        total = _cupy().cuda.runtime.getDeviceProperties(index)["totalGlobalMem"]
        found.append(f"{gpu.name}, {gpu.uuid}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
                     f"{total / 2**30:.0f} GiB")
    return found


def version() -> str:
    """Give the version of CuPy and of the CUDA that the driver speaks. Local."""
    number = _cupy().cuda.runtime.driverGetVersion()
    return f"CuPy {_cupy().__version__}, driver for CUDA {number // 1000}.{number % 1000 // 10}"


def view(x: Any) -> Array:
    """View a GPU array of any library as a CuPy array, ready for the current stream. Local."""
    cupy = _cupy()
    if isinstance(x, cupy.ndarray):
        return x
    with cupy.cuda.Device(x.__dlpack_device__()[1] if hasattr(x, "__dlpack_device__") else None):
        if str(getattr(x, "dtype", "")) == "torch.bfloat16":      # a dtype that not every version can name
            return cupy.from_dlpack(x.view(sys.modules["torch"].int16)).view(BFLOAT16)
        return cupy.from_dlpack(x) if hasattr(x, "__dlpack__") else cupy.asarray(x)


def index_of(x: Array) -> int:
    """Give the index of the GPU that a CuPy array is on. Local."""
    return int(x.device.id)


def choose_index(local_rank: int, visible: int, allow_sharing: bool) -> int:
    """Choose a GPU for a rank by its place on its node. Local.

    Parameters
    ----------
    local_rank : int
        This rank's place on its node, from 0.
    visible : int
        GPUs that this process sees. One is this rank's own, whatever its place; whether other ranks have the same
        one is for their UUIDs to tell.
    allow_sharing : bool
        Let ranks without a GPU of their own share, in turns.

    Raises
    ------
    BackendError
        If there are fewer GPUs than ranks, and sharing is not allowed.
    """
    if visible > 1 and local_rank >= visible and not allow_sharing:
        raise BackendError(f"backend cuda: expected a GPU for each rank of the node, got {visible} GPUs for local rank "
                           f"{local_rank}; start fewer ranks on a node, or allow_gpu_sharing (--allow-gpu-sharing)")
    return local_rank % max(visible, 1)


def choose_early() -> None:
    """Make this rank's GPU current before MPI starts, if the launcher says which place on its node it has. Local.

    What is wrong is left to the backend to find, when all ranks can agree on the error.
    """
    local_rank = launched_local_rank()
    visible = count()
    if local_rank is not None and visible:
        with suppress(_cupy().cuda.runtime.CUDARuntimeError):
            _cupy().cuda.Device(choose_index(local_rank, visible, True)).use()
            _cupy().cuda.runtime.free(0)       # makes the context


class Device:
    """A GPU.

    Parameters
    ----------
    index : int
        Among the devices that this process sees.

    Attributes
    ----------
    name : str
        As the driver calls it.
    uuid : str
        The same for every process that uses this GPU, and for no other GPU.
    capability : tuple of int
        Compute capability: (9, 0) for Hopper.
    processors : int
        Streaming multiprocessors.
    shared_bytes : int
        Shared memory that a block of threads can have.
    shared_bytes_processor : int
        Shared memory of a multiprocessor.
    cache : dict
        What users of the GPU keep for the life of the process, such as compiled kernels.
    sure_bytes : int
        What there is always memory for: less than nothing, as errors of what was begun before come at any time.

    Raises
    ------
    BackendError
        If there is no such GPU.
    """

    sure_bytes = -1

    def __init__(self, index: int) -> None:
        reason = reason_missing()
        if reason:
            raise BackendError(f"backend cuda: {reason}")
        self._cupy = _cupy()
        runtime = self._cupy.cuda.runtime
        self.index = index
        try:
            properties = runtime.getDeviceProperties(index)
        except runtime.CUDARuntimeError as error:
            raise BackendError(f"backend cuda: device {index}: {error}") from error
        self.name = properties["name"].decode()
        self.uuid = _uuid(index) or f"PCI-{runtime.deviceGetPCIBusId(index)}"
        self.capability = int(properties["major"]), int(properties["minor"])
        self.processors = int(properties["multiProcessorCount"])
        self.shared_bytes = int(properties["sharedMemPerBlockOptin"])
        self.shared_bytes_processor = int(properties["sharedMemPerMultiprocessor"])
        self.cache: dict[Any, Any] = {}
        self._staging: list[NDArray[np.uint8]] = []
        self._free: list[Any] = []
        self._next_piece = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the thread's device for a while; a caller's own choice comes back after it.

        Raises
        ------
        BackendError
            For what CuPy says of the GPU, its memory or the compiler meanwhile.
        """
        cuda = self._cupy.cuda
        try:
            with cuda.Device(self.index):
                yield
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError, cuda.memory.OutOfMemoryError,
                cuda.compiler.CompileException) as error:
            raise BackendError(f"GPU {self.index} ({self.name}): {type(error).__name__}: {error}") from error

    # Memory

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """Make an array in the GPU's memory, not initialised, from CuPy's pool."""
        return self._cupy.empty(shape, dtype)

    def message_buffer(self, nbytes: int) -> Array:
        """Make an array of bytes that MPI may be given: plain cudaMalloc, whatever CuPy's allocator is set to."""
        memory = self._cupy.cuda.Memory(max(nbytes, 1))
        return self._cupy.ndarray((nbytes,), np.uint8, self._cupy.cuda.MemoryPointer(memory, 0))

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Make an array of bytes in page-locked host memory."""
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8, nbytes)

    def lock_pages(self, memory: NDArray[np.uint8]) -> None:
        """Page-lock the host memory of an array that owns it, for as long as the array is there."""
        runtime = self._cupy.cuda.runtime
        address = memory.ctypes.data
        runtime.hostRegister(address, memory.nbytes, HOST_REGISTER_PORTABLE)

        def unlock() -> None:
            with suppress(runtime.CUDARuntimeError), self._cupy.cuda.Device(self.index):
                runtime.hostUnregister(address)

        weakref.finalize(memory, unlock).atexit = False

    def contiguous(self, x: Array) -> Array:
        """Give `x` itself if it is C-contiguous, else a copy that is."""
        bits = x.view(f"u{x.dtype.itemsize}") if x.dtype.itemsize <= 8 else x    # no header for bfloat16 is needed then
        return x if x.flags.c_contiguous else self._cupy.ascontiguousarray(bits).view(x.dtype)

    # Copies

    def take_rows(self, target: Array, source: Array, rows: NDArray[np.int64]) -> None:
        """Start to copy rows, by their numbers, from one contiguous array to another, on the caller's stream."""
        if target.nbytes:
            row_bytes = target.nbytes // len(target)
            word = math.gcd(8, row_bytes, target.data.ptr, source.data.ptr)
            words, from_words = (_bytes(x).view(f"u{word}").reshape(-1, row_bytes // word) for x in (target, source))
            with usable_cache():
                self._cupy.take(from_words, self.array(rows), axis=0, out=words)

    def upload(self, target: Array, source: NDArray[Any], stream: Any) -> None:
        """Start a copy from host to device, both contiguous and of one size; it overlaps if `source` is page-locked."""
        self._copy(target.data.ptr, source.ctypes.data, source.nbytes, "memcpyHostToDevice", stream)

    def download(self, target: NDArray[Any], source: Array, stream: Any) -> None:
        """Start a copy from device to host, both contiguous and of one size; it overlaps if `target` is page-locked."""
        self._copy(target.ctypes.data, source.data.ptr, target.nbytes, "memcpyDeviceToHost", stream)

    def copy(self, target: Array, source: Array, stream: Any) -> None:
        """Start a copy within the GPU's memory, both contiguous and of one size."""
        self._copy(target.data.ptr, source.data.ptr, target.nbytes, "memcpyDeviceToDevice", stream)

    def clear(self, x: Array, stream: Any) -> None:
        """Start to fill a contiguous array with zeros."""
        if x.nbytes:
            self._cupy.cuda.runtime.memsetAsync(x.data.ptr, 0, x.nbytes, stream.ptr)

    def _copy(self, target: int, source: int, nbytes: int, kind: str, stream: Any) -> None:
        runtime = self._cupy.cuda.runtime
        if nbytes:
            runtime.memcpyAsync(target, source, nbytes, getattr(runtime, kind), stream.ptr)

    # Streams and events

    def caller_stream(self) -> Any:
        """Give the stream that is current in the caller's thread."""
        return self._cupy.cuda.get_current_stream()

    def new_stream(self) -> Any:
        """Make a stream that does not wait for the default stream."""
        return self._cupy.cuda.Stream(non_blocking=True)

    def record(self, stream: Any) -> Any:
        """Mark what is on `stream` so far: the event's `done` says whether it has come about."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return Event(event, self._cupy.cuda.runtime)

    def follow(self, stream: Any, event: Any) -> None:
        """Let what comes on `stream` wait for `event`."""
        stream.wait_event(event.cupy_event)

    def read_rows(self, shape: Sequence[int], dtype: np.dtype[Any], read: Read) -> Array:
        """Fill a GPU array with what `read` puts into page-locked memory, piece by piece; see `Backend.read_rows`."""
        target = self.empty(shape, dtype)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        stream = self.caller_stream()
        for piece, at in self._pieces(target.nbytes, row_bytes):
            first = at.start // row_bytes
            read(first, piece.view(dtype).reshape(-1, *shape[1:]))
            self.upload(_bytes(target)[at], piece, stream)
            self._free_when(stream)
        return target

    def array(self, x: NDArray[Any]) -> Array:
        """Copy a host array to the GPU, on the caller's stream, in pieces by way of page-locked memory."""
        def read(first: int, rows: NDArray[Any]) -> None:
            rows[...] = lines[first:first + len(rows)]

        lines = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.ndim > 1 else x[..., None]
        return self.read_rows(lines.shape, x.dtype, read).reshape(x.shape)

    def host(self, x: Array) -> NDArray[Any]:
        """Copy a contiguous GPU array to the host, once what is on the caller's stream is done."""
        target = np.empty(x.shape, x.dtype)
        source = _bytes(x)
        target_bytes = _bytes(target)
        stream = self.caller_stream()
        waiting: list[tuple[NDArray[np.uint8], slice, Any]] = []
        for piece, at in self._pieces(x.nbytes, 1):
            self.download(piece, source[at], stream)
            waiting.append((piece, at, self._free_when(stream)))
            if len(waiting) > 1:               # the one before, while this one is on its way
                _take(target_bytes, *waiting.pop(0))
        for last in waiting:
            _take(target_bytes, *last)
        return target

    def _pieces(self, nbytes: int, unit: int) -> Iterator[tuple[NDArray[np.uint8], slice]]:
        """Give page-locked pieces of whole units, and which bytes they are for, each when it is free."""
        # Two of them, which are kept, and replaced where they are too small.
        size = min(max(PIECE_BYTES // unit, 1) * unit, nbytes) if nbytes else 0
        if size and (not self._staging or len(self._staging[0]) < size):
            for event in self._free:               # the old ones may still be read from
                if event is not None:
                    event.synchronize()
            self._staging = [self.pinned(size) for _ in range(2)]
            self._free = [None, None]
        # One after the other, once what was last done with it is over.
        for number, start in enumerate(range(0, nbytes, max(size, 1))):
            self._next_piece = number % 2
            if self._free[self._next_piece] is not None:
                self._free[self._next_piece].synchronize()
            stop = min(start + size, nbytes)
            yield self._staging[self._next_piece][:stop - start], slice(start, stop)

    def _free_when(self, stream: Any) -> Any:
        event = self._free[self._next_piece] = self.record(stream)
        return event

    def seconds(self, work: Callable[[], object]) -> float:
        """Time what `work` puts on the caller's stream, as the GPU sees it: it is kept busy until all is queued."""
        stream = self.caller_stream()
        cuda = self._cupy.cuda
        if "cover" not in self.cache:
            self.cache["cover"] = self.empty((2**29,), np.uint8), self.empty((2**29,), np.uint8)
        target, source = self.cache["cover"]
        for _ in range(8):                       # some milliseconds
            self.copy(target, source, stream)
        first, last = (cuda.Event() for _ in range(2))
        first.record(stream)
        work()
        last.record(stream)
        last.synchronize()
        return float(cuda.get_elapsed_time(first, last)) / 1e3

    # Kernels

    def call_torch(self, work: Callable[..., None], *arrays: Array) -> None:
        """Have torch do `work` on the caller's stream, given arrays of the GPU's memory as tensors that share it.

        Where torch finds no memory it is asked again without what CuPy keeps in reserve: `work` must take what it needs
        before it changes anything.

        Raises
        ------
        BackendError
            For what torch says of it.
        """
        import torch
        cuda: Any = torch.cuda
        pointer = self.caller_stream().ptr
        stream = cuda.ExternalStream(pointer, self.index) if pointer else cuda.default_stream(self.index)
        try:
            with cuda.device(self.index), cuda.stream(stream), torch.no_grad():
                tensors = [_tensor(x) for x in arrays]
                try:
                    work(*tensors)
                except cuda.OutOfMemoryError:
                    self._cupy.get_default_memory_pool().free_all_blocks()
                    work(*tensors)
        except Exception as error:
            raise BackendError(f"GPU {self.index} ({self.name}), torch: {type(error).__name__}: {error}") from error

    def compile(self, path: Path, names: Sequence[str], options: Sequence[str]) -> list[Any]:
        """Compile a file of CUDA C++ with NVRTC for this GPU, or load it from CuPy's cache; a kernel for each name.

        CuPy keeps a digest in each file, and compiles anew what is damaged.

        Raises
        ------
        BackendError
            If the cache can't be read or written.
        """
        module = self._cupy.RawModule(code=path.read_text(), options=tuple(options), name_expressions=list(names))
        with usable_cache():
            return [module.get_function(name) for name in names]

    def compile_for(self, architecture: str, path: Path, name: str, options: Sequence[str]) -> Any:
        """Compile one kernel with NVRTC for an architecture by name, or load it from a cache beside CuPy's.

        Raises
        ------
        BackendError
            If it does not compile, or the cache can't be read or written.
        """
        options = (f"-arch={architecture}", *OPTIONS, *options)
        with usable_cache():
            binary, lowered = binary_of(self._cupy.cuda.nvrtc, path, name, options)
            return self._cupy.RawModule(path=str(binary)).get_function(lowered)

    def tensor_map(self, x: Array, box: Sequence[int]) -> NDArray[Any]:
        """Describe an array to the hardware that copies boxes of it into shared memory, as a kernel's argument.

        Parameters
        ----------
        x : array of shape (n, heads, columns), of 16-bit numbers, contiguous and aligned to 16 bytes
            `columns` is a multiple of 8.
        box : sequence of int
            Shape of what is copied at a time; its last 64 columns at most. With the 128-byte swizzle; what is outside
            of the array becomes zeros.

        Returns
        -------
        array of shape (1,)
            A CUtensorMap, 128 bytes: CuPy passes a host array of one item by value.

        Raises
        ------
        BackendError
            If the driver refuses, or does not know it.
        """
        # Dimensions are counted from the last; strides leave it out.
        buffer = np.zeros(128 + 64, np.uint8)
        buffer = buffer[-buffer.ctypes.data % 64:][:128]                  # the driver wants it aligned to 64
        n, heads, columns = x.shape
        ones = (ctypes.c_uint32 * 3)(1, 1, 1)
        try:
            encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
        except (OSError, AttributeError) as error:           # a driver from before CUDA 12
            raise BackendError(f"cuTensorMapEncodeTiled: {error}") from error
        status = encode(
            ctypes.c_void_p(buffer.ctypes.data), UINT16, ctypes.c_uint32(3), ctypes.c_void_p(x.data.ptr),
            (ctypes.c_uint64 * 3)(columns, heads, n), (ctypes.c_uint64 * 2)(columns * 2, heads * columns * 2),
            (ctypes.c_uint32 * 3)(*reversed(box)), ones, NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS)
        if status:
            raise BackendError(f"cuTensorMapEncodeTiled: error {status} for shape {x.shape}, boxes of {tuple(box)}")
        return buffer.copy().view([("opaque", np.uint64, (16,))])

    def launch(self, kernel: Any, grid: tuple[int, ...], threads: int, shared_bytes: int, arguments: Sequence[Any],
               stream: Any) -> None:
        """Start blocks of `threads` threads of a kernel on `stream`.

        Arguments are GPU arrays, NumPy scalars, structs, and what `tensor_map` gives.
        """
        if shared_bytes > 40 * 1024:           # a kernel has 48 KiB unless it asks, its static share included
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        with stream:
            kernel(grid, (threads,), tuple(x.value if isinstance(x, Struct) else x for x in arguments),
                   shared_mem=shared_bytes)


def _uuid(index: int) -> str:
    """Ask the driver, as CuPy cuts a UUID at a zero byte; empty if it does not say."""
    driver = ctypes.CDLL("libcuda.so.1")
    device = ctypes.c_int()
    raw = (ctypes.c_ubyte * 16)()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetUuid_v2(raw, device):
        return ""
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"


def _tensor(x: Array) -> Any:
    """Give a tensor of torch that shares an array's memory."""
    import torch
    if x.dtype == BFLOAT16:                    # which DLPack can't name in every version
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


def _bytes(x: Any) -> Any:
    """Give a contiguous array as bytes."""
    return x.reshape(-1).view(np.uint8)


def _take(target: NDArray[np.uint8], piece: NDArray[np.uint8], at: slice, arrived: Any) -> None:
    arrived.synchronize()
    target[at] = piece


class Struct:
    """A struct that a kernel is given by value.

    Parameters
    ----------
    dtype : dtype
        Its fields, laid out as in C++.
    **fields : array or number
        Their values; of a GPU array its address.

    Attributes
    ----------
    value : array of shape (1,)
        The struct: CuPy passes a host array of one item by value.
    arrays : list
        The arrays whose addresses are in it: they live as long as it does.
    """

    def __init__(self, dtype: np.dtype[Any], **fields: Any) -> None:
        if set(fields) != set(dtype.names or ()):
            raise TypeError(f"expected the fields {dtype.names}, got {tuple(fields)}")
        self.value = np.zeros(1, dtype)
        self.arrays = [x for x in fields.values() if hasattr(x, "__cuda_array_interface__")]
        for name, x in fields.items():
            self.value[name] = x.data.ptr if hasattr(x, "__cuda_array_interface__") else x


class Event:
    """A mark on a stream. CuPy's own takes a failed GPU for one that is not done yet, for ever."""

    NOT_READY = 600                            # cudaErrorNotReady

    def __init__(self, cupy_event: Any, runtime: Any) -> None:
        self.cupy_event = cupy_event
        self._runtime = runtime

    @property
    def done(self) -> bool:
        """Whether what came before it on its stream is done.

        Raises
        ------
        BackendError
            If the GPU failed.
        """
        status = self._runtime.eventQuery(self.cupy_event.ptr)
        if status not in (0, self.NOT_READY):
            raise BackendError(f"the GPU failed: {self._runtime.CUDARuntimeError(status)}")
        return bool(status == 0)

    def synchronize(self) -> None:
        """Wait for it.

        Raises
        ------
        BackendError
            If the GPU failed.
        """
        try:
            self.cupy_event.synchronize()
        except self._runtime.CUDARuntimeError as error:
            raise BackendError(f"the GPU failed: {error}") from error


@functools.cache
def open_device(index: int) -> Device:
    """Give the device of that index, the same one each time. Local.

    Raises
    ------
    BackendError
        If there is no such GPU.
    """
    return Device(index)


@functools.cache
def _cupy() -> Any:
    import cupy
    return cupy

