"""The fault matrix: what may happen to `ringmpi attend`, how it ends, and what is left. Data; the tests make it happen.

    python tests/fault_matrix.py            write the table into docs/faults.rst

`test_fault_matrix.py` runs every row, or finds the test that is named in it, which asserts what its row says.
"""

import itertools
import signal
from pathlib import Path
from typing import NamedTuple

OPENMPI_LOST = 14
PAGE = Path(__file__).parents[1] / "docs" / "faults.rst"
BEGIN, END = ".. The table is written by: python tests/fault_matrix.py\n", ".. End of the table.\n"

# What is left, in the words of the page; `test_fault_matrix.py` has for each what it means.
RESULT = "OUT.h5, whole and right, and nothing else"
WITH_CHECKPOINT = "OUT.h5, whole and right; the checkpoint as it was"
CHECKPOINT = "a whole checkpoint, from which the same command goes on to the same bits; no OUT.h5"
NOTHING = "nothing"
EITHER = "OUT.h5, whole and right, or none; what a dead rank wrote goes with ``ringmpi clean``"
OLD = "what was there, as it was"


class Fault(NamedTuple):
    """Something that happens to a rank at a place: see at_fault.py."""

    rank: int
    place: str
    number: int
    act: str


class Damage(NamedTuple):
    """Something that is wrong with a file, and the command that meets it: see `DAMAGES` and `COMMANDS` of the tests."""

    file: str
    how: str
    command: str


class Row(NamedTuple):
    """One row.

    `tries` are lists of faults, or damages: each ends as the row says. The first of them runs by default, all
    of them with `each`; the others are exhaustive. `test` names the test of another file that makes it happen.
    """

    name: str
    when: str
    what: str
    code: str
    left: str
    says: str = ""                # a regular expression; alternatives are shown as they are
    tries: tuple = ()
    kept: bool = False            # there is a checkpoint to go on from
    options: tuple = ()
    each: bool = False            # run every try by default
    test: str = ""
    at_once: bool = True          # without waiting for the timeout

    @property
    def codes(self):
        """The exit codes that a launcher may make of it."""
        return {code for part in self.code.split(" or ") for code in launched(int(part))}


def launched(code):
    """What mpiexec says of an exit code, or of the end by a signal: MPICH's joins signals by which ranks end.

    Of a rank that is killed Open MPI itself may be the first to hear, and ends the others with a code of its own.
    """
    number = code - 128
    lost = {OPENMPI_LOST} if number == signal.SIGKILL else set()
    return {code, number, number | signal.SIGKILL, *lost} if number > 0 else {code}


BEFORE_MPI = ("phase running attend", "phase starting MPI")
READING = (("phase reading", 3), ("phase redistributing /q", 1))
RESUMING = (("after open states", 2), ("after open states", 1))
STEP = ("step 0", 1)
SAVING = ("phase saving a checkpoint", 1)
LATE = (("step 1", 1), ("phase redistributing the result", 1), ("phase writing", 1), ("phase waiting for the other", 1))
PUBLISHING = ("phase writing", 2)
ON_THE_WAY = ("--checkpoint-every", "1e-9")
REQUEST = Fault(0, "step 0", 1, "SIGUSR1")


def at(places, acts, ranks=(1, 0)):
    """The same acts at each of some places, on each of some ranks, one at a time."""
    return tuple([Fault(rank, *place, act)] for place, act, rank in itertools.product(places, acts, ranks))


# The calls of the system by which a checkpoint is published, on rank 0 and on another, and those by which OUT.h5 is.
SAVED = tuple([Fault(rank, f"{when} {name} generations", number, "SIGKILL")]
              for rank, name, number in (
                  (0, "link", 2), (1, "link", 1), (0, "link", 1), (0, "mkdir", 1), (0, "mkdir", 2),
                  *((rank, "fsync", n) for rank in (0, 1) for n in (1, 2)), *((0, "fsync", n) for n in (3, 4, 5)),
                  *((0, "unlink", n) for n in range(1, 6)), (1, "unlink", 1), (0, "rmdir", 1))
              for when in ("before", "after"))
PUBLISHED = tuple([Fault(rank, f"{when} {name} {module}", number, "SIGKILL")]
                  for rank, name, module, number in (
                      (0, "link", "new_file", 2), (1, "link", "new_file", 1), (0, "link", "new_file", 1),
                      (0, "mkdir", "shards", 1), (0, "mkdir", "shards", 2), (1, "mkdir", "shards", 1),
                      *((rank, "fsync", "shards", n) for rank in (0, 1) for n in range(1, 5)),
                      *((rank, "unlink", "new_file", 1) for rank in (0, 1)), (0, "unlink", "new_file", 2),
                      (0, "fsync", "new_file", 4))
                  for when in ("before", "after"))
