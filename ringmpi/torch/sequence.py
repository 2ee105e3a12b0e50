"""A sequence of tokens that is split over ranks, as torch's modules meet it: `sequence_parallel`."""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..attention import RingAttention
from ..call import NO_RECORD
from ..checks import check_timeout
from ..errors import DtypeError, InternalError, OptionError, RingError
from ..layout import Layout, check_spec, make, resolve
from ..mask import Mask
from ..mask_base import BaseMask
from ..mpi.comm import TIMEOUT, private_comm

# Masks by their numbers, by which the operator of `torch.compile` names them.
FULL, CAUSAL, GIVEN = range(3)
TOP_LEFT = Mask(causal=True, q_offset=0)      # torch's `is_causal`: query i sees keys 0 .. i, however many there are
OF_CALLS = {"kv_layout", "scale", "softcap", "dropout", "alibi"}
OPTIONS = set(inspect.signature(RingAttention).parameters) - {"comm", "mask", "layout"} - OF_CALLS
KEPT = 32                                     # attentions, and masks besides these
BUCKET = 2**24                                # numbers that are summed over the ranks at a time
_active: list[SequenceParallel] = []          # of the process: autograd recomputes on threads of its own
_numbers = itertools.count()
_all: weakref.WeakValueDictionary[int, SequenceParallel] = weakref.WeakValueDictionary()


class Scores(NamedTuple):
    """What a call says of its scores, and which mask it means: by all of it an attention is found again."""

    mask: int
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None


