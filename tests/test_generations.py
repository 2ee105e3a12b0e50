"""Generations of checkpoints in a folder: which count, which go, and what is read of them."""

import hashlib
import json
import os

import numpy as np
import pytest

from ringmpi import OutputError, ShardError
from ringmpi.files import generations, states
from ringmpi.files.generations import NewGeneration, clear, newest, remove
from ringmpi.files.states import MANIFEST, read_manifest

ONE, OTHER = "0" * 15 + "1", "0" * 15 + "2"
RUN = "0123456789ab"
X = np.arange(5)


def make(folder, problem=ONE, run=RUN, complete=True, x=X):
    made = NewGeneration.prepare(folder, problem, run)
    shard = made.write(0, [x])
    if complete:
        made.publish({"problem": {"name": problem}, "placement": {}, "shards": [shard]})
    return made.path


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def seal(path, content):
    """Write a manifest, with the right digest."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (path / MANIFEST).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def test_the_newest_of_a_problem(tmp_path):
    """Each problem has its own; half-written ones, and folders of other names, do not count."""
    folder = tmp_path / "c"
    assert newest(folder) is None
    first, other = make(folder), make(folder, OTHER)
    half = make(folder, run="f" * 12, complete=False)
    for name in ("99999999-0123456789ab", f"{ONE}-1-{RUN}", f"{ONE}-{'9' * 16}-{RUN}", "x"):
        (folder / name).mkdir()
        (folder / name / MANIFEST).touch()
    (folder / f"{ONE}-00000009-{RUN}").symlink_to(first)
    (folder / f"{ONE}-00000008-{RUN}").touch()
    assert newest(folder, ONE) == first
    assert newest(folder, OTHER) == other
    assert half.name.startswith(f"{ONE}-00000002-")
    assert newest(folder) in (first, other)


def test_earlier_ones_of_the_same_problem_go(tmp_path):
    folder = tmp_path / "c"
    kept = {make(folder, OTHER).name, make(folder, OTHER, complete=False).name}
    make(folder)
    make(folder, complete=False)
    last = make(folder)
    assert set(names(folder)) == {last.name} | kept
    clear(folder, ONE)
    assert set(names(folder)) == kept
    clear(folder, OTHER)
    assert not folder.exists()


def test_what_is_left_half_written_goes_when_the_result_is_there(tmp_path):
    folder = tmp_path / "c"
    left = make(folder, complete=False)
    (left / ".00001.state.0123456789ab.tmp").touch()
    clear(folder, ONE)
    assert not folder.exists()
    left = make(folder, complete=False)
    (left / "mine").touch()                     # something that is not ours stays
    clear(folder, ONE)
    assert names(left) == ["mine"]


def test_numbers_go_on(tmp_path):
    folder = tmp_path / "c"
    (folder / f"{ONE}-99999999-{RUN}").mkdir(parents=True)
    made = make(folder)
    assert made.name == f"{ONE}-100000000-{RUN}"
    assert names(folder) == [made.name]
    assert newest(folder, ONE) == made
    (folder / f"{ONE}-{'9' * 15}-{RUN}").mkdir()
    with pytest.raises(OutputError, match="has the highest number that there is; remove it"):
        NewGeneration.prepare(folder, ONE, RUN)
    assert newest(folder, ONE) == made


def test_a_folder_that_another_job_removes(tmp_path, monkeypatch):
    """It has become empty for that job just when this one makes its first generation."""
    folder, original, calls = tmp_path / "c", os.mkdir, []

    def mkdir(path, *rest):
        calls.append(path)
        if len(calls) == 3:                     # of the generation
            os.rmdir(folder)
        return original(path, *rest)

    monkeypatch.setattr(os, "mkdir", mkdir)
    made = NewGeneration.prepare(folder, ONE, RUN)
    assert made.path.is_dir()
    assert len(calls) == 5


def test_an_error_after_the_manifest_takes_nothing_away(tmp_path, monkeypatch):
    """It is complete then: earlier ones that can't be found stay, and so does what it names."""
    folder = tmp_path / "c"
    first, made = make(folder), NewGeneration.prepare(folder, ONE, RUN)
    shard = made.write(0, [np.arange(3)])

    def fail(*_):
        raise ShardError("the folder can't be read")

    with monkeypatch.context() as patched:
        patched.setattr(generations, "generations_of", fail)
        made.publish({"problem": {}, "placement": {}, "shards": [shard]})
        clear(folder, ONE)
    made.discard(0)
    read_manifest(made.path).verify(0)
    assert newest(folder, ONE) == made.path
    remove(first)


