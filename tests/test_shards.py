"""Sharded output: published whole, verified byte by byte."""

import hashlib
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from ringmpi import OutputError, ShardError
from ringmpi.cli import main
from ringmpi.dtypes import DTYPES
from ringmpi.files.hdf5 import open_dataset, read_rows
from ringmpi.files.opening import open_file
from ringmpi.files.shards import Output, merge_shards, read_manifest, verify

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
    return (out, lse) if publish else output


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
    merge_shards(path, single)
    with open_file(single) as file:
        assert not file["out"].is_virtual
        assert read_rows(file["out"], 0, 10).tobytes() == out.tobytes()
        np.testing.assert_array_equal(file["lse"][...], lse)
        assert file.attrs["complete"]
        assert file.attrs["options"] == '{"a": 1}'
    with pytest.raises(OutputError, match="exists"):
        merge_shards(path, single)
    with pytest.raises(OutputError, match="another file"):
        merge_shards(path, path, force=True)


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
        merge_shards(path, path.with_name("single.h5"))
    assert not path.with_name("single.h5").exists()


def test_a_missing_shard(path):
    make(path, dtype="float32")
    shards = read_manifest(path).shards
    (path.parent / shards[0].file).unlink()
    with pytest.raises(ShardError, match=r"\(rows 0\.\.4\) is missing"):
        verify(path)
    with pytest.raises(ShardError, match="missing"):
        merge_shards(path, path.with_name("single.h5"))
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
    second = make(path, "second", force=True, publish=False)
    assert verify(path).shards[0].file.split("/")[1] == "first"
    second.discard()
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
    runs[1].discard()
    verify(path)
    assert folders(path) == ["a"]


def test_a_folder_that_another_run_takes_away(path, monkeypatch):
    real, left = Path.mkdir, [2]

    def mkdir(folder, *rest, **more):
        if folder.name == "x" and left[0]:
            left[0] -= 1
            folder.parent.rmdir()
        real(folder, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    Output(path, "x", False).prepare()
    assert folders(path) == ["x"]


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
    make(path, publish=False).discard()
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
    *(lambda c, axes=axes: json.dumps({**c, "axes": axes}).encode()
      for axes in (7, None, [], ["tokens"], [1, 2, 3], ["tokens", "heads", "heads"],
                   ["batch", "tokens", "heads", "dim"])),
])
def test_manifests_that_make_no_sense(path, change):
    make(path)
    forge(path, change)
    with pytest.raises(ShardError, match="makes no sense"):
        verify(path)
    with pytest.raises(ShardError, match="makes no sense"):
        merge_shards(path, path.with_name("single.h5"))


def external(folder):
    (folder / "text").write_bytes(b"{}" * 50)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_external(str(folder / "text").encode(), 0, 100)
    return properties


def strange_manifests(folder):
    """What can be under the name `manifest` besides a manifest: by name, what puts it there."""
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(100)
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)

    def huge(file):
        kind.set_size(2**31 - 1)
        h5py.h5d.create(file.id, b"manifest", kind, scalar)

    def virtual(file):
        layout = h5py.VirtualLayout((4,), "u1")
        layout[:] = h5py.VirtualSource("x.h5", "x", (4,), "u1")
        file.create_virtual_dataset("manifest", layout)

    def pipe(file):
        os.mkfifo(folder / "pipe")
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_external(str(folder / "pipe").encode(), 0, 100)
        h5py.h5d.create(file.id, b"manifest", kind, scalar, properties)

    return {
        "external link": lambda file: file.__setitem__("manifest", h5py.ExternalLink("other.h5", "x")),
        "soft link": lambda file: file.__setitem__("manifest", h5py.SoftLink("/out")),
        "external storage": lambda file: h5py.h5d.create(file.id, b"manifest", kind, scalar,
                                                         external(folder)),
        "a pipe": pipe,
        "huge": huge,
        "virtual": virtual,
        "unwritten": lambda file: h5py.h5d.create(file.id, b"manifest", kind, scalar),
        "a group": lambda file: file.create_group("manifest"),
        "text": lambda file: file.create_dataset("manifest", data="{}"),
        "numbers": lambda file: file.create_dataset("manifest", (2**33,), "u1"),
    }