REPLACED = tuple([Fault(0, f"{when} {name} {module}", number, "SIGKILL")]
                 for name, module, number in (("replace", "new_file", 1), ("unlink", "shards", 1),
                                              ("unlink", "shards", 2), ("unlink", "shards", 3), ("rmdir", "shards", 1))
                 for when in ("before", "after"))

GROUPS = {
    "A signal to one rank of a job with --checkpoint": (
        Row("request", "reading, redistributing, a ring step but the last", "SIGUSR1, or SIGTERM", "75", CHECKPOINT,
            "stopped on request: .* is computed", at((STEP, *READING), ("SIGTERM", "SIGUSR1"))),
        Row("request-resuming", "going on from a checkpoint", "SIGUSR1, or SIGTERM", "75", CHECKPOINT,
            "stopped on request: .* is computed", at(RESUMING, ("SIGUSR1", "SIGTERM")), kept=True),
        Row("request-saving", "writing a checkpoint, on the way", "SIGUSR1, or SIGTERM", "75", CHECKPOINT,
            "stopped on request: .* is computed", at((SAVING,), ("SIGTERM", "SIGUSR1")), options=ON_THE_WAY),
        Row("request-late", "the last ring step, and all that follows", "SIGUSR1, or SIGTERM", "0", RESULT, "",
            (*at(LATE[2:3], ("SIGTERM", "SIGUSR1")), *at(LATE, ("SIGTERM", "SIGUSR1")),
             *at((PUBLISHING,), ("SIGTERM", "SIGUSR1"), (0,)))),
        Row("request-launcher", "a ring step but the last", "SIGUSR1 to ``mpiexec``, which forwards it", "75",
            CHECKPOINT, test="test_checkpoints.py::test_a_request_to_the_launcher"),
        Row("request-early", "before MPI has started", "SIGUSR1", "138", OLD,
            "was killed by SIGUSR1 while|died while",
            at(((place, 1) for place in BEFORE_MPI), ("SIGUSR1",)), kept=True),
        Row("term-early", "before MPI has started", "SIGTERM", "143", OLD,
            "ended by SIGTERM|was killed by SIGTERM|died while",
            at(((place, 1) for place in BEFORE_MPI), ("SIGTERM",)), kept=True),
        Row("twice", "a ring step, writing a checkpoint", "SIGTERM, and once more a second later", "143", CHECKPOINT,
            "ended by SIGTERM while", at((SAVING, ("step 1", 1)), ("SIGTERM SIGTERM",)), kept=True, options=ON_THE_WAY),
        Row("int", "any time until OUT.h5 gets its name", "SIGINT", "130", CHECKPOINT, "ended by SIGINT while",
            at((SAVING, *READING, *RESUMING, ("step 1", 1), *LATE[1:3]), ("SIGINT",)), kept=True, options=ON_THE_WAY),
        Row("kill", "any time until OUT.h5 gets its name", "SIGKILL", "137 or 5", CHECKPOINT,
            "was killed by SIGKILL while|died while|gave up|is lost|waited",
            at((SAVING, *READING, *RESUMING, ("step 1", 1), *LATE[1:3]), ("SIGKILL",)), kept=True, options=ON_THE_WAY),
        Row("stop", "any time until OUT.h5 gets its name", "SIGSTOP", "5 or 137", CHECKPOINT,
            r"waited .* for .* s \(timeout 2 s\)|is ended: it was stuck",
            at((SAVING, *READING, *RESUMING, ("step 1", 1), *LATE[1:3]), ("SIGSTOP",)), kept=True,
            options=(*ON_THE_WAY, "--timeout", "2"), at_once=False),
        Row("kill-saving", "between any two steps of writing a checkpoint", "SIGKILL", "137 or 5", CHECKPOINT,
            "", SAVED, kept=True, options=ON_THE_WAY),
    ),
    "A signal to one rank of a job without": (
        Row("plain-term", "any time until MPI ends", "SIGTERM", "143 or 5", NOTHING, "ended by SIGTERM",
            test="test_attacks.py::test_signals_in_each_phase"),
        Row("plain-int", "any time until MPI ends", "SIGINT", "130 or 5", NOTHING, "ended by SIGINT",
            test="test_attacks.py::test_signals_in_each_phase"),
        Row("plain-kill", "any time", "SIGKILL", "137 or 5", EITHER, "was killed by SIGKILL",
            test="test_attacks.py::test_signals_in_each_phase"),
        Row("plain-stop", "any time", "SIGSTOP", "5 or 137", EITHER, "waited",
            test="test_attacks.py::test_signals_in_each_phase", at_once=False),
        Row("plain-cont", "any time", "SIGSTOP, and SIGCONT before the timeout", "0", RESULT,
            test="test_attacks.py::test_signals_in_each_phase"),
        Row("plain-usr1", "any time until MPI ends", "SIGUSR1, which asks for nothing here: MPICH takes it for its own",
            "138 or 0", EITHER, "", at((*READING[:1], STEP), ("SIGUSR1",))),
        Row("kill-publishing", "between any two steps of writing OUT.h5", "SIGKILL", "137 or 5", EITHER, "", PUBLISHED),
        Row("kill-replacing", "between any two steps of replacing OUT.h5, ``--force``", "SIGKILL", "137 or 5",
            "the old OUT.h5 or the new one, whole", "", REPLACED, options=("--force",)),
    ),
    "Writes and reads that fail": (
        Row("full-shard", "writing a shard", "ENOSPC, EIO, EDQUOT, on a rank", "6", NOTHING,
            "can't be written: .*Errno",
            tuple([Fault(1, place, number, act)] for place, number, act in (
                ("before pwrite new_file", 2, "ENOSPC"), ("before pwrite new_file", 1, "EIO"),
                ("before fsync new_file", 1, "EIO"), ("before link new_file", 1, "EDQUOT"),
                ("before fsync shards", 3, "EIO")))),
        Row("full-out", "writing OUT.h5 over the shards", "ENOSPC, EIO, EDQUOT", "6", NOTHING,
            "can't be written: .*Errno",
            tuple([Fault(0, place, number, act)] for place, number, act in (
                ("before link new_file", 2, "ENOSPC"), ("before fsync new_file", 3, "EIO")))),
        Row("full-kept", "writing a shard or OUT.h5, with ``--checkpoint``", "ENOSPC, EIO", "6", CHECKPOINT,
            "can't be written: .*Errno", tuple([Fault(rank, "before link shards", 1, act)] for rank, act in (
                (1, "ENOSPC"), (0, "EIO"))), kept=True, options=ON_THE_WAY),
        Row("full-way", "writing a checkpoint, on the way", "ENOSPC, EIO", "0", RESULT,
            "no checkpoint was written, the last one is as it was", tuple([Fault(rank, place, number, act)]
                for rank, place, number, act in (
                (1, "before pwrite generations", 1, "ENOSPC"), (0, "before link generations", 2, "EIO"),
                (0, "before fsync generations", 1, "EIO"), (0, "before mkdir generations", 1, "ENOSPC"))),
            options=ON_THE_WAY),
        Row("full-request", "writing a checkpoint, on request", "ENOSPC, EIO", "6", NOTHING,
            "can't be written: .*Errno",
            tuple([REQUEST, Fault(rank, place, number, act)] for rank, place, number, act in (
                (1, "before pwrite generations", 1, "ENOSPC"), (0, "before link generations", 2, "EIO"),
                (0, "before mkdir generations", 1, "ENOSPC")))),
        Row("full-record", "writing the record, ``--json``", "ENOSPC, EIO", "6", RESULT, "can't be written: .*Errno",
            tuple([Fault(0, "before replace record", 1, act)] for act in ("ENOSPC", "EIO"))),
        Row("calls", "any call that writes, once or from then on", "ENOSPC, EIO, EDQUOT", "6 or 0", EITHER,
            test="test_faults.py::test_each_call_that_writes_fails"),
        Row("disk", "writing shards and OUT.h5", "a disk that is full, a limit on the size of files", "6 or 0", EITHER,
            test="test_faults.py::test_a_limit_on_the_size_of_files"),
        Row("read", "reading an input, or a result", "EIO", "3 or 6", NOTHING, "can't be read: Input/output error",
            test="test_faults.py::test_reads_that_fail"),
        Row("read-checkpoint", "going on from a checkpoint", "EIO", "0", RESULT,
            "no checkpoint is used, and all is computed: .*can't be read",
            tuple([Fault(rank, "before open states", number, "EIO")] for rank, number in ((1, 2), (0, 1))), kept=True),
        Row("read-required", "the same, with ``--resume require``", "EIO", "3", CHECKPOINT, "can't be read",
            tuple([Fault(rank, "before open states", number, "EIO")] for rank, number in ((1, 2), (0, 1))), kept=True,
            options=("--resume", "require")),
    ),
    "Files that are damaged": (
        Row("input", "attending", "an input of ``ringmpi make`` with a flipped byte, or cut", "3", NOTHING,
            "can't be read|damaged", tuple(Damage("input", how, "attend") for how in ("flip", "cut")), each=True),
        Row("shard", "checking, merging", "a shard with a flipped byte, cut, longer, or gone", "3", OLD,
            "expected .* bytes|damaged|is missing", tuple(
                Damage("shard", how, command) for command in ("check", "merge")
                for how in ("flip", "cut", "long", "gone")), each=True),
        Row("out", "checking, merging", "an OUT.h5 with a flipped byte, or cut", "3", OLD, "damaged|can't be read",
            tuple(Damage("out", how, command) for command in ("check", "merge") for how in ("flip", "cut")), each=True),
        Row("single", "checking", "a result in one file with a flipped byte, or cut", "3", OLD,
            "damaged|can't be read",
            tuple(Damage("single", how, "check single") for how in ("flip", "cut")), each=True),
        Row("state", "going on from a checkpoint", "a rank's file, or the manifest, with a flipped byte, cut, longer, "
            "gone, or a folder", "0", RESULT, "no checkpoint is used, and all is computed: ",
            tuple(Damage(file, how, "resume") for file, how in (
                *(("state", how) for how in ("flip", "cut", "long", "gone", "folder")),
                *(("manifest", how) for how in ("flip", "cut", "long")))), each=True),
        Row("state-required", "the same, with ``--resume require``", "the same", "3", OLD,
            "is damaged|expected .* bytes|can't be read|expected a regular file|has no complete checkpoint",
            tuple(Damage(file, how, "require") for file in ("state", "manifest") for how in (
                "flip", "cut", "long", "gone", "folder")), each=True),
        Row("seeds", "reading", "inputs, shards, results, caches, checkpoints, damaged by numbered seeds", "3", OLD,
            test="test_attacks.py::test_damaged_checkpoints"),
        Row("werror", "going on from a checkpoint that is damaged", "warnings are errors, ``-W error``", "70", OLD,
            "no checkpoint is used", test="test_checkpoints.py::test_where_warnings_are_errors_all_ranks_end"),
    ),
    "A checkpoint of something else": (
        Row("other", "going on from a checkpoint", "of another version, input, mask, scale or schedule that can't", "0",
            WITH_CHECKPOINT, "no checkpoint is used, and all is computed: ",
            tuple(Damage("none", how, "resume") for how in ("version", "numbers", "options")), each=True),
        Row("other-required", "the same, with ``--resume require``", "the same", "2", OLD,
            "expected a checkpoint of this call: .* there and .* here",
            tuple(Damage("none", how, "require") for how in ("version", "numbers", "options")), each=True),
        Row("ranks", "going on from a checkpoint", "on other ranks, or in another layout", "0", RESULT,
            tries=(Damage("none", "", "require"),), each=True),
        Row("none", "``--resume require``", "no checkpoint is there", "3", NOTHING,
            "has no complete checkpoint to go on",
            (Damage("checkpoints", "gone", "require"),), each=True),
    ),
    "Two jobs": (
        Row("exists", "starting", "an OUT.h5 is there, and no ``--force``", "6", OLD, "exists; choose another name",
            (Damage("none", "", "again"),), each=True),
        Row("race", "both at the same time", "one OUT.h5", "6 or 0", RESULT, "exists; choose another name",
            test="test_faults.py::test_two_jobs_for_one_output"),
        Row("race-force", "both at the same time", "one OUT.h5, with ``--force``", "0", RESULT,
            test="test_fault_matrix.py::test_two_jobs_that_replace_one_output"),
        Row("race-checkpoints", "both at the same time", "the same call in one ``--checkpoint`` folder, another OUT.h5",
            "0", RESULT, test="test_fault_matrix.py::test_two_jobs_in_one_folder_of_checkpoints"),
    ),
}
ROWS = {row.name: row for rows in GROUPS.values() for row in rows}


def table():
    """The table as reStructuredText."""
    lines = []
    for title, rows in GROUPS.items():
        lines += [f".. list-table:: {title}", "   :header-rows: 1", "   :widths: 24 24 10 30", ""]
        cells = [("when", "what happens", "exit code", "what is left")]
        for row in rows:
            late = "" if row.at_once else "; after ``--timeout``"
            cells.append((row.when, row.what, row.code, row.left + late))
        for row in cells:
            lines += [f"   {'* -' if not number else '  -'} {cell}" for number, cell in enumerate(row)]
        lines.append("")
    return "\n".join(lines)


def page(text):
    """The page with the table as it should be."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