def test_nothing_is_left_of_one_that_is_discarded(tmp_path):
    made = NewGeneration.prepare(tmp_path, ONE, RUN)
    shard = made.write(0, [np.arange(3)])
    (made.path / "00000.state").unlink()
    with pytest.raises(OutputError, match="is gone"):
        made.publish({"problem": {}, "placement": {}, "shards": [shard]})
    made.discard(0)
    assert not names(tmp_path)


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(generations, "MANIFEST_BYTES", 200)
    with pytest.raises(OutputError, match="the manifest would have"):
        make(tmp_path)
    assert newest(tmp_path) is None


def test_what_was_written_is_read(tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    generation = read_manifest(make(tmp_path, x=x))
    got = np.zeros_like(x)
    generation.read(0, [got])
    assert (got == x).all()
    assert (generation.view(0, x.nbytes).view(float).reshape(x.shape) == x).all()
    for wrong in (0, 5, 13):
        with pytest.raises(ShardError, match="expected"):
            generation.read(0, [np.zeros(wrong)])
    with pytest.raises(ShardError, match="none of rank 1"):
        generation.verify(1)


@pytest.mark.parametrize("name", [MANIFEST, "00000.state"])
def test_links_and_pipes_are_refused(tmp_path, name):
    path = make(tmp_path / "c")
    (path / name).rename(tmp_path / "elsewhere")
    for put in (lambda: (path / name).symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(path / name),
                lambda: (path / name).symlink_to("/dev/zero"), (path / name).mkdir):
        put()
        with pytest.raises(ShardError, match=r"can't be read|expected a regular file"):
            read_manifest(path).verify(0)
        (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()


SIZES = [-1, 1.0, 1e400, float("nan"), 2**62, 10**30, True, "40", None, [40], {}]


@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes_in_a_manifest(tmp_path, size):
    path = make(tmp_path)
    content = {"format": 1, "problem": {}, "placement": {}}
    seal(path, {**content, "shards": [{"size": size, "sha256": "0" * 64}]})
    with pytest.raises(ShardError, match="of another version"):
        read_manifest(path)


def test_a_size_is_no_reason_to_take_memory(tmp_path):
    path = make(tmp_path)
    seal(path, {"format": 1, "problem": {}, "placement": {}, "shards": [{"size": 2**61, "sha256": "0" * 64}]})
    with pytest.raises(ShardError, match=r"expected 2,305,843,009,213,693,952 bytes, got 40"):
        read_manifest(path).verify(0)


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b"3", b"[" * 100000, b'{"format": 1}', b"\xff\xfe", b'{"format": NaN, "shards": []}',
    b'{"format": 1, "shards": {}, "problem": {}, "placement": {}}', b'{"format": 1' + b"0" * 5000 + b', "shards": []}',
    b'{"format": 1, "shards": [[]], "problem": {}, "placement": {}}',
    b'{"format": 1, "shards": [{"size": 3, "sha256": 3}], "problem": {}, "placement": {}}',
    b'{"format": 1, "shards": [], "problem": [], "placement": {}}',
    b'{"format": 1, "shards": [], "problem": {}, "placement": "x"}'])
def test_manifests_that_make_no_sense(tmp_path, text):
    path = make(tmp_path)
    seal(path, text)
    with pytest.raises(ShardError, match="of another version"):
        read_manifest(path)


def test_a_manifest_that_is_too_long(tmp_path, monkeypatch):
    path = make(tmp_path)
    monkeypatch.setattr(states, "MANIFEST_BYTES", 100)
    with pytest.raises(ShardError, match="expected at most 100 bytes"):
        read_manifest(path)
