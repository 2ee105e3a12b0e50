"""Files appear whole or not at all; what is there and no regular file is never replaced."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
from job_files import attend, make_random, write_arrays

from ringmpi import OutputError
from ringmpi.cli import main
from ringmpi.dtypes import BFLOAT16
from ringmpi.files.manifest import read_manifest
from ringmpi.files.new_file import new_file, replace_file
from ringmpi.files.paths import check_writable
from ringmpi.files.record import write_json
from ringmpi.files.shards import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random(tmp_path_factory.mktemp("input") / "in.h5", 64, heads=2, dim=8)


def write(path, data=b"new", force=False):
    with new_file(path, force) as file:
        file.write(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def special(folder):
    """A pipe, a device where one can be made, a link to a file and one to nothing."""
    (folder / "real").write_text("precious")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(folder / "real")
    (folder / "dangling").symlink_to(folder / "nothing")
    if os.geteuid() == 0:
        os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return [folder / name for name in names(folder) if name != "real"]


def test_what_is_no_regular_file_stays(source, tmp_path, capsys):
    for path in special(tmp_path):
        before = os.lstat(path).st_ino
        for force in (True, False):
            with pytest.raises(OutputError, match=r"refused: a (pipe|device|symbolic link)"):
                write(path, force=force)
        for command in (["attend", source, path, "--backend", "numpy"], ["attend", source, path, "--dry-run"],
                        ["make", "random", path, "--tokens", "4"]):
            assert main([*map(str, command), "--force"]) == 6
            assert "refused: a " in capsys.readouterr().err
        assert os.lstat(path).st_ino == before
    assert (tmp_path / "real").read_text() == "precious"
    assert set(names(tmp_path)) <= {"real", "pipe", "link", "dangling", "null"}


@pytest.mark.parametrize("name", ["", "/", ".", "..", "x" * 250, "x/" * 3000])
def test_odd_names(source, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["attend", str(source), name], ["make", "random", name, "--tokens", "4"],
                    ["attend", str(source), "out.h5", "--json", name]):
        assert main(command) == 6
        assert capsys.readouterr().err.startswith("ringmpi: ")
    assert main(["attend", name, "out.h5"]) == 3
    assert not names(tmp_path)


def test_a_name_that_hdf5_cannot_refer_to(source, tmp_path):
    for name in (os.fsdecode(b"\xff.h5"), "x%b.h5", "new\nline.h5"):
        assert main(["attend", str(source), str(tmp_path / name), "--backend", "numpy"]) == 2
    assert not names(tmp_path)
    out = tmp_path / "größe λ.h5"
    attend(source, out)
    assert main(["check", str(source), str(out)]) == 0


def test_shards_in_a_folder_that_is_a_link(source, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.h5.shards").symlink_to("elsewhere")
    assert main(["attend", str(source), str(tmp_path / "out.h5")]) == 6
    assert "shards must lie beside out.h5" in capsys.readouterr().err
    assert not names(tmp_path / "elsewhere")


@pytest.mark.parametrize("seen", [True, False])
def test_a_name_that_is_taken_meanwhile(tmp_path, monkeypatch, seen):
    """Even between the last look and the naming."""
    def race():
        with new_file(tmp_path / "x") as file:
            file.write(b"late")
            (tmp_path / "x").write_text("first")
            if not seen:
                monkeypatch.setattr("ringmpi.files.new_file.check_writable", lambda path, force: None)

    with pytest.raises(OutputError, match="exists"):
        race()
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "first"


def raising(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))
    return fail


def test_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", raising(errno.EPERM))
    write(tmp_path / "x")
    with pytest.raises(OutputError, match="exists"):
        write(tmp_path / "x", b"other")
    monkeypatch.setattr("os.replace", raising(errno.EIO))
    monkeypatch.setattr("pathlib.Path.replace", raising(errno.EIO))
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "y")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("force", [False, True])
def test_a_network_file_system_that_asks_twice(tmp_path, monkeypatch, force):
    """The name was given, but the answer was lost, and asking again fails: what is there decides."""
    where, real = ("pathlib.Path.replace", os.replace) if force else ("os.link", os.link)

    def twice(old, new):
        real(old, new)
        raise FileNotFoundError(errno.ENOENT, "gone") if force else FileExistsError(errno.EEXIST, "there")

    monkeypatch.setattr(where, twice)
    write(tmp_path / "x", force=force)
    assert names(tmp_path) == ["x"]


def test_nothing_fails_once_a_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("ringmpi.files.new_file.flush_to_disk", lambda path: 1 / 0)
    write(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_no_shard_is_taken_away_once_out_has_its_name(source, tmp_path, monkeypatch):
    monkeypatch.setattr("ringmpi.files.new_file.flush_to_disk", lambda path: 1 / 0)
    attend(source, tmp_path / "out.h5")
    monkeypatch.undo()
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0


def test_a_file_of_a_cache(tmp_path, monkeypatch):
    """It is replaced whole; where that fails the old one stays, and nothing is beside it."""
    replace_file(tmp_path / "x", b"old")
    replace_file(tmp_path / "x", b"new")
    monkeypatch.setattr("pathlib.Path.replace", raising(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(tmp_path / "x", b"newer")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"new"


def test_json_goes_into_pipes_and_devices(tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    with pytest.raises(OutputError, match="nobody has this pipe open to read"):
        write_json(path, {"x": 1})
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    reader.start()
    content = {"x": "y" * 200_000}                       # more than a pipe holds
    write_json(path, content)
    os.close(descriptor)
    reader.join(20)
    assert stat.S_ISFIFO(path.stat().st_mode)
    write_json(tmp_path / "x.json", content)
    write_json(tmp_path / "x.json", content)             # a file is replaced
    assert json.loads((tmp_path / "x.json").read_text()) == content
    assert json.loads("".join(got) or json.dumps(content)) == content
    assert names(tmp_path) == ["pipe", "x.json"]


def test_json_into_a_full_pipe_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("ringmpi.files.streams.PIPE_SECONDS", 0.3)
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OutputError, match=r"nobody read from it for 0\.3 s"):
        write_json(tmp_path / "pipe", {"x": "y" * 200_000})
    os.close(descriptor)


def test_json_to_standard_output(source, tmp_path):
    line = [sys.executable, "-m", "ringmpi", "attend", str(source), "out.h5", "--backend", "numpy", "--json", "-"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["ranks"] == 1
    assert "64 tokens on 1 rank" in done.stderr
    assert names(tmp_path) == ["out.h5", "out.h5.shards"]


@pytest.mark.parametrize("command", [["info"], ["check", "in.h5", "out.h5"],
                                     ["attend", "in.h5", "new.h5", "--json", "-", "--quiet"],
                                     ["attend", "in.h5", "new.h5", "--dry-run"], ["attend", "in.h5", "new.h5"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full(source, tmp_path, command, unbuffered):
    shutil.copy(source, tmp_path / "in.h5")
    attend(source, tmp_path / "out.h5")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "ringmpi", *command], cwd=tmp_path, stdout=full, timeout=60,
                              stderr=subprocess.PIPE, text=True, check=False,
                              env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 6, done.stderr
    assert re.search(r"(?m)^ringmpi: (rank 0: )?standard output: can't be written: .*No space left", done.stderr)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("line", ["info", "plan --tokens 4096 --ranks 8", "plan --tokens 4096 --ranks 8 --json -",
                                  "attend in.h5 out.h5 --backend numpy", "attend in.h5 out.h5 --dry-run",
                                  "attend in.h5 out.h5 --backend numpy --json - --quiet"])
def test_nobody_reads_what_is_printed(line, source, tmp_path):
    """The pipe is closed, as by `head`: the exit code says it, and no text, as with other tools of Unix."""
    shutil.copy(source, tmp_path / "in.h5")
    reader, writer = os.pipe()
    os.close(reader)
    said = subprocess.run([sys.executable, "-m", "ringmpi", *line.split()], stdout=writer, stderr=subprocess.PIPE,
                          text=True, timeout=60, check=False, cwd=tmp_path)
    os.close(writer)
    assert said.returncode == 6
    assert not re.search("pipe|written|Traceback|ignored", said.stderr), said.stderr


def test_json_that_cannot_be_written(source, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for name in ("folder", "gone/run.json"):
        assert main(["attend", str(source), str(tmp_path / "out.h5"), "--json", str(tmp_path / name)]) == 6
    assert "no such folder" in capsys.readouterr().err
    assert names(tmp_path) == ["folder"]


def test_check_writable_says_yes(tmp_path):
    check_writable(tmp_path / "x", False)
    (tmp_path / "x").touch()
    check_writable(tmp_path / "x", True)


def test_raw_bfloat16_from_file_to_file(source, tmp_path, capsys):
    """As others store it: on request, and `check` knows of it from the record."""
    with h5py.File(source) as file:
        whole = {name: file[name][...].astype(BFLOAT16) for name in "qkv"}
    write_arrays(tmp_path / "real.h5", whole)
    with h5py.File(tmp_path / "raw.h5", "w") as raw:
        for name, x in whole.items():
            raw[name] = x.view("i2") if name == "k" else x             # h5py makes opaque items of it
    out, same = tmp_path / "out.h5", tmp_path / "same.h5"
    assert main(["attend", str(tmp_path / "raw.h5"), str(out), "--backend", "numpy"]) == 3
    assert "say --raw-dtype bfloat16" in capsys.readouterr().err
    for layout in ("contiguous", "striped"):
        attend(tmp_path / "raw.h5", out, "--force", "--layout", layout, "--raw-dtype", "bfloat16")
        attend(tmp_path / "real.h5", same, "--force", "--layout", layout)
        assert main(["check", str(tmp_path / "raw.h5"), str(out)]) == 0
        assert read_manifest(out).rows("out", 0, 64).tobytes() == read_manifest(same).rows("out", 0, 64).tobytes()


def test_a_megabyte_of_documents(source, tmp_path, capsys):
    shutil.copy(source, tmp_path / "in.h5")
    with h5py.File(tmp_path / "in.h5", "a") as file:
        file.create_dataset("documents", data=np.zeros(2**21, "i8"), compression="gzip")
    assert main(["attend", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--documents"]) == 3
    assert "expected at most 1,048,576 integers, got 2,097,152" in capsys.readouterr().err


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full(source, tmp_path, streams):
    """The result is what counts: a log that can't be written costs none, and no file takes the place of a stream."""
    line = f'"{sys.executable}" -m ringmpi attend "{source}" "{tmp_path}/out.h5" --backend numpy {streams}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    assert "Traceback" not in done.stdout + done.stderr
    verify(tmp_path / "out.h5")


def test_check_takes_no_module_of_the_current_folder(source, tmp_path):
    """The process that opens a view first is a Python of its own."""
    attend(source, tmp_path / "out.h5")
    (tmp_path / "h5py.py").write_text("open('taken', 'w')")
    program = "import sys; sys.path.pop(0); from ringmpi.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", program, "check", str(source), "out.h5"], cwd=tmp_path, check=True,
                   timeout=60)
    assert not (tmp_path / "taken").exists()
