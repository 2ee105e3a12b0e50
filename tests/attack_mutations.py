"""Files that are damaged at random places, by numbered seeds: inputs that are read, and outputs that `check` reads.

The same number is the same damage to the same kind of file. What HDF5 itself dies of is named with its number.
"""

import contextlib
import random
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from attack_cases import (
    ENDED,
    FIRST_SECONDS,
    OTHER,
    REFUSED,
    RIGHT,
    Case,
    arrays,
    command_line,
    in_child,
    new_folder,
    verdict,
)

SEEDS = range(2000)
MEMORY = 2**33                 # bytes of address space for a child, which has a whole interpreter's
SHOWN = ("q", "k", "v")


def mutated(whole, seed):
    """Bytes with one to four flips of a byte, a cut end, or a block that is inserted, repeated or zeroed."""
    chance = random.Random(seed)
    how = chance.choice(("flip", "flip", "flip", "cut", "insert", "repeat", "zero"))
    data = bytearray(whole)
    # metadata is at the start of these files and between their chunks: half of all places are there
    at = chance.randrange(min(4096, len(data)) if chance.random() < 0.5 else len(data))
    size = chance.choice((1, 2, 8, 64, 512))
    if how == "flip":
        for place in [at] + [chance.randrange(len(data)) for _ in range(chance.randrange(4))]:
            data[place] ^= chance.randrange(1, 256)
    elif how == "cut":
        del data[at:]
    elif how == "insert":
        data[at:at] = chance.randbytes(size)
    elif how == "repeat":
        data[at:at] = data[at:at + size]
    else:
        data[at:at + size] = bytes(len(data[at:at + size]))
    return bytes(data)


def _plain(path, x):
    """What `h5py.File(path, "w")` and a line for each array give: no checksum anywhere."""
    import h5py
    with h5py.File(path, "w") as file:
        for name, values in x.items():
            file[name] = values


def _packed(path, x):
    """Chunks in the oldest format, compressed, each with a checksum; the metadata has none."""
    import h5py
    with h5py.File(path, "w") as file:
        for name, values in x.items():
            file.create_dataset(name, data=values, chunks=(16, *values.shape[1:]) if values.ndim == 3 else None,
                                compression="gzip" if values.ndim == 3 else None, shuffle=values.ndim == 3,
                                fletcher32=values.ndim == 3)


def _summed(path, x):
    """As `ringmpi make` writes: all but the integers has a checksum."""
    from job_files import write_arrays
    write_arrays(path, x)


def _read(path):
    """Everything that `attend` reads of an input, by name; or REFUSED."""
    from ringmpi.errors import RingError
    from ringmpi.job.inputs import open_input
    from ringmpi.job.options import Options
    try:
        with open_input(path, Options(alibi=True, sinks=True)) as data:
            rows = [tokens.read(0, len(tokens)).tobytes() for tokens in (data.q, data.k, data.v)]
            return [*rows, data.alibi.tobytes(), data.sinks.tobytes()]
    except RingError:
        return REFUSED


