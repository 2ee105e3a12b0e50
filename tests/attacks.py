"""Attacks on files and processes: what fails, how it ends, what is left. Prints a table; ends with 1 if any is wrong.

    python tests/attacks.py                   every family, about an hour
    python tests/attacks.py faults disks      these alone

For every case: it ends in bounded time, with a documented exit code, and afterwards there is the complete right output
or none. A family is a function that takes a folder and yields a `Case` for each attack; add others to FAMILIES.
"""

import contextlib
import ctypes
import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import attack_mutations
import attack_seals
import attack_signals
from attack_cases import (
    DONE,
    ENDED,
    FIRST_SECONDS,
    HERE,
    NOT_WRITTEN,
    REFUSED,
    RIGHT,
    Case,
    arrays,
    command_line,
    flipped,
    in_child,
    judge_output,
    left_over,
    make_input,
    new_folder,
    verdict,
)

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
CALLS = ("write", "short write", "fsync", "rename", "close", "open", "mkdir", "truncate", "unlink")
COMMANDS = {
    "make": ["make", "random", "CASE/out.h5", "--tokens", "64", "--heads", "2", "--dim", "8", "--documents", "3"],
    "text": ["make", "text", "CASE/out.h5", "attacks.py", "--tokens", "500"],
    "attend": ["attend", "in.h5", "CASE/out.h5", "--backend", "numpy", "--json", "CASE/run.json", "--quiet"],
    "replace": ["attend", "in.h5", "CASE/out.h5", "--backend", "numpy", "--force", "--quiet"],
    "merge": ["merge", "ref/out.h5", "CASE/out.h5"],
}


def compiler():
    """The C compiler of this machine, or None."""
    return shutil.which("gcc") or shutil.which("cc")


