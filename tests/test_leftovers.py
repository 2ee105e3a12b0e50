"""`ringmpi clean`: what interrupted runs left goes, and nothing else."""

import os
import shutil
import time

import h5py
import numpy as np
import pytest

from ringmpi import ShardError
from ringmpi.cli import main
from ringmpi.files.leftovers import find_leftovers
from ringmpi.files.manifest import Shard, read_manifest
from ringmpi.files.shards import Output, digest, verify

OLD = "0123456789ab", "0123456789ac", "0123456789ad"
ROWS = np.ones((4, 1, 2), "f4")


def write(path, run, publish):
    output = Output(path, run, force=True)
    output.prepare()
    shard = output.write(0, 0, ROWS, ROWS[..., 0])
    if publish:
        output.publish([shard], {"out": (ROWS.shape, ROWS.dtype), "lse": (ROWS.shape[:2], ROWS.dtype)}, {})
    return output


def age(path, hours=48.0):
    for found in (*path.rglob("*"), path):
        os.utime(found, (time.time() - 3600 * hours,) * 2)


@pytest.fixture
def path(tmp_path):
    """An output, a run that was killed while it wrote, one that had not yet written, and one that is at work."""
    path = tmp_path / "out.h5"
    write(path, OLD[0], publish=False)
    Output(path, OLD[1], force=False).prepare()
    (path.parent / "out.h5.shards" / OLD[0] / f".00001.h5.{OLD[0]}.tmp").write_bytes(b"half")
    (tmp_path / f".out.h5.{OLD[0]}.tmp").write_bytes(b"half")
    write(path, "fedcba987654", publish=True)
    age(tmp_path)
    write(path, OLD[2], publish=False)
    return path


def there(path):
    return sorted(str(found.relative_to(path.parent)) for found in path.parent.rglob("*") if found.is_dir() or
                  found.name.startswith("."))


def test_what_nobody_shows_goes(path, capsys):
    verify(path)
    before = there(path)
    assert main(["clean", str(path), "--dry-run"]) == 0
    assert there(path) == before
    said = capsys.readouterr().out
    assert said.count("would be removed") == 3
    assert said.count("left alone") == 1
    assert main(["clean", str(path)]) == 0
    assert there(path) == ["out.h5.shards", f"out.h5.shards/{OLD[2]}", "out.h5.shards/fedcba987654"]
    verify(path)
    assert main(["clean", str(path), "--older-than", "0"]) == 0
    assert there(path) == ["out.h5.shards", "out.h5.shards/fedcba987654"]
    assert capsys.readouterr().out.splitlines()[-1] != "0 KiB freed"
    assert main(["clean", str(path)]) == 0
    assert capsys.readouterr().out == "0 KiB freed\n"
    verify(path)