@pytest.mark.parametrize("name", list(strange_manifests(None)))
def test_what_is_no_plain_manifest(path, name):
    make(path)
    with h5py.File(path, "a") as file:
        del file["manifest"]
        strange_manifests(path.parent)[name](file)
    with pytest.raises(ShardError, match="manifest"):
        verify(path)
    out, _ = make(path, "second", force=True, seed=2)           # it is in nobody's way
    assert verify(path).rows("out", 0, 10).tobytes() == out.tobytes()


def test_a_manifest_has_a_limit(path, monkeypatch):
    make(path)
    monkeypatch.setattr("ringmpi.files.manifest.MANIFEST_BYTES", 100)
    with pytest.raises(ShardError, match="its manifest: expected at most 100 bytes, got"):
        verify(path)


@pytest.mark.parametrize("value", [np.arange(3), h5py.Empty("f4"), 5, "x" * 1000, np.void(b"1234"), [b"a", b"b"], 1j])
@pytest.mark.parametrize("name", ["manifest_sha256", "complete"])
def test_odd_attributes(path, name, value):
    make(path)
    with h5py.File(path, "a") as file:
        file.attrs[name] = value
    with pytest.raises(ShardError, match="manifest"):
        verify(path)


def test_a_digest_that_is_text_of_any_length(path):
    """As the first version wrote it."""
    make(path)
    with h5py.File(path, "a") as file:
        file.attrs["manifest_sha256"] = file.attrs["manifest_sha256"].decode()
    verify(path)


@pytest.mark.parametrize("options", [{"window": 5}, {"window": [1, 2, 3]}, {"window": ["a", 1]}, {"causal": "yes"},
                                     {"scale": "x"}, {"q": 5}, {"first": None}, {"documents": [1]}, {"softcap": {}}])
def test_options_that_no_run_has(path, options, capsys):
    make(path)
    forge(path, lambda content: json.dumps({**content, "record": {"options": options}}).encode())
    assert main(["check", str(path.with_name("in.h5")), str(path)]) == 3
    assert "expected options that a run can have" in capsys.readouterr().err


def swapped(file):
    file.move("out", "x")
    file.move("lse", "out")
    file.move("x", "lse")


def zeros(file):
    shape = file["out"].shape
    del file["out"]
    file["out"] = np.zeros(shape, "f4")


def view(shards, fill=np.nan, name=b"out", dtype="f4"):
    """Put another view in the place of `out`: of shards (start, rows, file)."""
    def change(file):
        shape = file["out"].shape
        del file["out"]
        properties, space = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5s.create_simple(shape)
        for start, rows, source in shards:
            space.select_hyperslab((start, 0, 0), (rows, *shape[1:]))
            properties.set_virtual(space, source.encode(), name, h5py.h5s.create_simple((rows, *shape[1:])))
        properties.set_fill_value(np.array(fill, np.float32))
        space.select_all()
        h5py.h5d.create(file.id, b"out", h5py.h5t.py_create(np.dtype(dtype)), space, properties)
    return change


FIRST, LAST = "out.h5.shards/first/00000.h5", "out.h5.shards/first/00002.h5"