def _outcome(read, right):
    """Read in this child, with limits; say how it went."""
    signal.alarm(FIRST_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        found = read()
    except Exception as error:          # noqa: BLE001 (it is what is looked for)
        return f"{type(error).__name__}: {error}"
    return found if isinstance(found, str) else RIGHT if found == right else OTHER


def inputs(folder, seeds=SEEDS):
    """An input is damaged: what is read is right, or refused, where its file has checksums."""
    import numpy as np
    random_numbers = np.random.default_rng(0)
    x = {name: random_numbers.standard_normal((64, 2, 8)).astype("f4") for name in SHOWN}
    x |= {name: random_numbers.random(2) for name in ("alibi", "sinks")}
    kinds = [(write.__name__[1:], Path(folder) / f"{write.__name__}.h5", write) for write in (_summed, _packed, _plain)]
    whole = {}
    for name, path, write in kinds:
        write(path, x)
        whole[name] = path.read_bytes()
    right = _read(kinds[0][1])
    assert all(_read(path) == right for _, path, _ in kinds)
    for seed in seeds:
        name, path, _ = kinds[seed % len(kinds)]
        data = mutated(whole[name], seed)
        path.write_bytes(data)
        outcome = in_child(lambda path=path: _outcome(lambda: _read(path), right))
        told = not outcome.startswith(ENDED) or _is_told(folder, path)
        known = outcome in (REFUSED, RIGHT) or outcome.startswith(ENDED) or (outcome == OTHER and name != "summed")
        what = f"{name}: {outcome}" + (f", seed {seed}" if outcome.startswith(ENDED) else "")
        yield Case(f"seed {seed}", what, "" if known and told else f"{outcome}; told: {told}")


def _is_told(folder, path):
    """Whether the command line says of a file that HDF5 does not survive what it was doing, and leaves no output."""
    out = new_folder(folder, "told") / "out.h5"
    code, said = command_line(["attend", path, out, "--backend", "numpy", "--alibi", "--sinks"], folder)
    return code not in (0, 124) and f"while reading {path}" in said and not out.exists()


def _output(folder):
    """Write an output of two shards, always the same bytes; return its path and that of a shard."""
    import numpy as np

    from ringmpi.files.shards import Output
    random_numbers = np.random.default_rng(0)
    rows = {"out": random_numbers.random((64, 2, 8), np.float32), "lse": random_numbers.random((64, 2), np.float32)}
    output = Output(folder / "right.h5", "run", force=False)
    output.prepare()
    shards = [output.write(rank, start, *(x[start:start + 32] for x in rows.values()))
              for rank, start in enumerate((0, 32))]
    output.publish(shards, {name: (x.shape, x.dtype) for name, x in rows.items()}, {"options": {}})
    return output.path, folder / shards[0].file


def outputs(folder, seeds=SEEDS):
    """An OUT.h5 or one of its shards is damaged: `check` says so, or it shows what it should."""
    out, shard = _output(Path(folder))
    right = arrays(out)
    files = [out, out, out, shard]
    whole = {path: path.read_bytes() for path in files}
    for seed in seeds:
        path = files[seed % len(files)]
        path.write_bytes(mutated(whole[path], seed))
        with mock.patch("ringmpi.files.shards.probe"):          # for speed: first without, and where HDF5 dies, with it
            outcome = in_child(lambda: _outcome(lambda: verdict(out, right), None))
        alone = outcome
        if alone.startswith(ENDED):
            with mock.patch("ringmpi.files.manifest.PROBE_SECONDS", FIRST_SECONDS):
                outcome = in_child(lambda: verdict(out, right))
        path.write_bytes(whole[path])
        what = f"{outcome} (HDF5 {alone}, seed {seed})" if alone != outcome else outcome
        yield Case(f"seed {seed}", f"{'shard' if path != out else 'OUT.h5'}: {what}",
                   "" if outcome in (REFUSED, RIGHT) else outcome)


def _single(path, kind):
    """Write a result in one file as ranks do together, or as `merge` does; return what is read of it."""
    import h5py
    import numpy as np

    from ringmpi.files.axes import Axes
    from ringmpi.files.sealed import write_sealed_together
    from ringmpi.files.shards import merge_shards
    from ringmpi.files.single import NAME, Range, digest_rows, seal
    if kind == "merged":
        merge_shards(_output(path.parent)[0], path)
        return _read_single(path)
    random_numbers = np.random.default_rng(0)
    rows = {"out": random_numbers.random((64, 2, 8), np.float32), "lse": random_numbers.random((64, 2), np.float32)}
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for name, x in rows.items():
            file[name] = x
        digests = [{name: digest_rows([x[start:start + 32]]) for name, x in rows.items()} for start in (0, 32)]
        ranges = [Range(start, start + 32, **each) for start, each in zip((0, 32), digests, strict=True)]
        write_sealed_together(file, NAME, seal(ranges, Axes(), {"options": {}}))
        file.attrs["complete"] = True
    return _read_single(path)


def _read_single(path):
    """Everything that `check` reads of a result in one file; or REFUSED."""
    from ringmpi.errors import RingError
    from ringmpi.files.single import verify_single
    try:
        found = verify_single(path)
        return [str(found.record), *(found.rows(name, 0, 64).tobytes() for name in ("out", "lse"))]
    except RingError:
        return REFUSED


def singles(folder, seeds=SEEDS):
    """A result in one file is damaged: `check` says so, or what it reads is right."""
    paths = {kind: Path(folder) / f"{kind}.h5" for kind in ("together", "merged")}
    right = {kind: _single(path, kind) for kind, path in paths.items()}
    whole = {kind: path.read_bytes() for kind, path in paths.items()}
    for seed in seeds:
        kind = list(paths)[seed % 2]
        paths[kind].write_bytes(mutated(whole[kind], seed))
        outcome = in_child(lambda kind=kind: _outcome(lambda: _read_single(paths[kind]), right[kind]))
        yield Case(f"seed {seed}", f"{kind}: {outcome}", "" if outcome in (REFUSED, RIGHT) else outcome)


def _cache(path):
    """Write the file of a cache, always the same bytes, in several blocks; return what is read of it."""
    import numpy as np

    from ringmpi.kv import saving
    random_numbers = np.random.default_rng(0)
    k, v = (random_numbers.random((64, 2, dim), np.float32) for dim in (8, 4))
    bias = random_numbers.random((64, 1))
    arrays = {"k": ((2, 8), k.dtype), "v": ((2, 4), v.dtype), "key_bias": ((1,), bias.dtype)}
    alone = SimpleNamespace(rank=0, size=1, raise_on_all=lambda timeout: contextlib.nullcontext())
    with mock.patch("ringmpi.kv.saving.BLOCK_BYTES", 2**11):
        made = saving.Saving(alone, 1.0, [np.arange(64)], arrays)
    made.write(path, True, {"length": 64, "dropped": 0, "kv_heads": 2, "dim": 8, "dim_v": 4, "dtype": "float32",
                            "batch": None, "key_bias": 1, "values_in_keys": False},
               lambda first, last: (k[first:last], v[first:last], bias[first:last]))
    return _read_cache(path)


def _read_cache(path):
    """Everything that `KVCache.open` reads of a file; or REFUSED."""
    from ringmpi.errors import RingError
    from ringmpi.kv.file import read_blocks, read_description
    try:
        found = read_description(path)
        return [str(found), *(x.tobytes() for block in read_blocks(path, found, 64, 0, 1) for x in block)]
    except RingError:
        return REFUSED


def caches(folder, seeds=SEEDS):
    """The file of a cache is damaged: what is read is right, or refused."""
    path = Path(folder) / "cache.h5"
    right = _cache(path)
    assert len(right) > 4
    whole = path.read_bytes()
    for seed in seeds:
        path.write_bytes(mutated(whole, seed))
        outcome = in_child(lambda: _outcome(lambda: _read_cache(path), right))
        yield Case(f"seed {seed}", outcome, "" if outcome in (REFUSED, RIGHT) else outcome)


BEFORE = {"problem": {"tokens": 64}, "placement": {
    "ranks": 2, "schedule": "1x1x2:ring", "layout": "contiguous", "kv_layout": "contiguous", "n_q": [32, 32],
    "n_k": [40, 24], "blocks": {"layout": "contiguous", "n_k": [40, 24]}, "moved": False}}


def _checkpoint(folder):
    """Write a checkpoint of two ranks, always the same bytes; return the folder of its generation."""
    import numpy as np

    from ringmpi.files.generations import NewGeneration
    random_numbers = np.random.default_rng(0)
    made = NewGeneration.prepare(folder, "0" * 16, "0" * 12)
    shards = []
    for rank in range(2):
        states = [random_numbers.random((32, 2, *more), np.float32) for more in ((8,), (), ())]
        left = np.array([[[0, 40], [3, 24]], [[0, 0], [0, 24]]])
        shards.append({**made.write(rank, [*states, left, np.arange(32) % 2]), "pairs": [3, 4], "groups": 2})
    made.publish({**BEFORE, "shards": shards})
    return made.path


def _read_checkpoint(folder):
    """Everything that another rank takes of a checkpoint to go on from; or REFUSED."""
    import numpy as np

    from ringmpi.checkpoint.identity import difference
    from ringmpi.checkpoint.moved import Before, Moved
    from ringmpi.errors import RingError
    from ringmpi.files.generations import newest
    from ringmpi.files.states import read_manifest
    states = [tuple(np.zeros((64, 2, *more), np.float32) for more in ((8,), (), ()))]
    try:
        path = newest(folder)
        found = read_manifest(path) if path else None
        if found is None or difference(found.content["problem"], BEFORE["problem"]):
            return REFUSED
        moved = Moved(Before.of(found, 64, 64), np.arange(64), [0], 0)
        moved.take(found, states, 0, 1)
        return [*(x.tobytes() for x in states[0]), moved._left.tobytes(), moved._groups.tobytes()]
    except RingError:
        return REFUSED


def checkpoints(folder, seeds=SEEDS):
    """A checkpoint is damaged, or its manifest says other things under a right digest: right, or refused.

    What a manifest with a right digest says may be believed if it makes sense: then nothing but numbers is other.
    """
    made = _checkpoint(Path(folder) / "c")
    manifest = made / "manifest.json"
    files = {"states": made / "00000.state", "manifest": manifest, "sealed": manifest}
    yield from _damaged(files, lambda: _read_checkpoint(made.parent), seeds)


def _damaged(files, read, seeds):
    """Damage the files of a checkpoint in turn, `sealed` under a right digest."""
    import hashlib
    right = read()
    assert right != REFUSED
    whole = {name: path.read_bytes() for name, path in files.items()}
    for seed in seeds:
        name = list(files)[seed % len(files)]
        data = mutated(whole[name] if name != "sealed" else whole[name].partition(b"\n")[2], seed)
        if name == "sealed":
            data = hashlib.sha256(data).hexdigest().encode() + b"\n" + data
        files[name].write_bytes(data)
        outcome = in_child(lambda: _outcome(read, right))
        files[name].write_bytes(whole[name])
        known = (REFUSED, RIGHT, OTHER) if name == "sealed" else (REFUSED, RIGHT)
        yield Case(f"seed {seed}", f"{name}: {outcome}", "" if outcome in known else outcome)


def streamed(folder):
    """Write a checkpoint of a job that streams on two ranks: a piece is done, another has met a block of its two.

    Returns
    -------
    path, path, callable
        Of the generation and of a shard; what reads all that a rank takes of it, or gives REFUSED.
    """
    from dataclasses import asdict

    import numpy as np

    from ringmpi.backends.numpy_ import NumpyBackend
    from ringmpi.errors import RingError
    from ringmpi.files.generations import NewGeneration, newest
    from ringmpi.files.shards import Output
    from ringmpi.files.states import read_manifest
    from ringmpi.job import stream_plan
    from ringmpi.job.done import done_of
    from ringmpi.job.inputs import Sizes
    from ringmpi.job.options import Options
    from ringmpi.job.pieces import Pieces
    folder = Path(folder)
    planner = stream_plan.Planner(Sizes(64, 64, 2, 2, 8, 8, "float32"), 2, Options(stream=True, memory_limit=2**27),
                                  NumpyBackend, 2**26)
    planner.__dict__["group"] = 16
    random_numbers = np.random.default_rng(0)
    rows = {"out": random_numbers.random((32, 2, 8), np.float32), "lse": random_numbers.random((32, 2), np.float32)}
    output = Output(folder / "out.h5", "0" * 12, force=False)
    output.prepare()
    shards = [output.write(start, start, *(x[start:start + 16] for x in rows.values())) for start in (0, 16)]
    made = NewGeneration.prepare(folder / "c", "0" * 16, "0" * 12)
    states = [random_numbers.random((16, 2, *more), np.float32) for more in ((8,), (), ())]
    made.publish({"problem": {"tokens": 64}, "placement": {"ranks": 2}, "block": 1,
                  "shards": [{**made.write(rank, states), "pairs": 3} for rank in range(2)],
                  "pieces": asdict(Pieces(0, 16, 32, planner.plan().block)), "output": [asdict(x) for x in shards]})

    def read():
        found = newest(made.path.parent)
        try:
            generation = read_manifest(found) if found else None
            if generation is None or generation.content["problem"] != {"tokens": 64}:
                return REFUSED
            done, pieces = done_of(generation, planner, output.path, {"ranks": 2}, 0)
            there = [np.empty_like(x) for x in states]
            if pieces and done.block:
                generation.read(0, there)
            return [str(done), str(pieces), *(x.tobytes() for x in there)]
        except RingError:
            return REFUSED

    return made.path, folder / shards[0].file, read


def streams(folder, seeds=SEEDS):
    """The same of a job that streams, and of the shards that its checkpoint names."""
    made, shard, read = streamed(folder)
    manifest = made / "manifest.json"
    files = {"states": made / "00000.state", "manifest": manifest, "sealed": manifest, "shard": shard}
    yield from _damaged(files, read, seeds)
