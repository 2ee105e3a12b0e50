"""Sharded output: published whole, verified byte by byte."""

import hashlib
import json
import os

import h5py
import numpy as np
import pytest

from ringmpi import OutputError, ShardError
from ringmpi.hdf5 import open_dataset, open_file, read_rows
from ringmpi.shards import Output, merge, read_manifest, verify
from ringmpi.softmax import DTYPES

COUNTS = (4, 0, 6)


def make(path, run="first", dtype="bfloat16", force=False, seed=0, publish=True):
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((10, 2, 3)).astype(DTYPES[dtype])
    lse = rng.standard_normal((10, 2)).astype("f4")
    output = Output(path, run, force)
    output.prepare()
    starts = np.cumsum([0, *COUNTS])
    shards = [output.write(r, int(s), out[s:s + n], lse[s:s + n]) for r, (s, n) in
              enumerate(zip(starts, COUNTS, strict=False))]
    if publish:
        output.publish(shards, {"out": (out.shape, out.dtype), "lse": (lse.shape, lse.dtype)}, {"options": {"a": 1}})
        output.clear_replaced()
    return out, lse


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.h5"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_reader_sees_one_file(path, dtype):
    out, lse = make(path, dtype=dtype)
    with h5py.File(path) as file:
        assert file["out"].shape == (10, 2, 3)
        np.testing.assert_array_equal(file["out"][...].astype("f8"), out.astype("f8"))
        np.testing.assert_array_equal(file["lse"][...], lse)
    with open_file(path) as file:
        assert read_rows(open_dataset(file, "out"), 0, 10).tobytes() == out.tobytes()


def test_it_can_be_moved_with_its_folder(path, tmp_path):
    out, _ = make(path, dtype="float32")
    (tmp_path / "new").mkdir()
    for name in ("out.h5", "out.h5.shards"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    with h5py.File(tmp_path / "new" / "out.h5") as file:
        np.testing.assert_array_equal(file["out"][...], out)
    verify(tmp_path / "new" / "out.h5")


def test_manifest(path):
    make(path)
    manifest = verify(path)
    assert [(s.start, s.stop) for s in manifest.shards] == [(0, 4), (4, 4), (4, 10)]
    assert manifest.record == {"options": {"a": 1}}
    assert manifest.shapes == {"out": (10, 2, 3), "lse": (10, 2)}
    assert manifest.dtypes == {"out": "bfloat16", "lse": "float32"}


def test_rows_across_shards(path):
    out, lse = make(path)
    manifest = verify(path)
    for start in range(11):
        for stop in range(start, 11):
            assert manifest.rows("out", start, stop).tobytes() == out[start:stop].tobytes()
            assert manifest.rows("lse", start, stop).tobytes() == lse[start:stop].tobytes()


def test_merge(path, tmp_path):
    out, lse = make(path)
    single = tmp_path / "single.h5"
    merge(path, single)
    with open_file(single) as file:
        assert not file["out"].is_virtual
        assert read_rows(file["out"], 0, 10).tobytes() == out.tobytes()
        np.testing.assert_array_equal(file["lse"][...], lse)
        assert file.attrs["complete"]
        assert file.attrs["options"] == '{"a": 1}'
    with pytest.raises(OutputError, match="exists"):
        merge(path, single)
    with pytest.raises(OutputError, match="another file"):
        merge(path, path, force=True)


def test_every_single_byte_counts(path):
    """Flip one byte anywhere in a shard: verify and merge refuse it."""
    make(path)
    shards = read_manifest(path).shards
    file = path.parent / shards[2].file
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ShardError, match=r"00002\.h5 \(rows 4\.\.10\) is damaged"):
            verify(path)
    with pytest.raises(ShardError, match="damaged"):
        merge(path, path.with_name("single.h5"))
    assert not path.with_name("single.h5").exists()


def test_a_missing_shard(path):
    make(path, dtype="float32")
    shards = read_manifest(path).shards
    (path.parent / shards[0].file).unlink()
    with pytest.raises(ShardError, match=r"\(rows 0\.\.4\) is missing"):
        verify(path)
    with pytest.raises(ShardError, match="missing"):
        merge(path, path.with_name("single.h5"))
    with h5py.File(path) as file:                 # a bare reader gets NaN, not zeros
        assert np.isnan(file["out"][:4]).all()
        assert np.isfinite(file["out"][4:]).all()
    with open_file(path) as file, pytest.raises(ShardError, match="no such file"):
        open_dataset(file, "out")


def folders(path):
    return sorted(p.name for p in path.with_name("out.h5.shards").iterdir())


def test_interrupted_runs_leave_no_output(path):
    make(path, publish=False)
    assert not path.exists()
    make(path, "second")
    verify(path)
    assert folders(path) == ["first", "second"]            # nobody can know that the first is not alive


def test_replacing_keeps_the_old_result_until_the_new_one_is_known(path):
    make(path, seed=1)
    with pytest.raises(OutputError, match="exists"):
        Output(path, "second", force=False).prepare()
    make(path, "second", force=True, publish=False)
    assert verify(path).shards[0].file.split("/")[1] == "first"
    for rank in range(3):
        Output(path, "second", force=True).discard(rank)
    verify(path)
    assert folders(path) == ["first"]
    out, _ = make(path, "third", force=True, seed=3)
    assert read_manifest(path).rows("out", 0, 10).tobytes() == out.tobytes()
    assert folders(path) == ["third"]


