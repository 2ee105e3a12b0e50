"""Sharded output: published whole, verified byte by byte."""

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
    shards, record = verify(path)
    assert [(s.start, s.stop) for s in shards] == [(0, 4), (4, 4), (4, 10)]
    assert record == {"options": {"a": 1}}


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
    shards, _ = read_manifest(path)
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
    shards, _ = read_manifest(path)
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


def test_interrupted_runs_leave_no_output(path):
    make(path, publish=False)
    assert not path.exists()
    assert len(list(path.with_name("out.h5.shards").iterdir())) == 3
    make(path, "second")                          # and what they leave is cleared out
    assert {s.file.split("/")[1][:6] for s in verify(path)[0]} == {"second"}
    assert len(list(path.with_name("out.h5.shards").iterdir())) == 3


def test_replacing_keeps_the_old_result_until_the_new_one_is_whole(path):
    make(path, seed=1)
    with pytest.raises(OutputError, match="exists"):
        Output(path, "second", force=False).prepare()
    make(path, "second", force=True, publish=False)
    assert {s.file.split("/")[1][:5] for s in verify(path)[0]} == {"first"}
    Output(path, "second", force=True).discard()
    verify(path)
    out, _ = make(path, "third", force=True, seed=3)
    verify(path)
    assert len(list(path.with_name("out.h5.shards").iterdir())) == 3
    with open_file(path) as file:
        assert read_rows(file["out"], 0, 10).tobytes() == out.tobytes()


def test_discard_takes_the_folder_away(path):
    make(path, publish=False)
    Output(path, "first", False).discard()
    assert not list(path.parent.iterdir())


def test_a_damaged_manifest(path):
    make(path)
    with h5py.File(path, "a") as file:
        text = file["manifest"][()].decode()
        del file["manifest"]
        file["manifest"] = text.replace('"start": 0', '"start": 1')
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
