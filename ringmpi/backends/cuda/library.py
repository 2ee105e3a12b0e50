"""Torch's kernels in the place of ours, where torch is installed: the gradients of a block in 16-bit types.

They are cuDNN's and FlashAttention's, behind private operators of torch that differentiate a block from what is known
of the whole rows: the gradient of a block follows from q, k, v, dout, and out and lse of all keys (Dao 2023, algorithm
2). So they are looked for at run time, tested on the device as our own kernels are, and given up for those where
anything is off. A kernel of torch takes a rectangle, of which every row sees every key, or the causal half of a square:
`cut` finds these in a block. It gives gradients rounded to 16 bits, which are added up in the accumulator's type.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...device import Device
from ...dtypes import BFLOAT16
from ...layout import Integers
from ...score import Score
from ...softmax import Gradient

Array = Any
Tensor = Any
BOUNDS = {BFLOAT16: 2.0**-6, np.dtype(np.float16): 2.0**-9}      # of errors in the self-test, of the largest number
MOST_DIM, DIM_UNIT = 256, 8
FEWEST_PAIRS = 2**20          # of a block: below, our kernel ends before torch has begun
LEAST = 64                    # rows, and columns, of a piece: torch's kernels are not meant for slivers
FOUND = "torch's kernels"     # where a device keeps its `Library`


class Kernel(NamedTuple):
    """One of torch's kernels.

    Attributes
    ----------
    name : str
        As in ``"torch 2.11.0 cudnn"``.
    call : callable
        From (dout, q, k, v, out, lse, causal, scale) to the gradients of q, k and v: tensors of shape (1, heads,
        tokens, dim), lse of shape (1, heads, n_q).
    """

    name: str
    call: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Piece(NamedTuple):
    """Rows and columns of a block: each row sees all of the columns, or if it is causal row i the first ``i + 1``."""

    rows: slice
    columns: slice
    causal: bool

    def intervals(self, n_q: int) -> tuple[Integers, Integers]:
        """Give what each of the block's `n_q` rows sees of it. Local."""
        begin, end = np.zeros((2, n_q), np.int64)
        begin[self.rows], end[self.rows] = self.columns.start, self.columns.stop
        if self.causal:
            end[self.rows] = self.columns.start + 1 + np.arange(self.rows.stop - self.rows.start)
        return begin, end


class Library:
    """Which of torch's kernels have been found right on a device.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._found: dict[tuple[np.dtype[Any], int], Kernel] = {}
        self._missing: dict[tuple[np.dtype[Any], int], str] = {}
        self.on_trial: Kernel | None = None

    def kernel(self, dtype: np.dtype[Any], dim: int) -> Kernel | None:
        """Give the kernel for arrays of that dtype and dim; None if there is none, or nobody has looked. Local."""
        return self.on_trial or self._found.get((dtype, dim))

    def prove(self, dtype: np.dtype[Any], dim: int, error: Callable[[], float]) -> str:
        """Find the first kernel whose gradients are right, once; say what is wrong if there is none. Local.

        Parameters
        ----------
        dtype : dtype
        dim : int
        error : callable
            Differentiates by what `kernel` gives then, and tells the error.
        """
        case = dtype, dim
        if case not in self._missing:
            try:
                self._missing[case] = self._try_all(case, error)
            finally:
                self.on_trial = None
        return self._missing[case]

    def _try_all(self, case: tuple[np.dtype[Any], int], error: Callable[[], float]) -> str:
        try:
            candidates = kernels(self._device)
        except Exception as wrong:  # noqa: BLE001  a torch that is not there, or is another one
            return _said(wrong)
        missing = []
        for candidate in candidates:
            self.on_trial = candidate
            try:
                found = error()
            except Exception as wrong:  # noqa: BLE001  whatever torch raises, our kernels are there
                missing.append(f"{candidate.name}: {_said(wrong)}")
            else:
                if found <= BOUNDS[case[0]]:
                    self._found[case] = candidate
                    return ""
                missing.append(f"{candidate.name}: wrong gradients (error {found:.2g}, bound {BOUNDS[case[0]]:.2g})")
        return "; ".join(missing) or "torch has none"

    def give_up(self, dtype: np.dtype[Any], dim: int, error: Exception) -> None:
        """Take no kernel for such arrays any more: it refused some. Local."""
        self._found.pop((dtype, dim), None)
        self._missing[dtype, dim] = _said(error)

    def differentiate(self, kernel: Kernel, piece: Piece, gradient: Gradient, q: Array, k: Array, v: Array, dk: Array,
                      dv: Array, scale: float) -> None:
        """Add to the gradients what a piece of a block gives, on the caller's stream. Local.

        Parameters
        ----------
        kernel : Kernel
        piece : Piece
        gradient, q, k, v, dk, dv
            As for `Backend.backward`.
        scale : float

        Raises
        ------
        BackendError
            For what torch says of it; no gradient is changed then.
        """
        rows, columns, causal = piece

        def work(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *totals: Tensor) -> None:
            heads_first = (x.transpose(0, 1)[None] for x in (dout, q, k, v, out))
            grads = kernel.call(*heads_first, lse.t().contiguous()[None], causal, scale)
            for total, grad in zip(totals, grads, strict=True):
                total.add_(grad[0].transpose(0, 1))

        self._device.call_torch(work, gradient.dout[rows], q[rows], k[columns], v[columns], gradient.out[rows],
                                gradient.lse[rows], gradient.dq[rows], dk[columns], dv[columns])


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def kernels(device: Device) -> list[Kernel]:
    """Give torch's kernels, the one that should be fastest first. Local.

    Raises
    ------
    ImportError, AttributeError, RuntimeError
        If torch is not installed, or does not have them, or sees no GPU.
    """
    import torch
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    aten = torch.ops.aten
    found = {"cudnn": partial(_cudnn, aten._scaled_dot_product_cudnn_attention_backward),
             "flash": partial(_flash, aten._scaled_dot_product_flash_attention_backward)}
    names = ["cudnn", "flash"] if device.capability >= (9, 0) else ["flash", "cudnn"]
    return [Kernel(f"torch {torch.__version__} {name}", found[name]) for name in names]


def describe() -> str:
    """Say whose kernels may make gradients of 16-bit types here, without looking at them. Local."""
    try:
        return f"gradients of 16-bit types by torch {importlib.metadata.version('torch')}, where its kernels are right"
    except importlib.metadata.PackageNotFoundError:
        return "gradients of 16-bit types by kernels of its own, as torch is not installed"


def _cudnn(operator: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
           scale: float) -> tuple[Tensor, Tensor, Tensor]:
    seed = lse.new_zeros((), dtype=_int64())              # of dropout, as the offset is: there is none
    dq, dk, dv = operator(dout, q, k, v, out, lse[..., None], seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0,
                          causal, scale=scale)
    return dq, dk, dv


def _flash(operator: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
           scale: float) -> tuple[Tensor, Tensor, Tensor]:
    seed = lse.new_zeros((), dtype=_int64())
    dq, dk, dv = operator(dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed,
                          scale=scale)
    return dq, dk, dv


def _int64() -> Any:
    import torch
    return torch.int64


def takes(gradient: Gradient, score: Score) -> bool:
    """Say whether torch's kernels may take such scores, and make of out the delta that is given. Local."""
    return gradient.out is not None and score.plain and score.scale > 0


