"""What a call brings: checked on each rank, and told to all ranks in one record with named fields."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import device
from .arrays import as_array, as_host_array
from .backends.strided import in_place
from .checks import check_arrays, check_integer, check_key_bias, check_like, check_relative, check_seed, check_sinks
from .dtypes import DTYPES, accumulator, check_dtype
from .errors import BackendError, DtypeError, OptionError, RingError, ShapeError
from .mask_base import BaseMask
from .relative import Relative
from .score import dropout_keys
from .softmax import State

Array = Any                       # of NumPy, or of CuPy on a GPU
SUMMED_BYTES = 2**20              # of queries that all ranks have, by which they see that these are the same
NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES.values())}       # as a record has them
ON_HOST = -1                      # where host arrays are, among the indices of GPUs

# What each rank says of its call: what must be the same on all ranks, and how an error calls it ...
EQUAL = {"number": "number of the call that is differentiated", "seed": "seed",
         "print": "queries and sinks, where all ranks have them (by a checksum of the first MiB of each)",
         "cotangents": "dout, dlse, out and lse, where all ranks have the queries (by a checksum of their first MiB), "
                       "and tangents of those, of sinks and of relative",
         "tables": "numbers in relative (by a checksum)",
         "recorded": "requires_grad (0 no tensor requires a gradient here, 1 some does; or torch.no_grad())",
         "batched": "batch axis", "batch": "batch", "heads": "heads", "kv_heads": "kv_heads", "dim": "dim",
         "dim_v": "dim_v", "dtype": "dtype", "on_gpu": "place (0 the host, 1 a GPU)",
         "sinks": "sinks (0 none, 1 given)", "in_keys": "values (0 by v, 1 by dim_v)",
         "key_bias": "key_bias (0 none, 1 a number for each key, else so many, one for each head)",
         "relative": "relative (0 none, else so many tables)"}
OF_THE_CALL = ("number", "seed", "print", "cotangents", "tables", "recorded")      # which the plan does not go by
# ... and what may differ: whether the keys are frozen, by which the plan does not go either; the number of tokens, the
# index of the GPU that the arrays are on, whether a schedule that is chosen by its cost is to suit a backward pass too,
# and whether the bias leaves some key out.
RECORD = np.dtype([(name, np.int64) for name in ("frozen", *EQUAL, "n_q", "n_k", "gpu", "trains", "leaves_out")])


class Inputs(NamedTuple):
    """What a call is given; `out` and `lse` if it is to be differentiated by what came out of it."""

    q: Any
    k: Any
    v: Any
    sinks: Any = None
    seed: Any = 0
    out: Any = None
    lse: Any = None
    dim_v: Any = None
    key_bias: Any = None
    relative: Any = None


class Direction(NamedTuple):
    """A direction in which a call is differentiated: a tangent of each input; None where it does not change."""

    q: Any
    k: Any
    v: Any
    sinks: Any = None
    key_bias: Any = None
    relative: Any = None


@dataclass
class Call:
    """What one call works on: arrays with a batch axis where the backend computes, and where they came from.

    Attributes
    ----------
    q, k, v : arrays of shape (batch, tokens, heads, dim)
        Those of the caller, with any gaps between tokens, heads and elements of the batch; see `strided.in_place`.
    batched : bool
        Whether the caller's arrays have a batch axis.
    gpu : int
        Index of the GPU that the caller's arrays are on; ON_HOST for host arrays.
    in_keys : bool
        Whether v is the first numbers of k, and travels with it.
    seed : int
    dropout_keys : uint32 array
        See `score.dropout_keys`; empty without dropout.
    sinks : array of shape (heads,), accumulator dtype, optional
    key_bias : array of shape (batch, n_k, heads or 1), accumulator dtype, optional
        On the host, and then where the backend computes.
    bias_shape : tuple of int
        That the caller's has.
    leaves_out : bool
        Whether the bias leaves some key of this rank out.
    relative : Relative, optional
        Of all heads.
    seen : sequence of bool array of shape (rows, heads)
        For each element of the batch, which rows see any key that the bias of their head does not leave out, if it
        leaves some out; of the rows and heads that this rank finishes.
    out, lse : arrays
        The results; None before there are any.
    number : int
        Of the call on its communicator, from 1 on, which a backward pass names; 0 if it is not known.
    print, cotangents : int
        Checksums of the queries and sinks, and of what a backward pass starts from, if all ranks must have the same;
        else 0.
    trains : bool
        Whether a schedule that is chosen by its cost is to suit a backward pass too.
    recorded : bool
        Whether autograd has noted the call: then a backward pass may come, in which all ranks must take part.
    frozen : bool
        Whether a backward pass is to give no gradients of keys, values and their bias; once all ranks have agreed,
        whether no rank wants them.
    states : list of State
        One for each element of the batch, during the forward pass.
    direction : Direction, optional
        Arrays like q, k, v, sinks and key_bias, and a `Relative`, if the call is differentiated in it.
    """

    q: Array
    k: Array
    v: Array
    batched: bool
    gpu: int
    in_keys: bool
    seed: int
    dropout_keys: NDArray[np.uint32]
    sinks: NDArray[Any] | None
    key_bias: Array | None = None
    bias_shape: tuple[int, ...] = ()
    leaves_out: bool = False
    relative: Relative | None = None
    seen: Sequence[NDArray[np.bool_]] = ()
    out: Array = None
    lse: Array = None
    number: int = 0
    print: int = 0
    cotangents: int = 0
    trains: bool = False
    recorded: bool = False
    frozen: bool = False
    states: list[State] = field(default_factory=list)
    direction: Direction | None = None

    @classmethod
    def check(cls, inputs: Inputs, dropout: float, wanted: DTypeLike | None, mask: BaseMask | None = None) -> Call:
        """Take what a call is given, or raise an error that says what is wrong with it. Local.

        Parameters
        ----------
        inputs : Inputs
        dropout : float
            Without, the seed does not matter.
        wanted : dtype, optional
            Accumulator asked for.
        mask : BaseMask, optional
            Whose grid the tables of a bias by distance are for.

        Raises
        ------
        ShapeError, DtypeError, OptionError, BackendError
            If the arrays do not go together, or are not in one place.
        """
        in_keys = inputs.dim_v is not None
        if in_keys == (inputs.v is not None):
            raise OptionError("v: expected values, or in their place dim_v, so many first numbers of each key, got "
                              f"{'both' if in_keys else 'neither'}")
        given = {"q": inputs.q, "k": inputs.k} | ({} if in_keys else {"v": inputs.v})
        if inputs.out is not None:
            given |= {"out": inputs.out, "lse": inputs.lse}
        arrays = {name: as_array(x, name) for name, x in given.items()}
        if in_keys:
            arrays["v"] = _first_numbers(arrays["k"], inputs.dim_v)
        q, k, v = (arrays[name] for name in "qkv")
        batched = check_arrays(q, k, v)
        gpu = _place(arrays)
        acc_dtype = accumulator(q.dtype, wanted)
        if inputs.out is not None:
            check_like("out", arrays["out"], (*q.shape[:-1], v.shape[-1]), q.dtype)
            check_like("lse", arrays["lse"], q.shape[:-1], acc_dtype)
        sinks = check_sinks(inputs.sinks, q.shape[-2], acc_dtype)
        key_bias: Array | None = None
        if inputs.key_bias is not None:
            key_bias = check_key_bias(_bias_on_host(inputs.key_bias, gpu), k.shape, q.shape[-2], acc_dtype)
        relative: Relative | None = None
        if inputs.relative is not None:
            relative = check_relative(inputs.relative, mask.axes if mask else (), q.shape[-2], acc_dtype)
        seed = check_seed(inputs.seed) if dropout else 0
        arrays = {name: _batched(x, batched, gpu, strided=name in "qkv") for name, x in arrays.items()}
        batch, _, heads, _ = arrays["q"].shape
        bias_shape: tuple[int, ...] = ()
        leaves_out = False
        if key_bias is not None:
            bias_shape = key_bias.shape
            leaves_out = bool(np.isneginf(key_bias).any())
            key_bias = key_bias.reshape(batch, k.shape[-3], heads if len(bias_shape) == k.ndim - 1 else 1)
            if gpu == ON_HOST:
                arrays |= {name: without_left_out(arrays[name], key_bias) for name in "kv"}
        if in_keys:
            arrays["v"] = _first_numbers(arrays["k"], inputs.dim_v)        # of what was copied, if it was
        keys = dropout_keys(seed, batch, heads) if dropout else np.empty((batch, 0), np.uint32)
        return cls(arrays["q"], arrays["k"], arrays["v"], batched, gpu, in_keys, seed, keys, sinks, key_bias,
                   bias_shape, leaves_out, relative, out=arrays.get("out"), lse=arrays.get("lse"))

    def check_cotangents(self, dout: Any, dlse: Any) -> tuple[Array, Array | None]:
        """Take what a backward pass starts from; give it with a batch axis. Local.

        Raises
        ------
        ShapeError, DtypeError, BackendError
            If it does not go with the results of the call.
        """
        taken: list[Array | None] = []
        for name, x, like in (("dout", dout, self.out), ("dlse", dlse, self.lse)):
            if name == "dlse" and x is None:
                taken.append(None)
                continue
            array = as_array(x, name)
            check_like(name, array, self.given(like).shape, like.dtype)
            if isinstance(array, np.ndarray) == self.on_gpu:
                raise BackendError(f"{name}: expected it where the call's arrays are, on "
                                   f"{'a GPU' if self.on_gpu else 'the host'}; copy it")
            taken.append(_batched(array, self.batched, self.gpu))
        return taken[0], taken[1]

    def take_direction(self, direction: Direction) -> None:
        """Take the direction in which a call on the host is differentiated, with a batch axis. Local.

        Raises
        ------
        ShapeError, DtypeError, OptionError, BackendError
            If it does not go with the inputs of the call.
        """
        taken = []
        if self.in_keys and direction.v is not None:
            raise OptionError("v_dot: expected none, as values are in the keys, and their tangents in k_dot")
        for name, x, like in zip("qk" if self.in_keys else "qkv", direction, (self.q, self.k, self.v), strict=False):
            if x is None:
                taken.append(np.zeros(like.shape, like.dtype))
                continue
            array = as_host_array(x, f"{name}_dot")
            check_like(f"{name}_dot", array, self.given(like).shape, like.dtype)
            taken.append(_batched(array, self.batched, self.gpu, strided=True))
        if self.in_keys:
            taken.append(_first_numbers(taken[1], self.v.shape[3]))
        self.direction = Direction(taken[0], taken[1], taken[2], _tangent("sinks", direction.sinks, self.sinks),
                                   _tangent("key_bias", direction.key_bias, self.key_bias, self.bias_shape),
                                   _tangent_by_distance(direction.relative, self.relative))

    @property
    def on_gpu(self) -> bool:
        """Whether the caller's arrays are on a GPU."""
        return self.gpu != ON_HOST

    @property
    def keys(self) -> tuple[Array, ...]:
        """The block of this rank: k and v, or k alone if that has v in it, and their bias if there is one."""
        values = () if self.in_keys else (self.v,)
        return (self.k, *values) if self.key_bias is None else (self.k, *values, self.key_bias)

    def given(self, x: Array) -> Array:
        """View an array as the caller's are: with the batch axis, or without. Local."""
        return x if self.batched else x[0]

    def make_results(self, backend: Any, acc_dtype: np.dtype[Any]) -> None:
        """Make room for the results where a backend computes, unless it is there. Local."""
        if self.out is None:
            self.out = backend.empty((*self.q.shape[:3], self.v.shape[3]), self.q.dtype)
            self.lse = backend.empty(self.q.shape[:3], acc_dtype)

    def to_device(self, backend: Any, acc_dtype: np.dtype[Any]) -> None:
        """Bring the arrays to where a backend computes, with room for the results. Local."""
        self.q, self.k, self.v = (backend.to_device(x) for x in (self.q, self.k, self.v))
        if self.key_bias is not None:
            if self.on_gpu and self.leaves_out:
                left_out = _left_out(self.key_bias)
                self.k, self.v = (backend.without_left_out(x, left_out) for x in (self.k, self.v))
            self.key_bias = backend.to_device(self.key_bias)
        self.make_results(backend, acc_dtype)
        self.out, self.lse = backend.to_device(self.out), backend.to_device(self.lse)

    def record(self) -> NDArray[np.uint8]:
        """Encode what the other ranks must know of this call. Local."""
        batch, n_q, heads, dim = self.q.shape
        _, n_k, kv_heads, dim_v = self.v.shape
        seed = self.seed - 2**64 * (self.seed >= 2**63)          # the same bits, signed
        of_tables = (0, 0)
        if self.relative is not None:
            of_tables = self.relative.checksum(), len(self.relative.tables)
        return _record(self.frozen, self.number, seed, self.print, self.cotangents, of_tables[0], self.recorded,
                       self.batched, batch, heads, kv_heads, dim, dim_v, NUMBERS[self.q.dtype], self.on_gpu,
                       self.sinks is not None, self.in_keys, 0 if self.key_bias is None else self.key_bias.shape[2],
                       of_tables[1], n_q, n_k, self.gpu, self.trains, self.leaves_out)