class SequenceParallel:
    """A sequence that is split over the ranks of *comm*; what `sequence_parallel` gives. Collective over *comm*.

    A context manager: within it `scaled_dot_product_attention`, and the models of transformers, take their tokens for
    this rank's part of the sequence. It may be entered again and again, and keeps plans and buffers from one time to
    the next, until it is garbage; a backward pass may come after it is left.

    Attributes
    ----------
    comm : MPI.Intracomm
    layout : str or Layout
    mask : mask, optional
        As they were given.
    options : dict
        Of each `RingAttention` within it.
    private : Comm
        The library's communicator.
    number : int
        Of this object, in this process.
    rank, size : int
        This rank, and the number of ranks.
    sums : torch.dtype
        Of sums of inputs that are not float64.
    """

    def __init__(self, comm: Any, layout: str | Layout, mask: BaseMask | Sequence[BaseMask] | None,
                 options: dict[str, Any]) -> None:
        taken = OF_CALLS & options.keys()
        unknown = options.keys() - OPTIONS - OF_CALLS
        self.timeout, wrong = check_timeout(options.get("timeout", TIMEOUT))
        self.comm = comm
        self.layout = layout
        self.mask = mask
        self.number = next(_numbers)
        self._mask_numbers = itertools.count(GIVEN + 1)
        self.sums = torch.float64 if options.get("accumulator") in ("float64", np.float64) else torch.float32
        self.private = private_comm(comm, self.timeout)
        self.rank = self.private.rank
        self.size = self.private.size
        self.options = options
        self._masks: OrderedDict[int, Any] = OrderedDict({FULL: None, CAUSAL: TOP_LEFT, GIVEN: mask})
        self._attentions: OrderedDict[Scores, RingAttention] = OrderedDict()
        with self.private.noting() as failures:
            if wrong:
                raise OptionError(wrong)
            if taken:
                raise OptionError(f"sequence_parallel: expected no {', '.join(sorted(taken))}, which each call says "
                                  "for itself")
            if unknown:
                raise OptionError(f"sequence_parallel: expected options of RingAttention, got {', '.join(unknown)}")
            check_spec(layout)
        self.private.exchange("sequence_parallel", self.timeout, failures=failures)
        _all[self.number] = self

    def positions(self, length: int) -> Tensor:
        """Give the positions of this rank's tokens in a sequence. Local.

        Parameters
        ----------
        length : int
            Tokens of the whole sequence; a layout that is a name splits any number of them.

        Returns
        -------
        int64 tensor of shape (n,)
            Increasing.
        """
        return torch.from_numpy(make(self.layout, length, self.size).positions(self.rank).copy())

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """Give this rank's tokens of what all ranks have, a copy; differentiable. Local.

        Parameters
        ----------
        x : tensor
            Of the whole sequence: (batch, tokens) of numbers, say.
        dim : int
            The axis of the tokens.
        """
        return x.index_select(dim, self.positions(x.shape[dim]).to(x.device))

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Put the tokens of all ranks together, on all ranks; without a graph. Collective over *comm*.

        Parameters
        ----------
        x : tensor
            Of this rank's tokens; the ranks may have other numbers of them, as the layout says.
        dim : int
            The axis of the tokens.

        Returns
        -------
        tensor
            Of the whole sequence, in its order, where `x` is.

        Raises
        ------
        RingError
            One of its children, the same on every rank: other shapes or dtypes, or other numbers of tokens than the
            layout gives the ranks.
        """
        mine = np.empty(0, np.uint8)
        options: dict[str, Any] = {}
        with self.private.noting() as failures:
            tokens = x.detach().movedim(dim, 0).cpu()
            flat = tokens.new_empty(tokens.numel()).copy_(tokens.reshape(-1))
            mine = np.concatenate([np.array([len(tokens)]).view(np.uint8), flat.view(torch.uint8).numpy()])
            options = {"dtype": str(x.dtype), "shape but for the tokens": tuple(tokens.shape[1:]), "dim": dim}
        rows = self.private.exchange("SequenceParallel.gather", self.timeout, mine, failures=failures, options=options)
        counts = [int(row[:8].view(np.int64)[0]) for row in rows]
        layout = resolve(self.layout, counts)
        whole = tokens.new_empty(layout.length, *tokens.shape[1:])
        width = math.prod(tokens.shape[1:])
        for rank, row in enumerate(rows):
            part = tokens.new_empty(counts[rank] * width)
            part.view(torch.uint8).numpy()[:] = row[8:]
            whole[torch.from_numpy(layout.positions(rank).copy())] = part.reshape(counts[rank], *tokens.shape[1:])
        return whole.to(x.device).movedim(0, dim)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of parameters that all ranks have, in place. Collective over *comm*.

        Each rank's gradients are those of its share of the loss; the sum is that of the whole. Where a rank has none
        and another does, it counts as 0. Sums of 16-bit gradients are made in float32.

        Parameters
        ----------
        parameters : iterable of tensors
            The same on all ranks, in the same order: ``model.parameters()``.

        Raises
        ------
        RingError
            One of its children, the same on every rank: other parameters.
        """
        tensors: list[Tensor] = []
        with self.private.noting() as failures:
            tensors = [x for x in parameters if x.requires_grad]
            for x in tensors:
                if x.is_complex() or (x.grad is not None and x.grad.layout != torch.strided):
                    raise DtypeError(f"sum_gradients: expected real gradients that are dense, got {x.dtype}, "
                                     f"{'none' if x.grad is None else x.grad.layout}")
        has = np.array([x.grad is not None for x in tensors], np.uint8)
        rows = self.private.exchange("SequenceParallel.sum_gradients", self.timeout, has, failures=failures,
                                   options={"parameters": [(tuple(x.shape), str(x.dtype)) for x in tensors]})
        some = [x for x, any_has in zip(tensors, np.any(rows, axis=0), strict=True) if any_has]
        for parameter in some:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in (torch.float32, torch.float64):
            gradients = [x.grad for x in some if (x.dtype == torch.float64) == (dtype == torch.float64)]
            for bucket in _buckets(gradients):
                self._sum(bucket, dtype)

    def _sum(self, gradients: list[Tensor], dtype: torch.dtype) -> None:
        """Sum some gradients over the ranks."""
        mine = torch.cat([x.reshape(-1).to("cpu", dtype) for x in gradients]).numpy()
        total = np.empty_like(mine)
        request = self.private.comm.Iallreduce(mine, total)
        self.private.wait([request], self.timeout,
                          lambda: f"{self.private.name()} waited for the gradients of the others")
        for gradient, part in zip(gradients, torch.from_numpy(total).split([x.numel() for x in gradients]),
                                  strict=True):
            gradient.copy_(part.reshape(gradient.shape))

    def number_of(self, mask: Any) -> int:
        """Give the number of a mask, by which calls name it. Local."""
        for number, known in self._masks.items():
            if known is mask or (known is not None and mask is not None and known == mask):
                if number > GIVEN:
                    self._masks.move_to_end(number)
                return number
        number = next(self._mask_numbers)
        self._masks[number] = mask
        if len(self._masks) > KEPT + GIVEN + 1:
            del self._masks[next(itertools.islice(self._masks, GIVEN + 1, None))]
        return number

    def attention(self, scores: Scores) -> RingAttention:
        """Give the attention for calls like this one; it is kept. Collective over *comm*."""
        if scores in self._attentions:
            self._attentions.move_to_end(scores)
            return self._attentions[scores]
        attention = RingAttention(self.comm, mask=self._masks[scores.mask], layout=self.layout, scale=scores.scale,
                                  dropout=scores.dropout, softcap=scores.softcap, **self.options)
        self._attentions[scores] = attention
        if len(self._attentions) > KEPT:          # calls that are to be differentiated keep hold of theirs
            self._attentions.popitem(last=False)
        return attention

    def agree_on_seed(self, drawn: Tensor) -> int:
        """Give the seed of dropout that rank 0 has drawn, on all ranks. Collective over *comm*."""
        return int(self.private.allgather([drawn.item()], self.timeout)[0, 0])

    def refuse(self, error: RingError, scores: Scores | None = None) -> NoReturn:
        """Raise what is wrong with a call of this rank, on all ranks that make it. Collective over *comm*.

        The others may make the attention for such a call first.
        """
        if scores is not None:
            self.attention(scores)
        self.private.exchange("forward", self.timeout, NO_RECORD, failures=[error])
        raise InternalError("an error was not told")

    def __enter__(self) -> SequenceParallel:
        _active.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        del _active[max(place for place, one in enumerate(_active) if one is self)]