def build_shim(folder):
    """Compile shim.c."""
    library = Path(folder) / "shim.so"
    subprocess.run([compiler(), "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


def run_here(arguments):
    """Run the command line in this process; return its exit code and what it said."""
    from ringmpi.cli import main
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    return code, said.getvalue()


def sweep(folder, commands, calls, errnos, most):
    """Under the shim: let the n-th call fail, once or from then on, for n from 0 until no call is reached. Cases."""
    import ringmpi.files.shards
    ringmpi.files.shards.probe = lambda path: None          # for speed; `flips` has it
    shim = ctypes.CDLL(None)
    shim.fault_hits.restype = ctypes.c_long
    os.chdir(folder)
    shutil.copy(HERE / "attacks.py", folder)
    run_here(["make", "random", "in.h5", "--tokens", "64", "--heads", "2", "--dim", "8"])
    (folder / "ref").mkdir()
    run_here(["attend", "in.h5", "ref/out.h5", "--backend", "numpy"])
    for command in commands:
        right = _reference(folder, command)
        for call, code, count in itertools.product(calls, errnos, (1, 0)):
            for after in range(most + 1):
                _fresh(folder, command)
                os.environ.update(FAULT_CALL=call.removeprefix("short "), FAULT_PATH="/CASE", FAULT_AFTER=str(after),
                                  FAULT_COUNT=str(count), FAULT_ERRNO=str(code))
                if call.startswith("short"):
                    os.environ["FAULT_SHORT"] = "1"
                shim.fault_reset()
                result, said = run_here(COMMANDS[command])
                reached = shim.fault_hits() > after
                del os.environ["FAULT_CALL"]
                os.environ.pop("FAULT_SHORT", None)
                name = f"{command}, {call} {after} {'once' if count else 'and all later'}: {errno.errorcode[code]}"
                wrong = _judge(folder, command, call, result, said, right, reached)
                yield Case(name, f"{command}: exit {result}", wrong)
                if not reached:
                    break


def _fresh(folder, command):
    shutil.rmtree(folder / "CASE", ignore_errors=True)
    (folder / "CASE").mkdir()
    if command == "replace":
        shutil.copytree(folder / "ref", folder / "CASE", dirs_exist_ok=True)


def _reference(folder, command):
    _fresh(folder, command)
    code, said = run_here(COMMANDS[command])
    assert code == 0, said
    return arrays(folder / "CASE" / "out.h5")


def _judge(folder, command, call, code, said, right, reached):
    """Say what is wrong with how a case ended; empty if nothing is."""
    out = folder / "CASE" / "out.h5"
    if code not in (DONE, NOT_WRITTEN):
        return f"exit {code}: {said[-500:]}"
    if code != DONE and (not reached or call == "short write"):
        return f"nothing failed, and exit {code}: {said[-500:]}"
    if code == NOT_WRITTEN and "ringmpi: " not in said:
        return "not a word"
    if "Traceback" in said or "Exception ignored" in said:
        return f"traceback: {said[-500:]}"
    if out.exists() and arrays(out) != right:
        return f"exit {code}, and out.h5 holds other numbers"
    if not out.exists() and (code == DONE or command == "replace"):
        return f"exit {code}, and no out.h5"
    old = {path.relative_to(folder / "ref").as_posix() for path in (folder / "ref").rglob("*")}
    left = [name for name in left_over(folder / "CASE") if command != "replace" or name not in old]
    return f"exit {code}, left: {left}" if left and call != "unlink" else ""


def faults(folder, commands=tuple(COMMANDS), calls=CALLS, errnos=ERRNOS, most=40, timeout=1500):
    """Each call that writes fails: the sweep, in a process of its own."""
    line = [sys.executable, HERE / "attacks.py", "--sweep", folder, json.dumps([commands, calls, errnos, most])]
    yield from _cases(line, {"LD_PRELOAD": str(build_shim(folder))}, timeout)


def _cases(line, environment, timeout):
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=timeout, check=False,
                          env={**os.environ, **environment})
    yield from (Case(*json.loads(text)) for text in done.stdout.splitlines())
    said = done.stderr.strip()
    yield Case("end of the process", f"exit {done.returncode}", said[-1000:] if done.returncode or said else "")


def ranks(folder, numbers=range(0, 20, 2), errnos=ERRNOS):
    """One rank of two, then both, can't write."""
    shim = build_shim(folder)
    right = make_input(folder, 64, 2)
    for part, code, after in itertools.product((".00001.h5", ".shards/", "/.out.h5."), errnos, numbers):
        out = new_folder(folder) / "out.h5"
        env = {"LD_PRELOAD": str(shim), "FAULT_CALL": "write", "FAULT_PATH": part, "FAULT_AFTER": str(after),
               "FAULT_ERRNO": str(code)}
        result, said = command_line(["attend", folder / "in.h5", out, "--backend", "numpy"], folder, 2, env)
        yield Case(f"2 ranks, write {after} of {part}: {errno.errorcode[code]}", f"exit {result}",
                   judge_output(result, said, out, right))


LIMITED = """
import resource, sys
from mpi4py import MPI
limit = int(sys.argv.pop(1)) * 1024
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import ringmpi.cli
sys.exit(ringmpi.cli.main())
"""
LIMITS = (8, 16, 64, 256, 480, 510, 520, 700, 900, 1000, 1004, 1008, 1012, 1015, 1016, 1020, 1030)


def limits(folder, sizes=LIMITS, most_ranks=2):
    """A limit on the size of a file, as of ulimit, a quota or a file system; in KiB."""
    for count in range(1, most_ranks + 1):
        right = make_input(new_folder(folder, f"in{count}"), 1000, count)
        for size in sizes:
            out = new_folder(folder) / "out.h5"
            code, said = command_line([size, "attend", folder / f"in{count}" / "in.h5", out, "--backend", "numpy"],
                                      folder, count, script=LIMITED)
            yield Case(f"{count} ranks, at most {size} KiB", f"exit {code}", judge_output(code, said, out, right))


def disks(folder, sizes=range(16, 1200, 28)):
    """A file system that is full at some point; in KiB. As root only."""
    if os.geteuid() or not shutil.which("mount"):
        return
    right = make_input(folder, 1000)
    for size in sizes:
        mounted = new_folder(folder)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", mounted], check=False,
                              capture_output=True)
        if made.returncode:
            return                                    # not allowed here
        try:
            out = mounted / "out.h5"
            code, said = command_line(["attend", folder / "in.h5", out, "--backend", "numpy"], folder)
            yield Case(f"disk of {size} KiB", f"exit {code}", judge_output(code, said, out, right))
        finally:
            subprocess.run(["umount", mounted], check=True)


