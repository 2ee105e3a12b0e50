"""A device over host memory, as lazy as a GPU: what is put on a stream runs later, in turns that are drawn by lot.

`FakeDevice` has the methods of `ringmpi.device.Device`. Nothing runs until somebody asks whether an event is done, or
waits for one; then each stream may take a step or may not. What waits for too little therefore reads or writes too
early, in most runs. Memory begins as bytes 0xFF: NaN in every dtype.
"""

import random
import weakref
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from ringmpi.errors import BackendError


class FakeStream:
    """A queue of what is to be done, in order; `speed` is the chance that a turn takes a step."""

    def __init__(self, device, speed):
        self.device = device
        self.speed = speed
        self.queue = deque()

    def __enter__(self):
        self.device.current_streams.append(self)
        return self

    def __exit__(self, *_):
        self.device.current_streams.pop()

    def step(self):
        """Run what is first, unless it waits for an event that is not done."""
        if self.queue[0]() is not False:
            self.queue.popleft()

    def synchronize(self):
        self.device.record(self).synchronize()


class FakeEvent:
    def __init__(self, device):
        self.device = device
        self.happened = False

    @property
    def done(self):
        self.device.turn()
        return self.happened

    def synchronize(self):
        for _ in range(10**6):
            if self.done:
                return
        raise RuntimeError("the event never happens: a stream is stuck")


class FakeArray:
    """What CuPy's arrays can do and the library uses; `host` is the memory itself, for fake kernels and for tests.

    It has neither a buffer nor DLPack, so nothing takes it for host memory by accident.
    """

    def __init__(self, device, host):
        self.device = device
        self.host = host

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    size = property(lambda self: self.host.size)
    ndim = property(lambda self: self.host.ndim)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    strides = property(lambda self: self.host.strides)
    flags = property(lambda self: self.host.flags)
    data = property(lambda self: SimpleNamespace(ptr=self.host.ctypes.data))

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "version": 3}

    def __array__(self, *_, **__):
        raise TypeError("a device array is not turned into a host array without saying so; use get()")

    def __len__(self):
        return len(self.host)

    def __getitem__(self, key):
        part = self.host[key]
        return FakeArray(self.device, part if isinstance(part, np.ndarray) else self.host[key, ...])

    def __setitem__(self, key, value):
        target = self.host[key, ...] if isinstance(key, int) else self.host[key]
        if isinstance(value, FakeArray):
            source = value.host
            self.device.put(lambda: np.copyto(target, source))
        else:
            source = np.array(value)       # CUDA reads host memory that is not page-locked at once
            self.device.put(lambda: np.copyto(target, source, casting="unsafe"))

    def fill(self, value):
        self[...] = value

    def view(self, dtype):
        return FakeArray(self.device, self.host.view(dtype))

    def reshape(self, *shape):
        view = self.host.view()
        view.shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return FakeArray(self.device, view)

    def get(self):
        """Copy to the host after what is on the current stream."""
        self.device.caller_stream().synchronize()
        return self.host.copy()


class FakeDevice:
    """A device whose streams have speeds between 0.05 and 1, drawn from `seed`."""

    sure_bytes = -1

    def __init__(self, seed=0):
        self.random = random.Random(seed)
        self.index = 0
        self.name = "fake"
        self.uuid = f"GPU-fake-{seed}"
        self.capability = 9, 0
        self.processors = 4
        self.shared_bytes = self.shared_bytes_processor = 2**17
        self.streams = []
        self.cache = {}
        self.locked = {}                 # bytes of host memory that is page-locked, by address
        self.current_streams = [self.new_stream()]

    @contextmanager
    def current(self):
        yield

    # Turns

    def put(self, work, stream=None):
        """Queue `work` on a stream, by default the current one; work that gives False is tried again."""
        (stream or self.caller_stream()).queue.append(work)

    def turn(self):
        """Let each stream take a step, or not, in any order."""
        busy = [stream for stream in self.streams if stream.queue and self.random.random() < stream.speed]
        self.random.shuffle(busy)
        for stream in busy:
            stream.step()

    # Memory

    def empty(self, shape, dtype):
        shape = tuple(shape)
        flat = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        return FakeArray(self, flat.view(dtype).reshape(shape))

    def message_buffer(self, nbytes):
        return self.empty((nbytes,), np.uint8)

    def pinned(self, nbytes):
        return np.full(nbytes, 0xFF, np.uint8)

    def lock_pages(self, memory):
        if memory.ctypes.data % 4096:
            raise ValueError("pages are locked as a whole")
        self.locked[memory.ctypes.data] = memory.nbytes
        weakref.finalize(memory, self.locked.pop, memory.ctypes.data)

    def view(self, x):
        return x

    def contiguous(self, x):
        if x.flags.c_contiguous:
            return x
        made = self.empty(x.shape, x.dtype)
        made[...] = x
        return made

    # Copies

    def take_rows(self, target, source, rows):
        if not (target.flags.c_contiguous and source.flags.c_contiguous):
            raise ValueError("rows are copied between contiguous arrays")
        numbers = np.array(rows)
        self.put(lambda: np.take(source.host, numbers, axis=0, out=target.host, mode="clip"))

    def upload(self, target, source, stream):
        self._copy(target.host, source, stream)

    def download(self, target, source, stream):
        self._copy(target, source.host, stream)

    def copy(self, target, source, stream):
        self._copy(target.host, source.host, stream)

    def clear(self, x, stream):
        if not x.flags.c_contiguous:
            raise ValueError("a contiguous array is cleared")
        self.put(lambda: x.host.fill(0), stream)

    def _copy(self, target, source, stream):
        if target.nbytes != source.nbytes or not (target.flags.c_contiguous and source.flags.c_contiguous):
            raise ValueError("a copy is between contiguous arrays of one size")
        to, of = (x.reshape(-1).view(np.uint8) for x in (target, source))
        self.put(lambda: np.copyto(to, of), stream)

    def array(self, x):
        target = self.empty(x.shape, x.dtype)
        target[...] = x
        return target

    def host(self, x):
        return x.get()

    # Streams and events

    def caller_stream(self):
        return self.current_streams[-1]

    def new_stream(self):
        stream = FakeStream(self, self.random.choice([0.05, 0.2, 0.6, 1.0]))
        self.streams.append(stream)
        return stream

    def record(self, stream):
        event = FakeEvent(self)
        self.put(lambda: setattr(event, "happened", True), stream)
        return event

    def follow(self, stream, event):
        self.put(lambda: event.happened, stream)

    # Kernels

    def call_torch(self, work, *arrays):
        import torch
        tensors = [torch.from_numpy(x.host.view("i2")).view(torch.bfloat16) if x.dtype.name == "bfloat16"
                   else torch.from_numpy(x.host) for x in arrays]
        try:
            work(*(x.clone() for x in tensors))            # torch refuses at once what it does not take
        except Exception as error:
            raise BackendError(f"torch: {error}") from error
        self.put(lambda: work(*tensors) and None)

    def compile(self, path, names, options):
        raise NotImplementedError

    def launch(self, kernel, grid, threads, shared_bytes, arguments, stream):
        self.put(lambda: kernel(grid, threads, shared_bytes, arguments) and None, stream)