def sequence_parallel(comm: Any, *, layout: str | Layout = "contiguous",
                      mask: BaseMask | Sequence[BaseMask] | None = None, **options: Any) -> SequenceParallel:
    """Give a context in which attention is over a sequence that is split over ranks. Collective over *comm*.

    Parameters
    ----------
    comm : MPI.Intracomm
    layout : str or Layout
        Which tokens each rank has; see `RingAttention`. A name says so for sequences of any length.
    mask : Mask, Grid or a list of these, optional
        What queries see, in all calls; without, a call's `is_causal` says it.
    **options
        `backend`, `threads`, `timeout`, `accumulator`, `schedule`, `order` and others of `RingAttention`, but those
        that a call has: `scale`, `softcap`, `dropout` and `alibi`.

    Returns
    -------
    SequenceParallel

    Raises
    ------
    RingError
        One of its children, the same on every rank.

    Notes
    -----
    Make it once, and enter it as often as need be: what was compiled within one is compiled anew in another. What a
    backward pass computes once more (`torch.utils.checkpoint`) is to be computed within the same context.

    Examples
    --------
    ::

        with ringmpi.torch.sequence_parallel(comm, layout="striped") as sequence:
            x = embed(sequence.shard(tokens), sequence.positions(tokens.shape[1]))
            q, k, v = split_heads(x)                      # (batch, heads, this rank's tokens, dim)
            out = ringmpi.torch.scaled_dot_product_attention(q, k, v, is_causal=True)
            ...
            loss.backward()
            sequence.sum_gradients(model.parameters())
    """
    return SequenceParallel(comm, layout, mask, options)


def current() -> SequenceParallel:
    """Give the innermost context that this process is in. Local.

    Raises
    ------
    OptionError
        If it is in none: attention of one rank's tokens among themselves would look right and not be.
    """
    if not _active:
        raise OptionError("expected to be called within ringmpi.torch.sequence_parallel(comm), which says over which "
                          "ranks the sequence is split; MPI.COMM_SELF is one rank that has all of it")
    return _active[-1]


def by_number(number: int) -> SequenceParallel:
    """Give the object of a number. Local."""
    found = _all.get(number)
    if found is None:
        raise RingError("the sequence_parallel of this graph is gone; keep it as long as what was compiled within it")
    return found


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Put tensors together that are not too large to be summed at once."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not buckets or tensor.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets
