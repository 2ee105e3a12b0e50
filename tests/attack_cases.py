"""What the families of attacks share: how a case is run, and how its end is judged."""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import launch

HERE = Path(__file__).parent
DONE, NOT_WRITTEN = 0, 6
ENDED = "ended by signal"
FIRST_SECONDS = 6              # that HDF5 has for a file, before it is asked with care
CHILD_SECONDS = 70             # a little more than `check` gives HDF5
REFUSED, RIGHT, OTHER, UNREADABLE = "refused", "passed, and is right", "passed, and shows other numbers", "unreadable"


class Case(NamedTuple):
    """One attack: what it was, how it ended, and what is wrong with that; empty if nothing."""

    name: str
    outcome: str
    wrong: str = ""


def outcomes(cases, fewest):
    """How cases ended: at least so many of them, and none of them wrong."""
    cases = list(cases)
    wrong = [case for case in cases if case.wrong]
    assert not wrong, wrong
    assert len(cases) >= fewest, cases
    return {case.outcome for case in cases}


def arrays(path):
    """Every number that a plain reader finds in a file; the names of axes have none."""
    import h5py
    with h5py.File(path) as file:
        found = {name: file[name][()] for name in sorted(set(file) - {"manifest", "token", "head", "dim"})}
    return {name: x.tolist() if x.dtype == object else x.tobytes() for name, x in found.items()}


def left_over(folder):
    """What is left in the folder of a case besides whole outputs and their shards; and what is wrong with outputs."""
    from ringmpi.files.shards import verify
    wrong, known = [], set()
    if (folder / "run.json").exists():
        json.loads((folder / "run.json").read_text())
        known.add(folder / "run.json")
    out = folder / "out.h5"
    if out.exists():
        known |= {out, folder / "out.h5.shards"}
        if (folder / "out.h5.shards").exists():
            known |= {parent for shard in verify(out).shards for parent in [folder / shard.file,
                                                                             (folder / shard.file).parent]}
    wrong += [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path not in known]
    return wrong


def command_line(arguments, folder, ranks=1, env=None, timeout=60, script=None):
    """Run `ringmpi` on ranks; return the exit code and what was said."""
    start = ["-c", script] if script else ["-m", "ringmpi"]
    result = launch.launch(ranks, [*start, *map(str, arguments)], folder=folder / "said", env=env, timeout=timeout)
    return result.code, result.text


def judge_output(code, said, out, right):
    """Say what is wrong with how a run in processes of its own ended."""
    if code not in (DONE, NOT_WRITTEN):
        return f"exit {code}: {said[-800:]}"
    if "Traceback" in said or "Exception ignored" in said:
        return f"traceback: {said[:800]}"
    if out.exists() != (code == DONE):
        return f"exit {code}, and out.h5 {'is' if out.exists() else 'is not'} there"
    if out.exists() and arrays(out) != right:
        return "other numbers"
    left = left_over(out.parent)
    return f"exit {code}, left: {left}" if left else ""


def make_input(folder, tokens, ranks=1, options=("--backend", "numpy")):
    """Make an input and what is right for it, on so many ranks with such options."""
    command_line(["make", "random", folder / "in.h5", "--tokens", tokens, "--heads", 4, "--kv-heads", 1], folder)
    code, said = command_line(["attend", folder / "in.h5", folder / "right.h5", *options], folder, ranks,
                              timeout=240)                    # it may compile
    assert code == 0, said
    return arrays(folder / "right.h5")


def verdict(path, right):
    import h5py

    from ringmpi.errors import ShardError
    from ringmpi.files.shards import verify
    try:
        manifest = verify(path)
        rows = [manifest.rows(name, 0, 64).tobytes() for name in ("out", "lse")]
    except ShardError:
        return REFUSED
    with contextlib.suppress(OSError, RuntimeError, KeyError), h5py.File(path) as file:
        shown = [file[name][...].tobytes() for name in ("out", "lse")]
        return RIGHT if shown == rows == [right["out"], right["lse"]] else OTHER
    return UNREADABLE


def in_child(work, seconds=CHILD_SECONDS):
    """Do something in a copy of this process; return the text that it gives, or how the copy ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.disable()
        signal.alarm(seconds)
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said or f"{ENDED} {-status}"


def flipped(whole, at):
    """Bytes, one of which is another."""
    return whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1:]


def new_folder(folder, name="case"):
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    return folder / name