def is_wanted(gpu_kernels: str) -> bool:
    """Say whether torch's kernels are asked for: not by ``"auto"`` where torch is to be deterministic. Local."""
    torch = sys.modules.get("torch")
    return gpu_kernels == "library" or (
        gpu_kernels == "auto" and not (torch and torch.are_deterministic_algorithms_enabled()))


def fits(dtype: np.dtype[Any], accumulator: np.dtype[Any], dim: int, dim_v: int) -> bool:
    """Say whether torch has kernels for such arrays. Local."""
    return dtype in BOUNDS and accumulator == np.float32 and dim == dim_v <= MOST_DIM and dim % DIM_UNIT == 0


def cut_all(begin: Integers, end: Integers) -> tuple[list[Piece], list[tuple[Integers, Integers]]]:
    """Cut each of several intervals of the rows; see `cut`. Local.

    Parameters
    ----------
    begin, end : int64 arrays of shape (intervals, n_q)

    Returns
    -------
    pieces, rest
        As of `cut`, those of one interval after the other.
    """
    made = [cut(*interval) for interval in zip(begin, end, strict=True)]
    return [piece for pieces, _ in made for piece in pieces], [interval for _, rest in made for interval in rest]


def cut(begin: Integers, end: Integers) -> tuple[list[Piece], list[tuple[Integers, Integers]]]:
    """Cut what the rows of a block see into pieces for torch's kernels, and the intervals of what is left. Local.

    Rows that see a staircase, one column more each, as in every block of a causal sequence in the layouts contiguous
    and striped, are a rectangle and the causal half of a square. Of others the columns that all rows see are a
    rectangle, if that is half of the block at least.

    Parameters
    ----------
    begin, end : int64 arrays of shape (n_q,)

    Returns
    -------
    pieces : list of Piece
    rest : list of tuples (begin, end)
        For all rows.
    """
    seeing = np.flatnonzero(end > begin)
    pairs = int((end - begin)[seeing].sum())
    if pairs < FEWEST_PAIRS or seeing[-1] + 1 - seeing[0] < LEAST:
        return [], [(begin, end)]
    rows = slice(int(seeing[0]), int(seeing[-1]) + 1)
    first, last = int(begin[rows].max()), int(end[rows].min())       # what all of these rows see, if anything
    count = rows.stop - rows.start
    if (begin[rows] == first).all() and (end[rows] == last + np.arange(count)).all() and count > 1:
        pieces = [Piece(rows, slice(first, last - 1), False), Piece(rows, slice(last - 1, last - 1 + count), True)]
        narrow = last - 1 - first < LEAST
        return pieces[narrow:], [pieces[0].intervals(len(begin))] if narrow and first < last - 1 else []
    if last - first < LEAST or 2 * (last - first) * count < pairs:
        return [], [(begin, end)]
    rest = [(begin, np.minimum(end, np.maximum(begin, first))), (np.maximum(begin, np.minimum(end, last)), end)]
    return [Piece(rows, slice(first, last), False)], [(b, e) for b, e in rest if (e > b).any()]