def flips(folder, step=5, places=None):
    """A byte of an OUT.h5 is another: `check` says so, or a plain reader sees what it should.

    Each in a child: the HDF5 library dies of some of them, or never ends, and `check` must not.
    """
    right = make_input(folder, 64, 2)
    path = folder / "right.h5"
    whole = path.read_bytes()
    for at in places(whole) if places else range(0, len(whole), step):
        path.write_bytes(flipped(whole, at))
        with mock.patch("ringmpi.files.shards.probe"):          # for speed: where HDF5 dies or hangs of it, with it
            outcome = in_child(lambda: verdict(path, right), FIRST_SECONDS)
        if outcome.startswith(ENDED):
            with mock.patch("ringmpi.files.manifest.PROBE_SECONDS", FIRST_SECONDS):
                outcome = in_child(lambda: verdict(path, right))
        yield Case(f"byte {at}", outcome, "" if outcome in (REFUSED, RIGHT) else outcome)
    path.write_bytes(whole)


def races(folder, rounds=30):
    """Two jobs for one OUT.h5: one result stays, whole, and the other job says that it could not."""
    right = make_input(folder, 64)
    for number in range(rounds):
        out = new_folder(folder) / "out.h5"
        line = [sys.executable, "-m", "ringmpi", "attend", str(folder / "in.h5"), str(out), "--backend", "numpy"]
        jobs = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
        said = [job.communicate(timeout=60)[0] for job in jobs]
        codes = sorted(job.returncode for job in jobs)
        wrong = "" if codes == [DONE, NOT_WRITTEN] else "".join(said)[-500:]
        if not wrong and arrays(out) != right:
            wrong = "other numbers"
        yield Case(f"race {number}", f"exit {codes}", wrong or ", ".join(left_over(out.parent)))


FAMILIES = {"faults": faults, "ranks": ranks, "limits": limits, "disks": disks, "flips": flips, "races": races,
            "signals": attack_signals.signals, "inputs": attack_mutations.inputs, "outputs": attack_mutations.outputs,
            "singles": attack_mutations.singles, "caches": attack_mutations.caches,
             "checkpoints": attack_mutations.checkpoints, "streams": attack_mutations.streams,
             "seals": attack_seals.seals, "rates": attack_seals.rates}


def report(name, cases: Iterator[Case]):
    """Count outcomes and print what is wrong; return how much is."""
    start, outcomes, wrong = time.monotonic(), Counter(), 0
    for case in cases:
        outcomes[case.outcome] += 1
        if case.wrong:
            wrong += 1
            print(f"WRONG: {name}: {case.name}: {case.wrong}", flush=True)
    for outcome, number in sorted(outcomes.items()):
        print(f"{name:12}{outcome:60}{number:8}")
    print(f"{name:12}{'wrong':60}{wrong:8}   in {time.monotonic() - start:.0f} s", flush=True)
    return wrong


def main():
    """Run the families that are named, or all."""
    if sys.argv[1:2] == ["--sweep"]:
        commands, calls, errnos, most = json.loads(sys.argv[3])
        for case in sweep(Path(sys.argv[2]), commands, calls, errnos, most):
            print(json.dumps(case), flush=True)
        return 0
    wrong = 0
    for name in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            wrong += report(name, FAMILIES[name](Path(folder)))
    return 1 if wrong else 0


if __name__ == "__main__":
    import conftest  # noqa: F401 (ranks that outnumber cores must not spin)
    sys.exit(main())
