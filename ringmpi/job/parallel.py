"""One file that all ranks write together, by an HDF5 that was built with MPI (``--output-driver mpio``).

The file lies under a temporary name until every rank has read back what it wrote; then rank 0 gives it its name. Rows
are stored plainly, without chunks: parallel HDF5 is at its best so, and `single` has digests of the rows. Where one
rank's write fails HDF5 may leave the others waiting in MPI: they are ended after the timeout, and nothing appears.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import CommError, OptionError, OutputError, RankLost, RingError, RingTimeout, ShardError
from ..files.axes import Axes, axes_of_results
from ..files.dimensions import describe_results
from ..files.hdf5 import open_dataset
from ..files.item_types import bits, file_type
from ..files.manifest import Manifest
from ..files.new_file import NewFile, not_what_was_written
from ..files.opening import open_file
from ..files.paths import check_writable, writing
from ..files.rows import row_ranges, select_box
from ..files.sealed import write_sealed_together
from ..files.shards import remove_shards, set_attributes, shown_by
from ..files.single import NAME, Range, digest_rows, seal
from ..files.tokens import Tokens
from ..layout import Contiguous
from ..phases import phase
from .run import Run

DRIVER = "mpio"
AT_A_TIME = 2**26              # bytes of a rank in one collective write

Array = NDArray[Any]


def check_driver(name: str) -> None:
    """Raise `OptionError` if output can't be written so here. Local."""
    if name == DRIVER and not h5py.get_config().mpi:
        raise OptionError(f"--output-driver {DRIVER}: expected an h5py that was built with MPI, got "
                          f"{h5py.version.version} without; install your site's or build one (jobs/README.rst), or "
                          "leave the option out: shards need none")


class Together:
    """A result that becomes one file; see `outputs.Result`.

    Parameters
    ----------
    run : Run
    path : path
    force : bool
        Replace a file of that name.
    axes : Axes
        Of `out`, and of `lse` without dim.
    """

    def __init__(self, run: Run, path: Path, force: bool, axes: Axes) -> None:
        self._run = run
        self._axes = axes
        self._path = path
        self._force = force
        self._disk: NewFile | None = None          # rank 0's, as what it replaces
        self._replaced: Manifest | None = None

    def prepare(self) -> None:
        """Check that h5py can do it, and on rank 0 that the file can be made; for a block in which all raise. Local.

        Raises
        ------
        OptionError
            If h5py was built without MPI.
        OutputError
            If the file can't be made.
        """
        check_driver(DRIVER)
        if self._run.comm.rank == 0:
            check_writable(self._path, self._force)
            self._replaced = shown_by(self._path)

    def write(self, n_q: int, rows: Mapping[str, Array], record: dict[str, Any]) -> None:
        """Write all rows, flush them to disk and read them back; the file has a temporary name.

        Raises
        ------
        OutputError
            If it can't be written or does not read as it was written; the same on every rank.
        """
        run, path = self._run, self._path
        start = Contiguous.even(n_q, run.comm.size).starts[run.comm.rank]
        with run.timer.phase("write", f"writing {path}"):
            with run.raise_on_all(), writing(path):
                if run.comm.rank == 0:
                    _check_space(path, n_q, rows)
                    self._disk = NewFile(path)
            temporary = path.parent / run.allgather_text(self._disk.temporary.name if self._disk else "")[0]
            mine = Range(start, start + len(rows["out"]), digest_rows([rows["out"]]), digest_rows([rows["lse"]]))
            ranges = [Range(**json.loads(text)) for text in run.allgather_text(json.dumps(asdict(mine)))]
            _write(run, path, temporary, rows, self._axes, ranges, record)
            with run.raise_on_all():
                if self._disk is not None:
                    self._disk.finish()
                _read_back(path, temporary, rows, self._axes, start)

    def publish(self) -> None:
        """Let rank 0 give the file its name.

        Raises
        ------
        OutputError
            If it can't be given; the same on every rank, and nothing is left.
        """
        try:
            with self._run.raise_on_all(), writing(self._path):
                if self._disk is not None:
                    self._disk.appear(self._force)
        finally:
            self.discard()
        remove_shards(self._path, self._replaced)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._path

    def is_published(self) -> bool:
        """Say whether the file is there: rank 0 alone gives it its name. Local."""
        return self._disk is not None and self._disk.is_there()

    def discard_of_all(self) -> None:
        """Remove the temporary file. One rank."""
        self.discard()

    def discard(self) -> None:
        """Remove the temporary file. Local."""
        if self._disk is not None:
            self._disk.remove()