def test_without_a_result_nothing_is_left(path, tmp_path):
    path.unlink()
    assert main(["clean", str(path), "--older-than", "0"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_output_of_another_name_keeps_its_shards(path):
    """A renamed one, one whose name does not say what it is, and one that is hidden."""
    for number, name in enumerate(("renamed", "other.h5", ".hidden.h5")):
        write(path, str(number) * 12, publish=True)
        path.rename(path.with_name(name))
    assert main(["clean", str(path), "--older-than", "0"]) == 0
    for name in ("renamed", "other.h5", ".hidden.h5"):
        verify(path.with_name(name))


def test_an_output_that_is_hidden_itself(tmp_path):
    path = tmp_path / ".out.h5"
    write(path, OLD[0], publish=False)
    write(path, OLD[1], publish=True)
    assert [found.path.name for found in find_leftovers(path)] == [OLD[0]]
    assert main(["clean", str(path), "--older-than", "0"]) == 0
    verify(path)


@pytest.mark.parametrize("name", ["out.h5", "other.h5"])
def test_a_damaged_output_keeps_all(path, name, capsys):
    damaged = path.with_name(name)
    damaged.write_bytes(path.read_bytes()[:700])
    before = there(path)
    assert main(["clean", str(path), "--older-than", "0"]) == 3
    assert f"{name}: can't be read" in capsys.readouterr().err
    assert there(path) == before


def test_a_manifest_that_is_damaged_keeps_all(path):
    with h5py.File(path, "r+") as file:
        file.attrs["manifest_sha256"] = "0" * 64
    with pytest.raises(ShardError, match="damaged"):
        find_leftovers(path)
    with h5py.File(path, "r+") as file:
        del file["manifest"]
    with pytest.raises(ShardError, match="no manifest"):
        find_leftovers(path)


def test_what_is_not_of_a_run_stays(path):
    """Folders with other names or other things in them, links, files; and inputs beside it are no outputs."""
    shards = path.with_name("out.h5.shards")
    main(["make", "random", str(path.with_name("in.h5")), "--tokens", "4", "--heads", "1", "--dim", "4"])
    (shards / "mine").mkdir()
    (shards / OLD[0] / "notes.txt").write_text("mine")
    (shards / OLD[1] / "00003.h5").symlink_to(shards / OLD[0] / "00000.h5")
    (shards / ("1" * 12)).symlink_to(shards / OLD[2])
    (shards / ("2" * 12)).write_text("a file")
    before = there(path)
    assert [found.path.name for found in find_leftovers(path)] == [OLD[2], f".out.h5.{OLD[0]}.tmp"]
    assert main(["clean", str(path), "--older-than", "1"]) == 0
    assert there(path) == [name for name in before if not name.startswith(".")]


def test_of_a_run_that_was_gone_on_with_the_rest_goes(tmp_path):
    """A job that streams was killed when it had written a shard that no checkpoint names; the next one shows others."""
    path = tmp_path / "out.h5"
    first = write(path, OLD[0], publish=False)
    rest = first.write(1, 4, ROWS, ROWS[..., 0])
    (first.folder / f".00002.h5.{OLD[0]}.tmp").write_bytes(b"half")
    second = Output(path, OLD[1], force=False)
    second.prepare()
    like = {"out": ((8, *ROWS.shape[1:]), ROWS.dtype), "lse": ((8, 1), ROWS.dtype)}
    shards = [read_shard(first.folder / "00000.h5", path), second.write(1, 4, ROWS, ROWS[..., 0])]
    second.publish(shards, like, {})
    assert [found.path.name for found in find_leftovers(path)] == [f".00002.h5.{OLD[0]}.tmp", "00001.h5"]
    assert main(["clean", str(path)]) == 0
    assert (path.parent / rest.file).exists()              # it may be at work
    age(tmp_path)
    assert main(["clean", str(path)]) == 0
    assert [len(list(output.folder.iterdir())) for output in (first, second)] == [1, 1]
    verify(path)


def read_shard(file, path):
    return Shard(file.relative_to(path.parent).as_posix(), 0, 4, file.stat().st_size, digest(file))


def test_shards_that_a_checkpoint_names_are_in_use(tmp_path):
    """What a job has written is a day old; the one that goes on with it says at each checkpoint that it needs it."""
    path = tmp_path / "out.h5"
    first = write(path, OLD[0], publish=False)
    age(tmp_path)
    second = Output(path, OLD[1], force=False)
    second.prepare()
    second.keep([read_shard(first.folder / "00000.h5", path)])
    assert main(["clean", str(path)]) == 0
    assert (first.folder / "00000.h5").exists()


def test_a_folder_of_shards_that_is_a_link_is_refused(path, capsys):
    shards = path.with_name("out.h5.shards")
    shards.rename(path.with_name("elsewhere"))
    shards.symlink_to("elsewhere")
    assert main(["clean", str(path), "--older-than", "0"]) == 6
    assert "refused: a symbolic link" in capsys.readouterr().err
    assert len(list(path.with_name("elsewhere").iterdir())) == 4


def test_a_run_that_has_not_yet_written_loses_nothing(tmp_path):
    """A long run makes its folder at its start; a day later the empty folder looks like one that was left."""
    path = tmp_path / "out.h5"
    output = Output(path, OLD[0], force=False)
    output.prepare()
    age(tmp_path)
    assert main(["clean", str(path)]) == 0
    assert list(tmp_path.iterdir()) == []
    shard = output.write(0, 0, ROWS, ROWS[..., 0])
    output.publish([shard], {"out": (ROWS.shape, ROWS.dtype), "lse": (ROWS.shape[:2], ROWS.dtype)}, {})
    verify(path)


def test_a_link_to_an_output_shows_that_one(path, tmp_path):
    """Its shards lie where it lies, not beside the link."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "out.h5").symlink_to(path)
    write(tmp_path / "b" / "x.h5", OLD[0], publish=False)
    shutil.move(tmp_path / "b" / "x.h5.shards", tmp_path / "b" / "out.h5.shards")
    assert [found.path.name for found in find_leftovers(tmp_path / "b" / "out.h5")] == [OLD[0]]
    assert read_manifest(tmp_path / "b" / "out.h5").path == path
