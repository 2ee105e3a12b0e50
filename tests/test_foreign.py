"""`ringmpi make numpy`: arrays of .npy, .npz and .safetensors, bit for bit; what is damaged or no array is refused."""

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from job_files import attend, read_arrays

from ringmpi.cli import main
from ringmpi.dtypes import BFLOAT16

SHAPES = {"q": (31, 4, 8), "k": (37, 2, 8), "v": (37, 2, 5)}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ringmpi.files.foreign.PIECE_BYTES", 1000)         # several pieces


def arrays(dtype="f4"):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def save_safetensors(path, tensors, kind=None, cut=0, header=None):
    """By the format's own words: the header's length, the header, the bytes."""
    at, said = 0, {}
    kinds = {"f4": "F32", "f2": "F16", "f8": "F64", "i8": "I64"}
    for name, x in tensors.items():
        said[name] = {"dtype": kind or ("BF16" if x.dtype == BFLOAT16 else kinds[x.dtype.str[1:]]),
                      "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = header or json.dumps(said).encode()
    data = struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values())
    path.write_bytes(data[:len(data) - cut])


def save(kind, x, tmp_path):
    """Save arrays in a kind of file; give what the command is to read."""
    if kind == "npy":
        for name, one in x.items():
            np.save(f"{name}.npy", one)
        return [f"{name}.npy" for name in x]
    if kind == "safetensors":
        pytest.importorskip("safetensors")
        save_safetensors(tmp_path / "x.safetensors", x)
        return ["x.safetensors"]
    (np.savez_compressed if kind == "compressed" else np.savez)("x.npz", **x)
    return ["x.npz"]


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "safetensors"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "bfloat16"])
def test_every_bit_comes_over(tmp_path, kind, dtype):
    x = arrays(BFLOAT16 if dtype == "bfloat16" else dtype)
    if kind == "safetensors" and dtype == ">f8":
        x = arrays("<f8")
    raw = ["--raw-dtype", "bfloat16"] if dtype == "bfloat16" and kind != "safetensors" else []
    x["documents"] = np.array([0, 11, 37])
    assert main(["make", "numpy", "in.h5", *save(kind, x, tmp_path), "--array", "documents", *raw]) == 0
    for got, name in zip(read_arrays("in.h5"), "qkv", strict=True):
        assert got.dtype == x[name].dtype.newbyteorder("=")
        assert got.tobytes() == x[name].astype(got.dtype).tobytes()
    with h5py.File("in.h5") as file:
        assert file["documents"][...].tolist() == [0, 11, 37]
    attend("in.h5", "out.h5", "--documents", "--q-offset", "6")


def test_names_and_axes(tmp_path):
    x = arrays()
    np.savez("a.npz", **{"layer.q": x["q"].swapaxes(0, 1).copy(), "unused": np.array(["text"])})
    np.save("keys.npy", np.asfortranarray(x["k"].swapaxes(0, 1)))
    np.save("v.npy", x["v"].swapaxes(0, 1))
    assert main(["make", "numpy", "in.h5", "a.npz", "keys.npy", "v.npy", "--q", "layer.q", "--k", "keys"]) == 0
    attend("in.h5", "out.h5", "--axes", "heads,tokens,dim")
    np.savez("b.npz", **x)
    assert main(["make", "numpy", "plain.h5", "b.npz"]) == 0
    attend("plain.h5", "want.h5")
    with h5py.File("out.h5") as got, h5py.File("want.h5") as want:
        np.testing.assert_array_equal(got["out"][...].swapaxes(0, 1), want["out"][...])


class Code:
    def __reduce__(self):
        return open, ("/tmp/was-run", "w")


def objects(path):
    np.save(path / "q.npy", np.array([Code()] * 3, object), allow_pickle=True)


def objects_in_archive(path):
    np.savez(path / "x.npz", **{**arrays(), "q": np.array([Code()] * 3, object)})


def pickled(path):
    (path / "q.npy").write_bytes(pickle.dumps(Code()))


def truncated(path):
    whole = (path / "q.npy").read_bytes()
    (path / "q.npy").write_bytes(whole[:-10])


def truncated_header(path):
    (path / "q.npy").write_bytes((path / "q.npy").read_bytes()[:50])


def huge(path):
    """A header that promises more than there is."""
    whole = (path / "q.npy").read_bytes()
    (path / "q.npy").write_bytes(whole.replace(b"(31, 4, 8)", b"(2**60, 8)")[:len(whole)])


def huge_in_archive(path):
    np.savez(path / "x.npz", **arrays())
    whole = {}
    with zipfile.ZipFile(path / "x.npz") as archive:
        whole = {name: archive.read(name) for name in archive.namelist()}
    whole["q.npy"] = whole["q.npy"].replace(b"(31, 4, 8), }    ", b"(99999999, 4, 8)}")
    with zipfile.ZipFile(path / "x.npz", "w") as archive:
        for name, data in whole.items():
            archive.writestr(name, data)


