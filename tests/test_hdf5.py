"""HDF5 in and out: bits kept, damage noticed, nothing followed out of the folder."""

import os
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
from job_files import write_arrays

from ringmpi import DtypeError, OptionError, OutputError, ShardError
from ringmpi.dtypes import BFLOAT16, DTYPES
from ringmpi.files.hdf5 import (
    open_dataset,
    read_integers,
    read_rows,
    write_file,
)
from ringmpi.files.item_types import file_type, stored_dtype
from ringmpi.files.opening import open_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.h5"


def save(path, rows, name="x"):
    write_arrays(path, {name: rows})


def load(path, name="x"):
    with open_file(path) as file:
        dataset = open_dataset(file, name)
        return read_rows(dataset, 0, len(dataset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(path, dtype):
    kind = DTYPES[dtype]
    bits = np.random.default_rng(0).integers(0, 256, (1000, 3, kind.itemsize), np.uint8)      # NaN payloads, -0, inf
    rows = bits.view(kind).reshape(1000, 3)
    save(path, rows)
    assert load(path).dtype == kind
    assert load(path).tobytes() == rows.tobytes()
    with open_file(path) as file:
        assert read_rows(file["x"], 17, 401).tobytes() == rows[17:401].tobytes()


@pytest.mark.parametrize("shape", [(0, 2, 3), (5, 0, 3), (1, 1, 1)])
def test_empty_and_small(path, shape):
    save(path, np.ones(shape, "f4"))
    assert load(path).shape == shape


def test_bfloat16_is_the_type_of_hdf5_and_others_read_it(path):
    rows = np.array([1.5, -0.0, np.inf, np.nan, 3e38, 1e-40]).astype(BFLOAT16)
    save(path, rows)
    with h5py.File(path) as file:
        assert file["x"].dtype == np.float32
        np.testing.assert_array_equal(file["x"][...], rows.astype("f4"))
        assert stored_dtype(file["x"]) == BFLOAT16
    predefined = getattr(h5py.h5t, "FLOAT_BFLOAT16LE", None)
    if predefined is not None:
        assert file_type(BFLOAT16).equal(predefined)


def test_big_endian_is_read(path):
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(5, dtype=">f8")
    assert load(path).tolist() == [0, 1, 2, 3, 4]
    assert load(path).dtype == np.dtype("f8")


@pytest.mark.parametrize("dtype", ["i4", "u1", "S3", "c8"])
def test_other_dtypes_are_refused(path, dtype):
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(4, dtype)
    with pytest.raises(DtypeError, match="expected items of float64"):
        load(path)


def test_ranges_of_rows(path, monkeypatch):
    monkeypatch.setattr("ringmpi.files.rows.TRANSFER_BYTES", 1000)
    monkeypatch.setattr("ringmpi.files.hdf5.READ_BACK_BYTES", 300)
    rows = np.random.default_rng(0).standard_normal((97, 5))
    save(path, rows)
    assert (load(path) == rows).all()


def test_missing(path):
    with pytest.raises(ShardError, match="no such file"):
        load(path)
    save(path, np.ones(3))
    with pytest.raises(ShardError, match=r"'y': no such dataset; the file has x"):
        load(path, "y")
    with h5py.File(path, "a") as file:
        file.create_group("g/h")
    with pytest.raises(ShardError, match="got a group"):
        load(path, "g/h")
    with pytest.raises(ShardError, match="is no group"):
        load(path, "x/y")


def test_not_hdf5_and_truncated(path):
    path.write_bytes(b"no hdf5 at all")
    with pytest.raises(ShardError, match="can't be read"):
        load(path)
    save(path, np.ones((5000, 10)))
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match="can't be read"):
            load(path)


def test_one_flipped_byte_is_noticed(path):
    save(path, np.ones((5000, 10)))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    with pytest.raises(ShardError, match="damaged or unreadable"):
        load(path)


def test_what_was_never_written_is_no_zero(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (100, 4), "f4")
        file.create_dataset("chunked", (100, 4), "f4", chunks=(10, 4))[:35] = 1
    with pytest.raises(ShardError, match="never written"):
        load(path)
    with pytest.raises(ShardError, match="only 4 of 10 chunks"):
        load(path, "chunked")


def low_level(path, name, shape, kind, layout=None, early=False, data=None):
    """A dataset as other tools write it, or leave it."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if isinstance(layout, tuple):
        properties.set_chunk(layout)
    elif layout is not None:
        properties.set_layout(layout)
    if early:
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    with h5py.File(path, "a") as file:
        made = h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), properties)
        if data is not None:
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.broadcast_to(np.float32(data), shape).copy())


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("layout", [None, h5py.h5d.COMPACT, (3, 4)])
def test_bfloat16_of_any_layout(path, layout, big_endian):
    kind = file_type(BFLOAT16)
    if big_endian:
        kind.set_order(h5py.h5t.ORDER_BE)
    low_level(path, "x", (6, 4), kind, layout, data=1.5)
    low_level(path, "unwritten", (6, 4), kind, layout)
    assert load(path).dtype == BFLOAT16
    assert (load(path) == 1.5).all()
    with pytest.raises(ShardError, match=r"never written|0 of 2 chunks"):
        load(path, "unwritten")


@pytest.mark.parametrize("layout", [h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, (3, 4)])
def test_what_got_its_place_early_is_no_zero(path, layout):
    early = layout != h5py.h5d.COMPACT
    for name, data in (("x", None), ("zeros", 0.0), ("data", 2.0), ("late", 0.0)):
        low_level(path, name, (6, 4), h5py.h5t.IEEE_F32LE, (6, 4) if name == "late" else layout,
                  early and name != "late", data)
    for name in ("x", "zeros"):
        with pytest.raises(ShardError, match=r"can't be told from data that was never written.*late allocation"):
            load(path, name)
    assert (load(path, "data") == 2).all()
    assert (load(path, "late") == 0).all()
    with h5py.File(path, "a") as file:
        file["data"][...] = 0
        file["data"][5, 3] = np.nan
    assert np.isnan(load(path, "data")[5, 3])


def test_a_small_file_with_a_large_chunk(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (2**18, 2**9), "f4", chunks=(2**18, 2**9), compression="gzip")
        file["x"].id.write_direct_chunk((0, 0), b"nothing")
    with pytest.raises(ShardError, match="takes 512 MiB of memory to read; copy it into chunks of at most 256"):
        load(path)


@pytest.mark.parametrize("kind", ["u2", ">u2", "i2", "V2"])
def test_bfloat16_as_others_store_it(path, kind):
    rows = np.random.default_rng(0).standard_normal((70, 3)).astype(BFLOAT16)
    with h5py.File(path, "w") as file:
        bits = rows.view("V2" if kind == "V2" else "u2").astype(kind) if kind == ">u2" else rows.view(kind)
        file["x"] = bits
        file["bytes"] = np.zeros(3, "u1")
    with pytest.raises(DtypeError, match=r"say --raw-dtype bfloat16, or write HDF5's own"):
        load(path)
    with open_file(path) as file:
        dataset = open_dataset(file, "x", "bfloat16")
        assert read_rows(dataset, 7, 70, "bfloat16").tobytes() == rows[7:].tobytes()
        with pytest.raises(DtypeError, match=r"got uint8$"):
            open_dataset(file, "bytes", "bfloat16")


def test_a_locked_file_is_not_called_damaged(path):
    save(path, np.ones(3))
    writer = ["-c", "import h5py, sys; f = h5py.File(sys.argv[1], 'a'); print(1, flush=True); sys.stdin.read()", path]
    with subprocess.Popen([sys.executable, *writer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ShardError, match="is locked: another program has it open"):
            load(path)
        process.stdin.close()
    assert load(path).tolist() == [1, 1, 1]


def test_what_is_no_file(path):
    os.mkfifo(path)
    with pytest.raises(ShardError, match="this is a pipe"):
        load(path)
    with pytest.raises(ShardError, match="this is a folder"):
        load(path.parent)


def test_a_failed_write_is_heard_at_once_and_ends_well(path, monkeypatch):
    """Whatever HDF5 does after that: many small chunks, whose index is read back while it is written."""
    real, left = os.pwrite, [400]

    def failing(*rest):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(122, "Disk quota exceeded")
        return real(*rest)

    def write():
        with write_file(path) as file:
            dataset = file.create_dataset("x", (200_000,), "f4", chunks=(8,))
            dataset[...] = 1
            file.disk.check()

    monkeypatch.setattr("os.pwrite", failing)
    with pytest.raises(OutputError, match="Disk quota exceeded"):
        write()
    assert not list(path.parent.iterdir())


def test_what_reads_otherwise_does_not_appear(path, monkeypatch):
    """As on storage that loses a write and says nothing."""
    real = os.pwrite

    def losing(descriptor, data, at):
        return len(data) if len(data) > 500_000 else real(descriptor, data, at)

    monkeypatch.setattr("os.pwrite", losing)
    with pytest.raises(OutputError, match="what was read back is not what was written"):
        save(path, np.random.default_rng(0).standard_normal((300_000, 2)))
    assert not list(path.parent.iterdir())


def test_what_looks_at_a_file_while_it_is_flushed(path, monkeypatch):
    """It sees all of it, under its temporary name, before the flush is done; what it raises keeps it from appearing."""
    looking, seen = threading.Event(), []

    def look(temporary):
        looking.set()
        seen.append((temporary, path.exists(), temporary.read_bytes()))

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (looking.wait(10), fsync(descriptor)))
    with write_file(path, beside=look) as file:
        file["x"] = np.arange(5)
    (temporary, there, data), = seen
    assert looking.is_set()
    assert not there
    assert temporary != path
    assert data == path.read_bytes()

    def refuse(temporary):
        raise ShardError("can't be read")

    with pytest.raises(OutputError, match="was read back is not what was written"), \
            write_file(path.with_name("y.h5"), beside=refuse) as file:
        file["x"] = np.arange(5)
    assert sorted(found.name for found in path.parent.iterdir()) == [path.name]


def test_external_link(path, tmp_path):
    save(tmp_path / "other.h5", np.ones(3))
    with h5py.File(path, "w") as file:
        file["x"] = h5py.ExternalLink("other.h5", "/x")
        file["group"] = h5py.ExternalLink("other.h5", "/")
        file["soft"] = h5py.SoftLink("/group/x")
    for name in ("x", "group/x", "soft"):
        with pytest.raises(ShardError, match=r"refused: an external link to 'other\.h5'"):
            load(path, name)


def test_soft_links_stay_inside(path):
    save(path, np.arange(3.0))
    with h5py.File(path, "a") as file:
        file["g/near"] = h5py.SoftLink("/x")
        file["loop"] = h5py.SoftLink("/loop")
        file["dangling"] = h5py.SoftLink("/nowhere")
    assert load(path, "g/near").tolist() == [0, 1, 2]
    with pytest.raises(ShardError, match="more than ten soft links"):
        load(path, "loop")
    with pytest.raises(ShardError, match="no such dataset"):
        load(path, "dangling")


def test_external_storage(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (4,), "u1", external=[("/etc/hostname", 0, 4)])
        file.create_dataset("f", (1,), "f4", external=[("/etc/hostname", 0, 4)])
    with pytest.raises(ShardError, match="refused: its data is in another file, '/etc/hostname'"):
        load(path, "f")


def test_unknown_filter(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.ones((8, 8), "f4"), chunks=(8, 8), scaleoffset=3)
    with pytest.raises(ShardError, match=r"refused: unknown filter 6"):
        load(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.ones((8, 8), "f4"), chunks=(8, 8), compression="gzip", shuffle=True)
    assert (load(path) == 1).all()


def virtual(path, sources, shape=(8,), dtype="f4"):
    layout = h5py.VirtualLayout(shape, dtype)
    for at, (name, data, count) in enumerate(sources):
        layout[at * 4:at * 4 + count] = h5py.VirtualSource(name, data, (count,), dtype)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)


def test_virtual_sources(path, tmp_path):
    (tmp_path / "sub").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside.h5"
    for name in ("a.h5", "sub/b.h5", outside):
        save(tmp_path / name, np.arange(4, dtype="f4"))
    virtual(path, [("a.h5", "x", 4), ("sub/b.h5", "x", 4)])
    assert load(path).tolist() == [0, 1, 2, 3] * 2
    for name in (str(outside), f"../{outside.name}", str(tmp_path / "a.h5")):
        virtual(path, [("a.h5", "x", 4), (name, "x", 4)])
        with pytest.raises(ShardError, match="outside the file's folder"):
            load(path)
    (tmp_path / "link.h5").symlink_to(outside)
    virtual(path, [("a.h5", "x", 4), ("link.h5", "x", 4)])
    with pytest.raises(ShardError, match="outside the file's folder"):
        load(path)
    outside.unlink()
    virtual(path, [("a.h5", "x", 4), ("gone.h5", "x", 4)])
    with pytest.raises(ShardError, match="no such file"):
        load(path)
    virtual(path, [("a.h5", "x", 4), ("sub/b.h5", "y", 4)])
    with pytest.raises(ShardError, match="no such dataset"):
        load(path)
    virtual(path, [("a.h5", "x", 4), ("sub/b.h5", "x", 3)])
    with pytest.raises(ShardError, match="does not hold"):
        load(path)
    virtual(path, [("a.h5", "x", 4)])
    with pytest.raises(ShardError, match="leave numbers out or give them twice"):
        load(path)
    layout = h5py.VirtualLayout((8,), "f4")
    for name in ("a.h5", "sub/b.h5"):                      # both on the same rows: the sum of items is right
        layout[0:4] = h5py.VirtualSource(name, "x", (4,), "f4")
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)
    with pytest.raises(ShardError, match="leave numbers out or give them twice"):
        load(path)


def test_a_source_that_goes_while_it_is_read_is_no_zero(path, tmp_path):
    for name in ("a.h5", "b.h5"):
        save(tmp_path / name, np.arange(1, 5, dtype="f4"))
    virtual(path, [("a.h5", "x", 4), ("b.h5", "x", 4)])
    with open_file(path) as file:
        dataset = open_dataset(file, "x")
        assert read_rows(dataset, 2, 7).tolist() == [3, 4, 1, 2, 3]
        (tmp_path / "b.h5").unlink()
        assert read_rows(dataset, 0, 4).tolist() == [1, 2, 3, 4]
        with pytest.raises(ShardError, match=r"b\.h5: no such file"):
            read_rows(dataset, 2, 7)


def test_a_linked_file_finds_its_sources_where_it_is(tmp_path):
    for folder in ("c", "d"):
        (tmp_path / folder).mkdir()
    save(tmp_path / "c" / "a.h5", np.arange(4, dtype="f4"))
    save(tmp_path / "outside.h5", np.full(4, 666, "f4"))
    virtual(tmp_path / "c" / "v.h5", [("a.h5", "x", 4), ("a.h5", "x", 4)])
    (tmp_path / "d" / "v.h5").symlink_to(tmp_path / "c" / "v.h5")
    (tmp_path / "d" / "a.h5").symlink_to(tmp_path / "outside.h5")
    assert load(tmp_path / "d" / "v.h5").tolist() == [0, 1, 2, 3] * 2


def test_virtual_source_patterns_are_refused(path):
    with h5py.File(path, "w", libver="v110") as file:
        whole = h5py.h5s.create_simple((8,), (h5py.h5s.UNLIMITED,))
        whole.select_hyperslab((0,), (h5py.h5s.UNLIMITED,), (4,), (4,))
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_virtual(whole, b"part-%b.h5", b"x", h5py.h5s.create_simple((4,)))
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((8,), (h5py.h5s.UNLIMITED,)),
                        properties)
    with pytest.raises(ShardError, match=r"'part-%b\.h5' is outside"):
        load(path)


def test_virtual_prefix_is_refused(path, tmp_path, monkeypatch):
    save(tmp_path / "a.h5", np.arange(4, dtype="f4"))
    virtual(path, [("a.h5", "x", 4), ("a.h5", "x", 4)])
    monkeypatch.setenv("HDF5_VDS_PREFIX", "/elsewhere")
    with pytest.raises(ShardError, match="HDF5_VDS_PREFIX"):
        load(path)


def test_integers(path):
    with h5py.File(path, "w") as file:
        file["documents"] = np.array([0, 3, 5], "i4")
        file["float"] = np.array([0.0])
        file["square"] = np.zeros((2, 2), int)
    with open_file(path) as file:
        assert read_integers(file, "documents").tolist() == [0, 3, 5]
        with pytest.raises(DtypeError, match="expected integers"):
            read_integers(file, "float")
        with pytest.raises(ValueError, match=r"expected shape \(offsets\)"):
            read_integers(file, "square")
        with pytest.raises(ValueError, match="at most 2 integers, got 3"):
            read_integers(file, "documents", most=2)


def test_output_appears_whole_or_not_at_all(path):
    def fail():
        with write_file(path) as file:
            file["x"] = 1
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        fail()
    assert not list(path.parent.iterdir())
    save(path, np.ones(3))
    with h5py.File(path) as file:
        assert file.attrs["complete"]
    with pytest.raises(OutputError, match=r"exists; .*--force"), write_file(path):
        pass
    with pytest.raises(OutputError, match="no such folder"), write_file(path / "under" / "y.h5"):
        pass
    with pytest.raises(OutputError, match="got a folder"), write_file(path.parent, force=True):
        pass
    assert [p.name for p in path.parent.iterdir()] == ["x.h5"]


def test_disk_full(monkeypatch, path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)      # of the file, before it has its name
    with pytest.raises(OutputError, match="No space left"):
        save(path, np.ones(3))
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("name", [None, 3, b"in.h5", 2.5, ["in.h5"]])
def test_names_that_are_none(name):
    """An integer is not taken for an open file."""
    for use in (open_file, write_file):
        with pytest.raises(OptionError, match="path: expected the name of a file"), use(name):
            pass