@functools.lru_cache(maxsize=64)
def _record(*fields: int) -> NDArray[np.uint8]:
    """Encode the fields of a record, for reading only."""
    record = np.array([fields], RECORD).view(np.uint8)
    record.flags.writeable = False
    return record


NO_RECORD = np.zeros(1, RECORD).view(np.uint8)      # of a rank that has failed


class Records:
    """What all ranks say of a call, decoded and checked: they go together. Local.

    Parameters
    ----------
    rows : list of uint8 array
        `Call.record` of each rank.

    Attributes
    ----------
    key : bytes
        Of all that a plan goes by.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        If a rank's call differs from that of rank 0; the same on all ranks.
    """

    def __init__(self, rows: list[NDArray[np.uint8]]) -> None:
        self._rows = b"".join(row.data for row in rows)
        self._table = np.frombuffer(self._rows, RECORD)
        _check_equal(self._table)
        numbers = self._table.view(np.int64).reshape(len(self._table), -1)
        self.key = numbers[:, 1 + len(OF_THE_CALL):].tobytes()

    def say(self, rows: list[NDArray[np.uint8]]) -> bool:
        """Say whether the ranks' records of another call are the same. Local."""
        return b"".join(row.data for row in rows) == self._rows

    @property
    def n_q(self) -> list[int]:
        """Tokens of q on each rank."""
        return self._column("n_q")

    @property
    def n_k(self) -> list[int]:
        """Tokens of k and v on each rank."""
        return self._column("n_k")

    @property
    def gpus(self) -> NDArray[np.int64]:
        """Index of the GPU that the arrays of each rank are on; ON_HOST for host arrays."""
        gpus: NDArray[np.int64] = self._table["gpu"]
        return gpus

    @property
    def frozen(self) -> bool:
        """Whether no rank wants gradients of keys, values and their bias."""
        return bool(self._table["frozen"].all())

    @property
    def trains(self) -> bool:
        """Whether a schedule is to suit a backward pass too, on any rank."""
        return bool(self._table["trains"].any())

    @property
    def leave_out(self) -> bool:
        """Whether the bias leaves some key out, of any rank."""
        return bool(self._table["leaves_out"].any())

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of q, k and v."""
        return list(DTYPES.values())[self.common("dtype")]

    def common(self, name: str) -> int:
        """Give what is the same on all ranks: batch, heads, kv_heads, dim, dim_v, key_bias, relative. Local."""
        return int(self._table[name][0])

    def of_keys(self, n_k: Sequence[int]) -> Records:
        """Give the records of such a call with so many tokens of k and v on each rank. Local."""
        table = self._table.copy()
        table["n_k"] = n_k
        return Records([table.view(np.uint8)])

    def _column(self, name: str) -> list[int]:
        numbers: list[int] = self._table[name].tolist()
        return numbers

    def warn_of_order(self) -> None:
        """Warn if the arrays look like (heads, tokens, dim), as torch has them. Local.

        More than 64 heads, and more heads than tokens in all, are rarely meant.
        """
        heads, kv_heads = self.common("heads"), self.common("kv_heads")
        tokens = sum(self.n_q)
        if heads > 64 and heads > tokens > 0 and kv_heads > 64 and kv_heads > sum(self.n_k) > 0:
            warnings.warn(f"q, k and v: {heads} heads and {tokens} tokens in all, which looks like (heads, tokens, "
                          "dim); expected is (tokens, heads, dim): x.swapaxes(-3, -2), unless it is meant",
                          stacklevel=2)


def checksum(*arrays: Array | None) -> int:
    """Give a checksum of the beginnings of arrays, wherever they are; None does not count. Local."""
    total = 0
    for x in arrays:
        if x is not None:
            total = zlib.crc32(_beginning(x).reshape(-1).view(np.uint8).data, total)
    return total


def _bias_on_host(bias: Any, gpu: int) -> Any:
    """Give a bias of the keys on the host, where it is looked at, if it is on the GPU that k is on."""
    x = as_array(bias, "key_bias")
    if isinstance(x, np.ndarray) or gpu == ON_HOST:
        return x
    if device.index_of(x) != gpu:
        raise BackendError(f"key_bias: expected it on the host or where k is, on GPU {gpu}, got it on GPU "
                           f"{device.index_of(x)}; copy it")
    return _copied(x)


def _beginning(x: Array) -> NDArray[Any]:
    """Give the first rows of an array on the host, and never copy more than those."""
    while x.nbytes > SUMMED_BYTES:
        x = x[:SUMMED_BYTES // x[0].nbytes] if x[0].nbytes <= SUMMED_BYTES else x[0]
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else _copied(x)


def _copied(x: Array) -> NDArray[Any]:
    """Copy an array on a GPU to the host."""
    place = device.open_device(device.index_of(x))
    with place.current():
        return place.host(place.contiguous(x))


def no_call() -> RingError:
    """Make the error of a backward pass without a call before it. Local."""
    return RingError("backward: expected a call before it on this object, and there is none, it failed, or did not "
                     "keep its arrays, or backward_of came after it; call the object first, or use backward_of or "
                     "ring_attention_backward")


def _check_equal(table: NDArray[Any]) -> None:
    """Raise an error unless what must be equal is, naming the first rank that differs from rank 0."""
    numbers = table.view(np.int64).reshape(len(table), -1)[:, 1:1 + len(EQUAL)]
    if (numbers == numbers[0]).all():
        return
    for name in sorted(EQUAL, key=lambda name: name == "tables"):        # how many there are says more than a checksum
        text = EQUAL[name]
        values = table[name]
        for rank in np.flatnonzero(values != values[0]):
            got, want = (list(DTYPES)[x] if name == "dtype" else x for x in (values[rank], values[0]))
            kind = DtypeError if name == "dtype" else OptionError if name in OF_THE_CALL else ShapeError
            raise kind(f"rank {rank}: expected the same {text} on every rank, got {got} here and {want} on rank 0")


def _first_numbers(k: Array, dim_v: Any) -> Array:
    """View so many first numbers of each key, which are values too."""
    if not k.ndim:                        # which is refused by its shape
        return k
    return k[..., :check_integer("dim_v", dim_v, 1, max(1, k.shape[-1]) + 1)]


def _place(arrays: dict[str, Array]) -> int:
    """Give the index of the GPU that the arrays are on; ON_HOST for host arrays."""
    places = [ON_HOST if isinstance(x, np.ndarray) else device.index_of(x) for x in arrays.values()]
    if len(set(places)) > 1:
        named = ", ".join(f"{name} on {'the host' if place == ON_HOST else f'GPU {place}'}"
                          for name, place in zip(arrays, places, strict=True))
        *others, last = arrays
        raise BackendError(f"{', '.join(others)} and {last}: expected all on the host or all on one GPU, got {named}; "
                           "copy them")
    return places[0]


def _left_out(key_bias: NDArray[Any]) -> NDArray[np.bool_]:
    """Say which keys a bias leaves out for all heads."""
    return np.asarray(np.isneginf(key_bias).all(axis=2))


def _tangent(name: str, x: Any, like: NDArray[Any] | None, shape: tuple[int, ...] | None = None
             ) -> NDArray[Any] | None:
    """Take the tangent of an array, which the caller may have in another shape; zeros if there is none."""
    if like is None:
        if x is not None:
            raise OptionError(f"{name}_dot: expected none, as the call has no {name}; leave it out, or give {name}")
        return None
    if x is None:
        return np.zeros_like(like)
    shape = like.shape if shape is None else shape
    array = as_host_array(x, f"{name}_dot")
    check_dtype(array.dtype, f"{name}_dot")
    if array.shape != shape:
        raise ShapeError(f"{name}_dot: expected shape {shape}, that of {name}, got {array.shape}")
    return array.astype(like.dtype).reshape(like.shape)


def _tangent_by_distance(given: Any, relative: Relative | None) -> Relative | None:
    """Take the tangent of a bias by distance, a table or one for each axis, any of them None for zeros."""
    if relative is None:
        _tangent("relative", given, None)
        return None
    tables = [None] * len(relative.widths) if given is None else given if isinstance(given, (tuple, list)) else [given]
    if given is not None and (isinstance(given, (tuple, list)) != bool(relative.sizes)
                              or len(tables) != len(relative.widths)):
        expected = f"{len(relative.widths)} tables, one for each axis" if relative.sizes else "one table, an array"
        raise ShapeError(f"relative_dot: expected {expected}, as relative has, got a "
                         f"{type(given).__name__}")
    taken = [_tangent("relative", x, np.zeros((len(table), width), table.dtype))
             for x, table, width in zip(tables, relative.tables, relative.widths, strict=True)]
    return relative.with_tables([x for x in taken if x is not None])


def without_left_out(x: Array, key_bias: NDArray[Any]) -> Array:
    """Give k or v with 0 where the bias leaves a key out for all heads, if what is there is not finite. Local."""
    left_out = _left_out(key_bias)
    if not isinstance(x, np.ndarray) or np.isfinite(x[left_out]).all():      # 0 x NaN is NaN: padding may be anything
        return x
    x = x.copy()
    x[left_out] = 0
    return x


def _batched(x: Array, batched: bool, gpu: int, strided: bool = False) -> Array:
    """Give an array a batch axis; on the host make it contiguous, or if `strided` only such as backends can read."""
    x = x if batched else x[None]
    if gpu != ON_HOST:
        return x
    return in_place(x) if strided else np.ascontiguousarray(x)
