"""Files in, sums over attention weights out: what `ringmpi analyse` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis import Weights
from ..analysis.rows import check_range
from ..errors import OptionError, ShardError
from ..files.hdf5 import OutputFile, create_dataset, read_integers, write_file, write_rows
from ..files.manifest import Manifest, read_manifest
from ..files.opening import open_file
from ..files.shards import verify
from ..files.single import SingleFile, is_single, verify_single
from ..layout import Contiguous, make
from ..schedules.redistribution import redistribute
from .audit import check_belongs
from .inputs import MOST_OFFSETS, Input, open_input, read_bias_shard, read_shard
from .options import Options
from .run import Run

PIECE_BYTES = 2**26        # of a result that rank 0 takes to write at a time

Array = NDArray[Any]


@dataclass(frozen=True)
class Question:
    """What is asked of the weights; the same on every rank.

    Attributes
    ----------
    key_mass, entropy, mean_position, max_score, by_document : bool
    top : int
        Heaviest keys of each query; 0 for none.
    rows : tuple of int
        Positions of queries whose weights are written.
    """

    key_mass: bool = False
    entropy: bool = False
    mean_position: bool = False
    max_score: bool = False
    by_document: bool = False
    top: int = 0
    rows: tuple[int, ...] = ()


def open_result(path: Path, checks: bool) -> Manifest | SingleFile:
    """Open what `ringmpi attend` wrote, and check every byte of it; of shards, one rank is enough. Local.

    Raises
    ------
    ShardError
        If it is missing, damaged or unfinished.
    """
    if is_single(path):
        return verify_single(path)
    return verify(path) if checks else read_manifest(path)


def analyse(source: Path, result: Path, target: Path, question: Question, run_options: dict[str, Any], *,
            threads: int | None = None, timeout: float, force: bool = False,
            say: Callable[[str], object] = lambda text: None) -> None:
    """Sum up the weights of a call from file to file. Collective over COMM_WORLD.

    Parameters
    ----------
    source, result : path
        Input and output of `ringmpi attend`; the options that say what was computed are those that it recorded.
    target : path
        HDF5 file to write: a dataset for each thing that is asked.
    question : Question
    run_options : dict
        Options of this run: layout, backend, schedule, and the like, by their names in `Options`.
    threads, timeout, force
        See `attend`.
    say : callable
        Takes a line about each dataset on rank 0.

    Raises
    ------
    RingError
        One of its children, the same on every rank. Nothing is left under the target's name then.
    """
    run = Run.start(timeout, None)
    run.comm.check_same_options({"input": source, "result": result, "output": target, "force": force,
                                 **asdict(question), **run_options}, timeout)
    with run.comm.telling(), ExitStack() as files:
        with run.raise_on_all():
            if target.resolve() in (source.resolve(), result.resolve()):
                raise OptionError(f"{target}: expected another file than the input and the result")
            written = open_result(result, run.comm.rank == 0)
            options = Options.from_record({**written.record.get("options", {}), **run_options, "order": "fastest"})
            data = files.enter_context(open_input(source, options))
            if data.sizes.batch is not None:
                raise OptionError(f"{result}: expected a result without a batch axis, of which nothing is summed up "
                                  "yet; ringmpi.analysis takes arrays that have one")
            check_belongs(written, data)
            check_range(np.array(question.rows, np.int64), data.sizes.n_q)
        run.comm.check_same_options(asdict(data.sizes) | asdict(options), timeout)
        with Weights(run.world, mask=data.mask, layout=options.layout, scale=options.scale, softcap=options.softcap,
                     alibi=data.alibi, backend=options.backend, threads=threads, timeout=timeout,
                     accumulator=options.accumulator, schedule=options.schedule,
                     memory_limit=options.memory_limit) as weights:
            job = _Job(run, weights, data, written, say)
            with run.raise_on_all():
                file = files.enter_context(write_file(target, force) if run.comm.rank == 0 else nullcontext())
            job.write(file, question)
            with run.raise_on_all():
                if file is not None:
                    file.attrs["input"], file.attrs["result"] = str(source), str(result)
                files.close()


class _Job:
    """The arrays of a job on this rank, and what is made of them."""

    def __init__(self, run: Run, weights: Weights, data: Input, written: Manifest | SingleFile,
                 say: Callable[[str], object]) -> None:
        self._run = run
        self._weights = weights
        self._data = data
        self._say = say
        self._q, self._k = (read_shard(run, weights, dataset) for dataset in (data.q, data.k))
        self._biases = {"key_bias": read_bias_shard(run, weights, data.key_bias), "relative": data.relative}
        rows = Contiguous.even(data.sizes.n_q, run.comm.size)
        start = rows.starts[run.comm.rank]
        with run.raise_on_all():
            lse = written.rows("lse", start, start + rows.counts[run.comm.rank])
        self._lse = redistribute(lse, comm=run.world, target=weights.layout, timeout=run.timeout)

    def write(self, file: OutputFile | None, question: Question) -> None:
        """Write a dataset for each thing that is asked; `file` is rank 0's."""
        given = self._q, self._k, self._lse
        weights, biases = self._weights, self._biases
        if question.key_mass:
            self._write(file, "key_mass", lambda: weights.key_mass(*given, **biases))
        if question.entropy:
            self._write(file, "entropy", lambda: weights.entropy(*given, **biases))
        if question.mean_position:
            self._write(file, "mean_position", lambda: weights.mean_position(*given, **biases))
        if question.by_document:
            groups, count = self._documents()
            self._write(file, "mass_by_document", lambda: weights.mass_by_group(*given, groups, count, **biases))
        if question.max_score:
            self._write_small(file, "max_score", lambda: weights.max_score(*given[:2], **biases))
        if question.top:
            self._write_top(file, question.top)
        if question.rows:
            self._write_rows(file, np.array(question.rows))

    def _write_top(self, file: OutputFile | None, n: int) -> None:
        """Write the heaviest keys of each query."""
        start = time.perf_counter()
        found = self._weights.top(self._q, self._k, n, self._lse, **self._biases)
        self._say(f"top {n}: {time.perf_counter() - start:.2f} s")
        self._write(file, "top_weights", lambda: found.weights)
        self._write(file, "top_positions", lambda: found.positions)

    def _write(self, file: OutputFile | None, name: str, make_shard: Callable[[], Array]) -> None:
        """Write what is made of the tokens, in the order of the input."""
        start = time.perf_counter()
        shard = make_shard()
        shard = redistribute(shard, comm=self._run.world, source=self._weights.layout, target="contiguous",
                             timeout=self._run.timeout)
        count = int(self._run.comm.allgather(np.array([len(shard)]), self._run.timeout).sum())
        seconds = time.perf_counter() - start
        self._put(file, name, (count, *shard.shape[1:]), shard.dtype, self._to_first(shard, count))
        self._say(f"{name} {(count, *shard.shape[1:])}: {seconds:.2f} s")

    def _write_small(self, file: OutputFile | None, name: str, make: Callable[[], Array]) -> None:
        """Write what all ranks have."""
        start = time.perf_counter()
        x = make()
        seconds = time.perf_counter() - start
        self._put(file, name, x.shape, x.dtype, iter([(0, x)]))
        self._say(f"{name} {x.shape}: {seconds:.2f} s")

    def _write_rows(self, file: OutputFile | None, chosen: NDArray[np.int64]) -> None:
        """Write the weights of chosen queries, (chosen, heads, n_k), one query at a time."""
        start = time.perf_counter()
        sizes = self._data.sizes
        shape = len(chosen), sizes.heads, sizes.n_k
        self._put(file, "rows", shape, self._lse.dtype, self._rows(chosen))
        self._put(file, "rows_of", chosen.shape, chosen.dtype, iter([(0, chosen)]))
        self._say(f"rows {shape}: {time.perf_counter() - start:.2f} s")

    def _rows(self, chosen: NDArray[np.int64]) -> Iterator[tuple[int, Array]]:
        for number in range(len(chosen)):
            mine = np.empty((len(self._k), self._lse.shape[1]), self._lse.dtype)
            at = 0
            for positions, piece in self._weights.rows(self._q, self._k, self._lse, chosen[number:number + 1],
                                                        **self._biases):
                mine[at:at + len(positions)] = piece[0].T
                at += len(positions)
            whole = redistribute(mine, comm=self._run.world, source=self._weights.layout, target="contiguous",
                                 timeout=self._run.timeout)
            pieces = list(self._to_first(whole, self._data.sizes.n_k))
            yield number, np.concatenate([part for _, part in pieces]).T[None]

    def _to_first(self, shard: Array, count: int) -> Iterator[tuple[int, Array]]:
        """Bring rows to rank 0 a piece at a time, in their order; other ranks get none of them."""
        size, rank = self._run.comm.size, self._run.comm.rank
        layout = Contiguous.even(count, size)
        starts = np.array(layout.starts)
        ends = starts + layout.counts
        step = max(1, PIECE_BYTES // max(1, int(np.prod(shard.shape[1:])) * shard.itemsize))
        for first in range(0, count, step):
            last = min(first + step, count)
            low, high = np.clip(starts, first, last), np.clip(ends, first, last)
            mine = shard[low[rank] - starts[rank]:high[rank] - starts[rank]]
            target = Contiguous([last - first] + [0] * (size - 1))
            yield first, redistribute(mine, comm=self._run.world, source=Contiguous((high - low).tolist()),
                                      target=target, timeout=self._run.timeout)

    def _put(self, file: OutputFile | None, name: str, shape: tuple[int, ...], dtype: np.dtype[Any],
             pieces: Iterator[tuple[int, Array]]) -> None:
        """Write a dataset of pieces."""
        with self._run.raise_on_all():
            dataset = None if file is None else create_dataset(file, name, shape, dtype)
        for start, rows in pieces:
            with self._run.raise_on_all():
                if dataset is not None:
                    write_rows(dataset, start, rows)

    def _documents(self) -> tuple[NDArray[np.int64], int]:
        """Give the document of each of this rank's keys, and how many there are."""
        n_k = self._data.sizes.n_k
        with self._run.raise_on_all():
            with open_file(self._data.path) as file:
                offsets = read_integers(file, "documents", max(n_k + 1, MOST_OFFSETS), filters=self._data.filters)
            if len(offsets) < 2 or (np.diff(offsets) < 0).any():
                raise ShardError(f"{self._data.path}: dataset 'documents': expected ascending offsets [0, ...], got "
                                 f"{offsets}")
        positions = make(self._weights.layout, n_k, self._run.comm.size).positions(self._run.comm.rank)
        numbers = np.searchsorted(offsets, positions, side="right") - 1
        count = len(offsets) - 1
        return np.where(numbers < count, numbers, -1), count