def _check_space(path: Path, n_q: int, rows: Mapping[str, Array]) -> None:
    """Raise `OutputError` if the disk has no place for all rows: HDF5 may not come back from a write that fails."""
    needed = sum(n_q * int(np.prod(mine.shape[1:])) * mine.dtype.itemsize for mine in rows.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OutputError(f"{path}: can't be written: expected {needed:,} bytes free on the disk, got {free:,}")


def _write(run: Run, path: Path, temporary: Path, rows: Mapping[str, Array], axes: Axes, ranges: list[Range],
           record: Mapping[str, Any]) -> None:
    """Write all of the file, each rank its rows."""
    n_q, start = ranges[-1].stop, ranges[run.comm.rank].start
    of = axes_of_results(axes)
    with _opened(run, path, temporary) as file:
        with _step(run, path):
            made = {name: _create(file, name, of[name].shape_in_file((n_q, *mine.shape[1:])), mine.dtype)
                    for name, mine in rows.items()}
            describe_results(file, axes)
        for name, mine in rows.items():
            pieces = [list(row_ranges((each.stop - each.start, *mine.shape[1:]), mine.dtype, AT_A_TIME))
                      for each in ranges]
            for number in range(max(map(len, pieces))):
                own = pieces[run.comm.rank]
                first, last = own[number] if number < len(own) else (0, 0)
                with _step(run, path):
                    _write_rows(made[name], of[name], start + first, mine[first:last])
        with _step(run, path):
            write_sealed_together(file, NAME, seal(ranges, axes, record))
            set_attributes(file, record)
            file.flush()
            file.attrs["complete"] = True
            file.flush()


@contextmanager
def _opened(run: Run, path: Path, temporary: Path) -> Iterator[h5py.File]:
    """Open the file on all ranks, and close it on all, whatever happened between."""
    file: list[h5py.File] = []
    with _step(run, path):
        # v110: as `OutputFile`.
        file.append(h5py.File(temporary, "w", driver=DRIVER, comm=run.comm.comm, libver=("v110", "v110")))
    try:
        yield file[0]
    except RingError as error:
        if not isinstance(error, (RingTimeout, RankLost, CommError)):       # else not all ranks come to close it
            with suppress(OSError, RuntimeError, ValueError):               # it is thrown away
                file[0].close()
        raise
    with _step(run, path):
        file[0].close()


@contextmanager
def _step(run: Run, path: Path) -> Iterator[None]:
    """Run a block in which all ranks call HDF5 together: all raise or none.

    A rank that HDF5 does not come back from is ended after the timeout. A signal waits for the end of the block: a rank
    that did not come to HDF5 would leave the others there.
    """
    with run.raise_on_all(), phase(f"writing {path}", run.timeout, whole=True):
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, RingError):
                raise
            raise OutputError(f"{path}: can't be written: {error}") from error


def _create(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> h5py.Dataset:
    """Make a dataset with its place in the file; rows that were never written count as NaN."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_fill_value(np.array(np.nan, np.float32))
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    made = h5py.h5d.create(file.id, name.encode(), file_type(dtype), h5py.h5s.create_simple(shape), properties)
    return h5py.Dataset(made)


def _write_rows(dataset: h5py.Dataset, axes: Axes, start: int, rows: Array) -> None:
    """Write this rank's rows, or take part with none."""
    together = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    together.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    part = axes.to_file(rows)
    if part.size:
        memory, space = select_box(dataset, axes.start_of(start), part.shape)
    else:
        part = np.zeros([1] * dataset.ndim, rows.dtype)
        memory, space = h5py.h5s.create_simple(part.shape), dataset.id.get_space()
        memory.select_none()
        space.select_none()
    dataset.id.write(memory, space, bits(part), file_type(part.dtype), together)


def _read_back(path: Path, temporary: Path, rows: Mapping[str, Array], axes: Axes, start: int) -> None:
    """Raise `OutputError` unless this rank's rows read as they were written."""
    try:
        with open_file(temporary) as file:
            for name, mine in rows.items():
                tokens = Tokens(open_dataset(file, name), axes_of_results(axes)[name], mine.dtype, mine.shape[1:])
                for first, last in row_ranges(mine.shape, mine.dtype, AT_A_TIME):
                    if tokens.read(start + first, start + last).tobytes() != mine[first:last].tobytes():
                        raise ShardError(f"{temporary}: dataset {name!r}: reads otherwise")
    except ShardError as error:
        raise OutputError(f"{not_what_was_written(path)} ({error})") from error