def damaged_archive(path):
    np.savez_compressed(path / "x.npz", **arrays())
    whole = bytearray((path / "x.npz").read_bytes())
    whole[len(whole) // 2] ^= 255
    (path / "x.npz").write_bytes(whole)


def no_archive(path):
    (path / "x.npz").write_bytes(b"no zip at all")


def fortran_in_archive(path):
    np.savez(path / "x.npz", **{name: np.asfortranarray(x) for name, x in arrays().items()})


def integers(path):
    np.save(path / "q.npy", np.ones((3, 2, 4), "i4"))


def complex_numbers(path):
    np.save(path / "q.npy", np.ones((3, 2, 4), "c8"))


def bits_of_bfloat16(path):
    np.save(path / "q.npy", arrays()["q"].astype(BFLOAT16))


def scalar(path):
    np.save(path / "q.npy", np.float32(1))


def missing(path):
    (path / "q.npy").unlink()


def text(path):
    (path / "q.npy").rename(path / "q.txt")


def twice(path):
    np.savez(path / "x.npz", **arrays())


def cut_tensors(path):
    save_safetensors(path / "x.safetensors", arrays(), cut=10)


def long_header(path):
    (path / "x.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")


def overlapping(path):
    said = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "qkv"}
    save_safetensors(path / "x.safetensors", {"q": np.ones(2, "f4")}, header=json.dumps(said).encode())


def of_eight_bits(path):
    save_safetensors(path / "x.safetensors", {name: np.ones((2, 1, 4), "i8").view("u1") for name in "qkv"},
                     kind="F8_E4M3")


BAD = [
    (objects, 3, "q.npy: can't be read.*[oO]bject"), (objects_in_archive, 3, "array 'q'.*fixed size"),
    (pickled, 3, "q.npy: can't be read"), (truncated, 3, "q.npy: can't be read"),
    (truncated_header, 3, "q.npy: can't be read"), (huge, 3, "q.npy: can't be read"),
    (huge_in_archive, 3, "array 'q': expected 12,799,999,872 bytes"), (damaged_archive, 3, "x.npz.*can't be read"),
    (no_archive, 3, "x.npz: can't be read"), (fortran_in_archive, 3, "in C order"),
    (integers, 3, "expected floats for q"), (complex_numbers, 3, "expected items of float64.*got complex64"),
    (bits_of_bfloat16, 3, "say --raw-dtype bfloat16"), (scalar, 3, "got a scalar"),
    (missing, 3, "no such file"), (text, 2, "expected a file that ends in .npy"), (twice, 2, "names that differ"),
    (cut_tensors, 3, "x.safetensors: can't be read"), (long_header, 3, "x.safetensors: can't be read"),
    (overlapping, 3, "x.safetensors: can't be read"), (of_eight_bits, 3, "of F8_E4M3: expected items of"),
]


@pytest.mark.parametrize(("damage", "code", "said"), BAD, ids=[case[0].__name__ for case in BAD])
def test_what_is_refused(tmp_path, damage, code, said, capsys):
    for name, x in arrays().items():
        np.save(f"{name}.npy", x)
    before = {"q.npy", "k.npy", "v.npy"}
    damage(tmp_path)
    one = [path.name for path in tmp_path.iterdir() if path.name not in before]
    if any(name.endswith(".safetensors") for name in one):
        pytest.importorskip("safetensors")
    inputs = one if one and damage not in (text, twice) else ["q.npy", "k.npy", "v.npy"]
    inputs = {text: ["q.txt", "k.npy", "v.npy"], twice: ["x.npz", "k.npy"]}.get(damage, inputs)
    there = {path.name for path in tmp_path.iterdir()}
    assert main(["make", "numpy", "in.h5", *inputs]) == code
    assert re.search(said, capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == there
    assert not Path("/tmp/was-run").exists()


def test_an_array_that_is_not_there(capsys):
    np.savez("x.npz", **{name: x for name, x in arrays().items() if name != "k"})
    assert main(["make", "numpy", "in.h5", "x.npz"]) == 3
    assert "expected an array 'k', got q, v; say which is which by --q, --k and --v" in capsys.readouterr().err


def test_zero_tokens():
    np.savez("x.npz", q=np.ones((0, 2, 4), "f4"), k=np.ones((0, 2, 4), "f4"), v=np.ones((0, 2, 4), "f4"))
    assert main(["make", "numpy", "in.h5", "x.npz"]) == 0
    for name in "qkv":
        np.save(f"{name}.npy", np.ones((0, 2, 4), "f4"))
    assert main(["make", "numpy", "two.h5", "q.npy", "k.npy", "v.npy"]) == 0
    assert [x.shape for x in read_arrays("two.h5")] == [(0, 2, 4)] * 3
