"""HDF5 in and out: bits kept, damage noticed, nothing followed out of the folder."""

import h5py
import numpy as np
import pytest

from ringmpi import DtypeError, OutputError, ShardError
from ringmpi.hdf5 import (
    create_dataset,
    file_type,
    open_dataset,
    open_file,
    read_integers,
    read_rows,
    stored_dtype,
    write_file,
    write_rows,
)
from ringmpi.softmax import BFLOAT16, DTYPES


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.h5"


def save(path, rows, name="x"):
    with write_file(path, force=True) as file:
        write_rows(create_dataset(file, name, rows.shape, rows.dtype), 0, rows)


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


def test_pieces(path, monkeypatch):
    monkeypatch.setattr("ringmpi.stored.PIECE_BYTES", 100)
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
    with pytest.raises(ShardError, match="leave rows out or give them twice"):
        load(path)
    layout = h5py.VirtualLayout((8,), "f4")
    for name in ("a.h5", "sub/b.h5"):                      # both on the same rows: the sum of items is right
        layout[0:4] = h5py.VirtualSource(name, "x", (4,), "f4")
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("x", layout)
    with pytest.raises(ShardError, match="leave rows out or give them twice"):
        load(path)


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
