"""What safety costs, measured: the checksums of files, checkpoints, deadlines. docs/safety.rst has the figures.

    python tests/safety_costs.py files FOLDER [MIB]          one process, on the disk that FOLDER is on
    python tests/safety_costs.py checkpoints FOLDER          two ranks
    python tests/safety_costs.py deadlines FOLDER            two ranks

Each is measured with and without in turns, and the medians are compared.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

ROUNDS = 5
HEADS, DIM = 8, 64
RANKS = 2
# Every checkpoint is timed on each rank; `TIMED` is what a rank runs in place of `ringmpi`.
TIMED = """
import sys, time
from ringmpi.checkpoint.saving import Saver
save = Saver.save
def timed(self, folder, states, *rest):
    start = time.perf_counter()
    save(self, folder, states, *rest)
    size = sum(x.nbytes for state in states for x in (state.acc, state.row_max, state.row_sum))
    print(f"SAVED {time.perf_counter() - start} {size}", flush=True)
Saver.save = timed
from ringmpi.cli import main
sys.exit(main())
"""
# Nobody looks at a clock, says whom it waits for, or watches the process.
CARELESS = """
import sys
from ringmpi import process
from ringmpi.mpi.waiting import Waiter
def poll_until_done(self, pace, requests, timeout, describe, advance):
    while True:
        done, busy = self._poll(requests, describe, advance)
        if done:
            return pace.tick()
        pace.rest(self._movement.seen(len(requests), busy))
Waiter._poll_until_done = poll_until_done
class Nobody:
    def __init__(self, *_): pass
    note = dismiss = end = __init__
process.Watchdog = Nobody
from ringmpi.cli import main
sys.exit(main())
"""


def without_digest():
    """No SHA-256 of a shard."""
    return mock.patch("ringmpi.files.shards.digest", return_value="0" * 64)


def without_reading_back():
    """No comparison of what was written with what is in the file."""
    return mock.patch("ringmpi.files.hdf5._read_back")


def without_checksums():
    """None at all: no SHA-256, no CRC-32 of what is written, none of HDF5's in its chunks."""
    import h5py
    create = h5py.File.create_dataset
    stack = contextlib.ExitStack()
    stack.enter_context(without_digest())
    stack.enter_context(mock.patch("ringmpi.files.hdf5._checksum", return_value=0))
    stack.enter_context(mock.patch.object(h5py.File, "create_dataset",
                                          lambda *rest, **more: create(*rest, **more | {"fletcher32": False})))
    return stack


def write_and_read(folder, rows):
    """Write a shard, and read one as an input from the disk; give the seconds of both."""
    from ringmpi.files.hdf5 import open_dataset, read_rows
    from ringmpi.files.opening import open_file
    from ringmpi.files.shards import Output
    output = Output(folder / "cost.h5", "0" * 12, force=False)
    output.prepare()
    start = time.perf_counter()
    shard = output.write(0, 0, rows, rows[..., 0])
    written = time.perf_counter() - start
    descriptor = os.open(folder / shard.file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    start = time.perf_counter()
    with open_file(folder / shard.file) as file:
        read_rows(open_dataset(file, "out"), 0, len(rows))
    read = time.perf_counter() - start
    output.discard(0)
    return written, read


def files(folder, mib=512):
    """The checksums of files."""
    rows = np.random.default_rng(0).random((int(mib) * 2**20 // (4 * HEADS * DIM), HEADS, DIM), np.float32)
    ways = {"as it is": contextlib.nullcontext, "without SHA-256": without_digest,
            "without any checksum": without_checksums, "without reading back": without_reading_back}
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            with way():
                seconds[name].append(write_and_read(folder, rows))
    for name, pairs in seconds.items():
        writes, reads = zip(*pairs, strict=True)
        print(f"{mib} MiB {name:22} write {_told(writes)}  read {_told(reads)}")


def _told(seconds):
    return f"{statistics.median(seconds):6.3f} s ({min(seconds):.3f} .. {max(seconds):.3f})"


def _attend(folder, *options, start=("-m", "ringmpi")):
    import launch
    record = folder / "run.json"
    begin = time.perf_counter()
    result = launch.launch(RANKS, [*start, "attend", folder / "in.h5", folder / "out.h5", "--causal", "--layout",
                                   "striped", "--schedule", "ring", "--threads", "1", "--force", "--json", record,
                                   *options], folder=folder / "said", timeout=100)
    assert result.code == 0, result.text
    return time.perf_counter() - begin, json.loads(record.read_text())["phases"], result.text


def _input(folder, tokens):
    from job_files import make_random
    (folder / "in.h5").unlink(missing_ok=True)
    make_random(folder / "in.h5", tokens, heads=4, dim=DIM)


def checkpoints(folder, tokens=65536):
    """One checkpoint on the way, of a rank's states; and the fingerprints that it takes."""
    _input(folder, tokens)
    _attend(folder)
    for _ in range(2):
        _, plain, _ = _attend(folder)
        _, kept, text = _attend(folder, "--checkpoint", folder / "kept", "--checkpoint-every", "0.001",
                                start=("-c", TIMED))
        saves = [line.split()[1:] for line in text.splitlines() if line.startswith("SAVED")]
        for seconds, size in saves:
            print(f"a checkpoint of {int(size) / 2**20:.0f} MiB a rank: {float(seconds):.3f} s, "
                  f"{float(seconds) / 60:.2%} of a minute")
        print(f"attend {plain['attend']:.2f} s without checkpoints, {kept['attend']:.2f} s with "
              f"{len(saves) // RANKS} of them")


def deadlines(folder, tokens=32768):
    """Attending with deadlines, and with nothing that looks after the others."""
    _input(folder, tokens)
    _attend(folder)
    seconds = {"with": [], "without": []}
    for _ in range(ROUNDS):
        seconds["with"].append(_attend(folder)[1]["attend"])
        seconds["without"].append(_attend(folder, start=("-c", CARELESS))[1]["attend"])
    for name, each in seconds.items():
        print(f"attend {name:8} deadlines {_told(each)}")


if __name__ == "__main__":
    import conftest  # noqa: F401 (ranks that outnumber cores must not spin)
    {"files": files, "checkpoints": checkpoints, "deadlines": deadlines}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
