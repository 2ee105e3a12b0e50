"""Files as other programs write them: compressed, split by heads; and results as xarray opens them."""

import sys
import warnings

import h5py
import launch
import numpy as np
import oracle
import pytest
from job_files import attend, make_random, read_arrays, write_arrays

from ringmpi import ShardError
from ringmpi.cli import main
from ringmpi.errors import OptionError
from ringmpi.files import boxes, filters
from ringmpi.files.hdf5 import open_dataset, read_rows
from ringmpi.files.opening import open_file

CLI = ["-m", "ringmpi"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_random(tmp_path_factory.mktemp("input") / "in.h5", 40, heads=4, kv_heads=2, dim=8)


def rewritten(source, path, **how):
    """The same numbers, stored in another way."""
    with h5py.File(path, "w") as file:
        for name, x in zip("qkv", read_arrays(source), strict=True):
            file.create_dataset(name, data=x, chunks=(16, *x.shape[1:]), **how)
    return path


def outs(path):
    with h5py.File(path) as file:
        return file["out"][...], file["lse"][...]


OWN = [{"compression": "gzip", "shuffle": True}, {"compression": "lzf", "fletcher32": True}, {"compression": "szip"}]


@pytest.mark.parametrize("how", OWN, ids=["gzip", "lzf", "szip"])
def test_filters_that_h5py_brings(source, tmp_path, how):
    attend(source, tmp_path / "want.h5")
    attend(rewritten(source, tmp_path / "in.h5", **how), tmp_path / "out.h5")
    for got, want in zip(outs(tmp_path / "out.h5"), outs(tmp_path / "want.h5"), strict=True):
        np.testing.assert_array_equal(got, want)


def test_szip_that_this_hdf5_has_not(source, tmp_path, monkeypatch):
    path = rewritten(source, tmp_path / "in.h5", compression="szip")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    with open_file(path) as file, pytest.raises(ShardError, match="szip is not in this build of HDF5"):
        open_dataset(file, "q")


WITH_PLUGIN = """
import sys, h5py, hdf5plugin
source, target, name = sys.argv[1:]
with h5py.File(source) as old, h5py.File(target, "w") as new:
    for key in "qkv":
        new.create_dataset(key, data=old[key][...], chunks=(16, *old[key].shape[1:]), **getattr(hdf5plugin, name)())
"""


@pytest.mark.parametrize(("name", "number"), [("Blosc", 32001), ("Blosc2", 32026), ("Zstd", 32015), ("LZ4", 32004),
                                              ("Bitshuffle", 32008), ("Zfp", 32013)])
def test_filters_of_hdf5plugin_are_read_on_request_alone(source, tmp_path, name, number):
    """In processes of their own: a plugin that one test has registered is there for all that follow."""
    pytest.importorskip("hdf5plugin")
    path, target = tmp_path / "in.h5", tmp_path / "out.h5"
    made = launch.launch(1, ["-c", WITH_PLUGIN, source, path, name], folder=tmp_path / "said")
    assert made.code == 0, made.text
    refused = launch.launch(2, [*CLI, "attend", path, target, "--backend", "numpy"], folder=tmp_path / "said")
    assert refused.code == 3
    assert f"dataset 'q': refused: unknown filter {number}" in refused.ranks[0], refused.text
    assert ("say --hdf5plugin" in refused.ranks[0]) == (name != "Zfp")
    given = launch.launch(2, [*CLI, "attend", path, target, "--backend", "numpy", "--hdf5plugin"],
                          folder=tmp_path / "said")
    assert given.code == (3 if name == "Zfp" else 0), given.text           # which loses bits
    if name != "Zfp":
        attend(source, tmp_path / "want.h5")
        np.testing.assert_allclose(outs(target)[0], outs(tmp_path / "want.h5")[0], rtol=1e-6, atol=1e-7)
        said = launch.launch(1, [*CLI, "check", path, target], folder=tmp_path / "said")
        assert said.code == 3, said.text                                    # what OUT.h5 records is no request
        said = launch.launch(1, [*CLI, "check", path, target, "--hdf5plugin"], folder=tmp_path / "said")
        assert said.code == 0, said.text


def test_without_hdf5plugin(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(OptionError, match="expected the package hdf5plugin"):
        filters.filters_of_plugins()
    assert main(["attend", str(source), str(tmp_path / "out.h5"), "--hdf5plugin", "--dry-run"]) == 2
    assert "pip install hdf5plugin" in capsys.readouterr().err


def split_by_heads(folder, x, name, axis, pieces, flat=False):
    """A virtual dataset whose sources have some heads each, as tensor-parallel programs write them."""
    with h5py.File(folder / "in.h5", "a") as file:
        layout = h5py.VirtualLayout(x.shape, x.dtype)
        for number, heads in enumerate(pieces):
            at = (slice(None),) * axis + (slice(heads.start, heads.stop),)
            part = x[at]
            kept = part.reshape([n for i, n in enumerate(part.shape) if i != axis]) if flat else part
            write_arrays(folder / f"{name}-{number}.h5", {"x": kept})
            layout[(*at[:-1], heads.start) if flat else at] = h5py.VirtualSource(f"{name}-{number}.h5", "x",
                                                                                  kept.shape, x.dtype)
        file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize(("axis", "flat"), [(1, False), (0, False), (1, True), (0, True)])
def test_virtual_datasets_split_by_heads(source, tmp_path, axis, flat):
    attend(source, tmp_path / "want.h5")
    q, k, v = read_arrays(source)
    for name, x in (("q", q), ("k", k), ("v", v)):
        heads = x.shape[1]
        pieces = [range(i, i + 1) for i in range(heads)] if flat else [range(heads - 1), range(heads - 1, heads)]
        split_by_heads(tmp_path, x if axis == 1 else x.swapaxes(0, 1), name, axis, pieces, flat)
    axes = [] if axis == 1 else ["--axes", "heads,tokens,dim"]
    result = launch.launch(3, [*CLI, "attend", tmp_path / "in.h5", tmp_path / "out.h5", "--backend", "numpy", *axes],
                           folder=tmp_path / "said")
    assert result.code == 0, result.text
    for got, want in zip(outs(tmp_path / "out.h5"), outs(tmp_path / "want.h5"), strict=True):
        assert oracle.error(got if axis == 1 else got.swapaxes(0, 1), want) < 1e-6
    (tmp_path / "k-1.h5").unlink()
    result = launch.launch(3, [*CLI, "attend", tmp_path / "in.h5", tmp_path / "no.h5", "--backend", "numpy", *axes],
                           folder=tmp_path / "said")
    assert result.code == 3
    assert "k-1.h5: no such file" in result.ranks[0], result.text


def test_virtual_boxes_that_do_not_tile(tmp_path):
    x = np.arange(48, dtype="f4").reshape(4, 4, 3)
    for pieces, flaw in (([range(3), range(2, 4)], "twice"), ([range(3)], "out"), ([range(4)], None)):
        (tmp_path / "in.h5").unlink(missing_ok=True)
        split_by_heads(tmp_path, x, "x", 1, pieces)
        with open_file(tmp_path / "in.h5") as file:
            if flaw is None:
                assert read_rows(open_dataset(file, "x"), 1, 3).tobytes() == x[1:3].tobytes()
                continue
            with pytest.raises(ShardError, match="leave numbers out or give them twice"):
                open_dataset(file, "x")


def test_a_virtual_box_of_another_order(tmp_path):
    """As many numbers, but other axes: HDF5 would fill the one from the other row by row."""
    write_arrays(tmp_path / "a.h5", {"x": np.zeros((3, 4), "f4")})
    layout = h5py.VirtualLayout((4, 3), "f4")
    layout[:] = h5py.VirtualSource("a.h5", "x", (3, 4), "f4")
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    with open_file(tmp_path / "in.h5") as file, pytest.raises(ShardError, match="does not hold the range of each axis"):
        open_dataset(file, "x")


def test_a_source_that_changes_after_it_was_checked(tmp_path):
    x = np.arange(48, dtype="f4").reshape(4, 4, 3)
    split_by_heads(tmp_path, x, "x", 1, [range(2), range(2, 4)])
    with open_file(tmp_path / "in.h5") as file:
        dataset = open_dataset(file, "x")
        write_arrays(tmp_path / "x-1.h5", {"x": np.zeros((4, 1, 3), "f4")})
        with pytest.raises(ShardError):
            boxes.read_box(dataset, (0, 0, 0), np.empty_like(x))


@pytest.mark.parametrize("tokens", [40, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xarray_shows_the_names_of_axes(tmp_path, tokens, dtype):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    source = make_random(tmp_path / "in.h5", tokens, heads=4, kv_heads=2, dim=8, dtype=dtype)
    result = launch.launch(3, [*CLI, "attend", source, tmp_path / "out.h5", "--backend", "numpy"],
                           folder=tmp_path / "said")
    assert result.code == 0, result.text
    assert main(["merge", str(tmp_path / "out.h5"), str(tmp_path / "one.h5")]) == 0
    shards = sorted(tmp_path.glob("out.h5.shards/*/*.h5"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for path in (tmp_path / "out.h5", tmp_path / "one.h5", *shards):
            with xarray.open_dataset(path, engine="h5netcdf") as found, h5py.File(path) as file:
                assert found["out"].dims == ("token", "head", "dim")
                assert found["lse"].dims == ("token", "head")
                assert dict(found.sizes) == {"token": len(file["out"]), "head": 4, "dim": 8}
                assert found["lse"].attrs["units"] == "1"
                assert "softmax" in found["out"].attrs["long_name"]
                np.testing.assert_array_equal(found["out"].values, file["out"][...])
                np.testing.assert_array_equal(found["lse"].isel(head=1).values, file["lse"][:, 1])
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0