def test_two_runs_for_one_output_do_not_mix(path):
    """Both prepare before either publishes: the first to publish wins, the other says so and harms nothing."""
    out = np.ones((2, 1, 1), "f4")
    runs = [Output(path, name, False) for name in ("a", "b")]
    for run in runs:
        run.prepare()
    shards = [run.write(0, 0, out, out[..., 0]) for run in runs]
    shapes = {"out": (out.shape, out.dtype), "lse": ((2, 1), out.dtype)}
    runs[0].publish([shards[0]], shapes, {})
    with pytest.raises(OutputError, match="exists"):
        runs[1].publish([shards[1]], shapes, {})
    runs[1].discard(0)
    verify(path)
    assert folders(path) == ["a"]


def test_a_renamed_result_keeps_its_shards(path):
    make(path, seed=1)
    path.rename(path.with_name("old.h5"))
    make(path, "second", seed=2)
    verify(path.with_name("old.h5"))
    make(path.with_name("old.h5"), "third", force=True)
    assert folders(path) == ["first", "second"]
    verify(path)


def test_a_shard_that_vanished_is_not_published(path):
    output = Output(path, "run", False)
    output.prepare()
    shard = output.write(0, 0, np.ones((2, 1, 1), "f4"), np.ones((2, 1), "f4"))
    (path.parent / shard.file).unlink()
    with pytest.raises(OutputError, match="is gone"):
        output.publish([shard], {}, {})
    assert not path.exists()


def test_discard_takes_the_folder_away(path):
    make(path, publish=False)
    for rank in range(3):
        Output(path, "first", False).discard(rank)
    assert not list(path.parent.iterdir())


def forge(path, change):
    """Write a manifest with a right digest and wrong content."""
    with h5py.File(path, "a") as file:
        content = json.loads(file["manifest"][()])
        text = change(content)
        del file["manifest"]
        file["manifest"] = np.bytes_(text)
        file.attrs["manifest_sha256"] = hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("name", ["../precious.txt", "/etc/hostname", "out.h5.shards/../../x", "a/b/c/d", "x",
                                  "out.h5.shards/./x.h5", "elsewhere/run/x.h5"])
def test_forged_paths_are_refused_and_nothing_is_deleted(path, name):
    precious = path.parent.parent / "precious.txt"
    precious.write_text("precious")

    def change(content):
        content["shards"][0]["file"] = name
        return json.dumps(content).encode()

    make(path)
    forge(path, change)
    with pytest.raises(ShardError, match="outside the folder of shards"):
        verify(path)
    make(path, "second", force=True)
    assert precious.read_text() == "precious"
    assert folders(path) == ["first", "second"]


@pytest.mark.parametrize("change", [
    lambda c: b"{", lambda c: b"[]", lambda c: b"{}",
    lambda c: json.dumps({**c, "shards": [{"file": "a.shards/b/c"}]}).encode(),
    lambda c: json.dumps({**c, "shards": c["shards"][1:]}).encode(),
    lambda c: json.dumps({**c, "dtypes": {"out": "O", "lse": "float32"}}).encode(),
    lambda c: json.dumps({**c, "shapes": {"out": [11, 2, 3], "lse": [11, 2]}}).encode(),
])
def test_manifests_that_make_no_sense(path, change):
    make(path)
    forge(path, change)
    with pytest.raises(ShardError, match="makes no sense"):
        verify(path)
    with pytest.raises(ShardError, match="makes no sense"):
        merge(path, path.with_name("single.h5"))


def test_a_shard_that_is_a_link(path):
    make(path)
    file = path.parent / read_manifest(path).shards[0].file
    file.rename(path.parent / "elsewhere.h5")
    file.symlink_to(path.parent / "elsewhere.h5")
    with pytest.raises(ShardError, match="is a link to"):
        verify(path)


def test_a_linked_output_is_read_where_it_is(path, tmp_path):
    """A folder of shards beside the link must not be taken for those beside the file."""
    out, _ = make(path, dtype="float32")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "out.h5").symlink_to(path)
    make(tmp_path / "b" / "other.h5", seed=9)
    (tmp_path / "b" / "other.h5.shards").rename(tmp_path / "b" / "out.h5.shards")
    merge(tmp_path / "b" / "out.h5", tmp_path / "single.h5")
    with open_file(tmp_path / "single.h5") as file:
        assert read_rows(file["out"], 0, 10).tobytes() == out.tobytes()


def test_incomplete_is_noticed_and_everything_is_flushed(path, monkeypatch):
    calls, fsync = [], os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    make(path)
    flushed = [name.removeprefix(f"{path.parent}") for name in calls]
    assert [sum(".0000" in name for name in flushed), sum("/.out.h5." in name for name in flushed)] == [3, 1]
    assert {"", "/out.h5.shards", "/out.h5.shards/first"} < set(flushed)
    assert flushed[-1] == ""              # the folder, once OUT.h5 has its name
    with h5py.File(path, "a") as file:
        file.attrs["complete"] = False
    with pytest.raises(ShardError, match="damaged"):
        read_manifest(path)


def test_a_damaged_manifest(path):
    make(path)
    with h5py.File(path, "a") as file:
        text = bytes(file["manifest"][()])
        del file["manifest"]
        file["manifest"] = np.bytes_(text.replace(b'"start": 0', b'"start": 1'))
    with pytest.raises(ShardError, match="manifest is damaged"):
        verify(path)
    with h5py.File(path, "a") as file:
        del file["manifest"]
    with pytest.raises(ShardError, match="has no manifest"):
        verify(path)


def test_an_output_folder_that_cannot_be_written(path, tmp_path):
    (tmp_path / "out.h5.shards").write_text("a file in the way")
    with pytest.raises(OutputError, match="can't be written"):
        Output(path, "x", False).prepare()
    with pytest.raises(OutputError, match="no such folder"):
        Output(tmp_path / "no" / "out.h5", "x", False).prepare()