@pytest.mark.parametrize("change", [
    swapped, zeros, lambda file: file.__delitem__("lse"), view([(0, 4, FIRST)]),
    view([(0, 4, LAST), (4, 6, LAST)]), view([(4, 4, FIRST), (0, 4, LAST)]),
    view([(0, 4, FIRST), (4, 6, LAST)], fill=0),
    view([(0, 4, FIRST), (4, 6, LAST)], name=b"lse"), view([(0, 4, FIRST), (4, 6, LAST)], dtype="f8"),
    view([(0, 4, FIRST), (4, 6, f"./{LAST}")]), view([(4, 6, LAST), (0, 4, FIRST)]),
])
def test_out_that_is_another(path, change):
    """A plain reader would see other numbers than `check` has checked."""
    make(path, dtype="float32")
    verify(path)
    with h5py.File(path, "a") as file:
        change(file)
    for command in (verify, lambda path: merge_shards(path, path.with_name("single.h5"))):
        with pytest.raises(ShardError, match=r"is no view|does not show|would show|expected|no such dataset"):
            command(path)
    assert not path.with_name("single.h5").exists()


def test_rows_that_are_shown_otherwise(path, monkeypatch):
    make(path, dtype="float32")
    manifest = verify(path)
    assert len(manifest.rows("out", 3, 6)) == 3
    with h5py.File(path, "a") as file:
        view([(0, 4, FIRST), (4, 6, FIRST)])(file)
    with pytest.raises(ShardError, match=r"rows 4\.\.6 of out are not those of"):
        manifest.rows("out", 3, 6)
    monkeypatch.setenv("HDF5_VDS_PREFIX", "/elsewhere")
    with pytest.raises(ShardError, match="HDF5_VDS_PREFIX"):
        verify(path)


def test_a_shard_that_is_a_pipe_or_a_folder(path):
    make(path)
    file = path.parent / LAST
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ShardError, match="is a pipe"):
        verify(path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ShardError, match="is a folder"):
        verify(path)


def test_an_old_output_is_read_before_the_work(path, monkeypatch):
    """An odd one that takes its reader down does so before there is anything to lose, or not at all."""
    make(path, seed=1)

    def odd(*_):
        raise MemoryError

    output = Output(path, "second", True)
    monkeypatch.setattr("ringmpi.files.shards.read_manifest", odd)
    output.prepare()
    monkeypatch.undo()
    monkeypatch.setattr("ringmpi.files.shards.check_view", odd)
    out = np.ones((2, 1, 1), "f4")
    shard = output.write(0, 0, out, out[..., 0])
    with pytest.raises(MemoryError):                  # of the new one, before it has its name
        output.publish([shard], {"out": (out.shape, out.dtype), "lse": ((2, 1), out.dtype)}, {})
    monkeypatch.undo()
    assert read_manifest(path).shards[0].file == FIRST
    output.publish([shard], {"out": (out.shape, out.dtype), "lse": ((2, 1), out.dtype)}, {})
    assert read_manifest(path).shards[0].file.split("/")[1] == "second"


@pytest.mark.parametrize("change", [
    lambda c: {**c, "shapes": {"out": [10, 2, 2**70], "lse": [10, 2]}}, lambda c: {**c, "record": {"a/b": 1}},
    lambda c: {**c, "shapes": {"out": [10, 2], "lse": [10, 2]}}, lambda c: {**c, "record": {"options": 1}},
    lambda c: {**c, "shards": [{**s, "size": -1} for s in c["shards"]]}, lambda c: {**c, "dtypes": {"out": "float32"}},
    lambda c: {**c, "shards": [{**s, "start": float(s["start"])} for s in c["shards"]]},
    lambda c: {**c, "shards": [{**s, "sha256": 1} for s in c["shards"]]},
    lambda c: {**c, "shards": [{**s, "file": 5} for s in c["shards"]]},
    lambda c: {**c, "shards": [{**s, "file": "a.shards/\0/x"} for s in c["shards"]]},
])
def test_manifests_whose_values_make_no_sense(path, change):
    make(path)
    forge(path, lambda content: json.dumps(change(content)).encode())
    with pytest.raises(ShardError, match="makes no sense"):
        verify(path)


def test_json_that_is_deep(path):
    make(path)
    forge(path, lambda content: b"[" * 10**6)
    with pytest.raises(ShardError, match="makes no sense"):
        verify(path)


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
    merge_shards(tmp_path / "b" / "out.h5", tmp_path / "single.h5")
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
