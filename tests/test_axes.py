"""Files whose axes come in any order: read as they lie, computed right, written in the order of the queries."""

import itertools
import json
import re

import h5py
import launch
import numpy as np
import oracle
import pytest

from ringmpi import OptionError, ShapeError
from ringmpi.cli import main
from ringmpi.files import boxes
from ringmpi.files.axes import Axes
from ringmpi.files.hdf5 import create_dataset, open_dataset, write_file, write_rows
from ringmpi.files.opening import open_file
from ringmpi.files.shards import verify
from ringmpi.files.tokens import Tokens

CLI = ["-m", "ringmpi"]
ORDER = ("batch", "tokens", "heads", "dim")          # of a call
BATCH, N_Q, N_K, HEADS, KV_HEADS, DIM, DIM_V = 2, 23, 29, 4, 2, 6, 5


def to_file(x, names):
    """Lay out an array (batch, tokens, heads[, dim]) as a file with these axes has it, by einsum's letters."""
    letters = dict(zip(ORDER, "bthd", strict=True))
    said = "".join(letters["heads"] + letters["dim"] if name == "hidden" else letters[name] for name in names)
    if x.ndim == 3:
        said = said.replace("d", "")
    have = "bthd"[:x.ndim]
    if "batch" not in names:
        x, have = x[0], have[1:]
    sizes = dict(zip(have, x.shape, strict=True))
    shape = [sizes["h"] * sizes.get("d", 1) if name == "hidden" and x.ndim + ("batch" not in names) == 4 else
             sizes["h" if name == "hidden" else letters[name]] for name in names if name != "dim" or "d" in sizes]
    return np.einsum(f"{have}->{said}", x).reshape(shape)


def make(path, names, kind="f8", seed=0, **more):
    """An input of these axes; give what its result has to be."""
    rng = np.random.default_rng(seed)
    sizes = (N_Q, HEADS, DIM), (N_K, KV_HEADS, DIM), (N_K, KV_HEADS, DIM_V)
    arrays = [rng.standard_normal((BATCH if "batch" in names else 1, *shape)) for shape in sizes]
    with h5py.File(path, "w") as file:
        for name, x in zip("qkv", arrays, strict=True):
            file.create_dataset(f"layer/{name}", data=to_file(x, names).astype(kind), **more)
    see = oracle.visible(N_Q, N_K, causal=True)
    found = [oracle.attend(q, k, v, see, DIM**-0.5) for q, k, v in zip(*arrays, strict=True)]
    return {name: to_file(np.stack(parts), names) for name, parts in zip(("out", "lse"), zip(*found, strict=True),
                                                                        strict=True)}


def options(names):
    heads = ["--heads", str(HEADS)] if "hidden" in names else []
    return [*(x for name in "qkv" for x in (f"--{name}", f"layer/{name}")), "--axes", ",".join(names), *heads]


def run(ranks, command, *arguments, folder):
    return launch.launch(ranks, [*CLI, command, *arguments, "--backend", "numpy"], folder=folder / "said")


def check_result(path, want):
    with h5py.File(path) as file:
        for name, x in want.items():
            assert file[name].shape == x.shape
            assert oracle.error(file[name][...], x) < 1e-13


CASES = [
    (("heads", "tokens", "dim"), 3, ["--layout", "zigzag"], "f8"),
    (("dim", "heads", "tokens"), 1, [], ">f8"),
    (("batch", "heads", "tokens", "dim"), 2, ["--checkpoint", "kept"], "f8"),
    (("batch", "tokens", "heads", "dim"), 4, ["--layout", "striped"], ">f8"),
    (("tokens", "hidden"), 3, ["--layout", "striped"], "f8"),
    (("batch", "hidden", "tokens"), 2, [], "f8"),
    (("heads", "tokens", "dim"), 2, ["--stream", "--layout", "striped"], ">f8"),
    (("tokens", "hidden"), 3, ["--stream", "--checkpoint", "kept"], "f8"),
]


@pytest.mark.parametrize(("names", "ranks", "more", "kind"), CASES, ids=[",".join(c[0]) + c[2][0] if c[2] else
                                                                        ",".join(c[0]) for c in CASES])
def test_from_file_to_file(tmp_path, names, ranks, more, kind, capsys):
    source, target = tmp_path / "in.h5", tmp_path / "out.h5"
    want = make(source, names, kind)
    result = run(ranks, "attend", source, target, "--causal", *options(names), *more, folder=tmp_path)
    assert result.code == 0, result.text
    check_result(target, want)
    assert main(["check", str(source), str(target)]) == 0
    assert main(["merge", str(target), str(tmp_path / "one.h5")]) == 0
    check_result(tmp_path / "one.h5", want)
    assert main(["check", str(source), str(tmp_path / "one.h5")]) == 0
    assert main(["attend", str(source), str(tmp_path / "no.h5"), "--dry-run", *options(names)]) == 0
    assert ("batch of 2, 23 queries" in capsys.readouterr().out) == ("batch" in names)
    assert verify(target).axes.names == names

    # One wrong number of one element of the batch is found.
    with h5py.File(source, "a") as file:
        file["layer/v"][(-1,) * len(names)] += 3.0
    assert main(["check", str(source), str(target)]) == 1


def test_a_bias_of_the_keys_and_sinks(tmp_path):
    """They are for all elements of a batch alike where they have no such axis, and it is in the file's order."""
    names = ("batch", "heads", "tokens", "dim")
    source = tmp_path / "in.h5"
    make(source, names)
    bias = np.random.default_rng(1).standard_normal((BATCH, HEADS, N_K))
    with h5py.File(source, "a") as file:
        file["key_bias"] = bias
        file["sinks"] = np.arange(HEADS) / 2
        q, k, v = (file[f"layer/{name}"][...] for name in "qkv")
    result = run(3, "attend", source, tmp_path / "out.h5", "--key-bias", "--sinks", "--layout", "striped",
                 *options(names), folder=tmp_path)
    assert result.code == 0, result.text
    with h5py.File(tmp_path / "out.h5") as file:
        out = file["out"][...]
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        weights = np.exp(q[b, h] @ k[b, h // 2].T * DIM**-0.5 + bias[b, h])
        want = weights @ v[b, h // 2] / (weights.sum(axis=1, keepdims=True) + np.exp(h / 2))
        np.testing.assert_allclose(out[b, h], want, rtol=1e-12)
    assert main(["check", str(source), str(tmp_path / "out.h5")]) == 0
    with h5py.File(source, "a") as file:
        del file["key_bias"]
        file["key_bias"] = bias.transpose(0, 2, 1)
    said = run(2, "attend", source, tmp_path / "no.h5", "--key-bias", *options(names), folder=tmp_path)
    assert said.code == 3
    assert "'key_bias': expected shape (2, 29) or (2, 4, 29), got (2, 29, 4)" in said.ranks[0], said.text


WRONG = [
    (["--axes", "heads,tokens"], 2, "expected an order of tokens, heads and dim"),
    (["--axes", "heads,tokens,tokens"], 2, "expected an order of tokens"),
    (["--axes", "tokens,hidden"], 2, "expected --heads N with hidden"),
    (["--axes", "tokens,heads,dim", "--heads", "4"], 2, "and only then"),
    (["--axes", "batch,tokens,heads,dim"], 3,
     r"'/?layer/q': expected shape \(batch, tokens, heads, dim\), got \(4, 23, 6\); .*say so by --axes"),
    (["--axes", "dim,tokens,heads"], 3, "q and k: expected the same dim, at least 1, got 4 and 2"),
    (["--heads", "3"], 3, r"expected shape \(tokens, hidden\), got \(4, 23, 6\)"),
    ([], 3, "got 23 heads and 29 kv_heads"),
]


@pytest.mark.parametrize(("said", "code", "text"), WRONG, ids=[" ".join(case[0]) or "none" for case in WRONG])
def test_axes_that_do_not_fit(tmp_path, said, code, text):
    names = ("heads", "tokens", "dim")
    make(tmp_path / "in.h5", names)
    result = run(3, "attend", tmp_path / "in.h5", tmp_path / "out.h5", *options(names)[:-2], *said, folder=tmp_path)
    assert result.code == code, result.text
    assert re.search(text, result.ranks[0]), result.text
    assert sum("axes" in rank or "expected" in rank for rank in result.ranks) == 1, result.text
    assert {path.name for path in tmp_path.iterdir()} == {"in.h5", "said"}


def test_what_has_no_batch_axis_yet(tmp_path, capsys):
    names = ("batch", "tokens", "heads", "dim")
    source, target = tmp_path / "in.h5", tmp_path / "out.h5"
    make(source, names)
    result = run(2, "attend", source, target, "--stream", *options(names), folder=tmp_path)
    assert result.code == 2, result.text
    assert "no batch axis yet" in result.ranks[0], result.text
    assert main(["attend", str(source), str(target), "--backend", "numpy", "--quiet", *options(names)]) == 0
    assert main(["analyse", str(source), str(target), str(tmp_path / "sums.h5"), "--quiet"]) == 2
    assert "without a batch axis" in capsys.readouterr().err


def test_sums_over_weights_of_other_axes(tmp_path):
    names = ("heads", "tokens", "dim")
    make(tmp_path / "in.h5", names)
    assert main(["attend", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--backend", "numpy", "--quiet",
                 *options(names)]) == 0
    result = run(2, "analyse", tmp_path / "in.h5", tmp_path / "out.h5", tmp_path / "sums.h5", folder=tmp_path)
    assert result.code == 0, result.text
    with h5py.File(tmp_path / "sums.h5") as file:
        assert file["key_mass"].shape == (N_K, HEADS)
        np.testing.assert_allclose(file["key_mass"][...].sum(axis=0), N_Q)


def test_a_hidden_axis_that_heads_do_not_divide(tmp_path, capsys):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        for name in "qkv":
            file[name] = np.ones((5, 16), "f4")
    assert main(["attend", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--heads", "3", "--dry-run"]) == 3
    assert "dataset '/q': expected a hidden axis of 3 heads, got 16 numbers" in capsys.readouterr().err


def test_a_batch_of_nothing(tmp_path, capsys):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        for name in "qkv":
            file[name] = np.ones((0, 5, 2, 4), "f4")
    assert main(["attend", str(tmp_path / "in.h5"), str(tmp_path / "out.h5"), "--axes", "batch,tokens,heads,dim",
                 "--dry-run"]) == 3
    assert "expected a batch of one element at least, got none" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "tokens", "tokens,heads,dim,", "tokens,heads,hidden", "x,heads,dim",
                                  "batch,batch,heads,dim", "tokens,heads,dim,batch,batch", "TOKENS,heads,dim"])
def test_texts_that_name_no_axes(text):
    for heads in (None, 2):
        with pytest.raises(OptionError, match="axes: expected"):
            Axes.parse(text, heads)


@pytest.mark.parametrize("storage", [{}, {"chunks": True}, {"chunks": True, "compression": "gzip"}])
def test_a_rank_reads_its_own_tokens_alone(tmp_path, monkeypatch, storage):
    """Whatever the order: the bits of a slice, in boxes that are no larger than it."""
    monkeypatch.setattr("ringmpi.files.tokens.PIECE_BYTES", 400)
    counted = []
    read = boxes.read_box_as_shown
    monkeypatch.setattr("ringmpi.files.boxes.read_box_as_shown",
                        lambda dataset, start, x: (counted.append(x.size), read(dataset, start, x))[1])
    x = np.random.default_rng(0).integers(0, 256, (2, 37, 3, 4 * 4), np.uint8).view("f4")       # NaN payloads too
    x = x.reshape(2, 37, 3, 4)
    for number, names in enumerate([*itertools.permutations(ORDER), ("batch", "hidden", "tokens")]):
        path = tmp_path / f"{number}.h5"
        with h5py.File(path, "w") as file:
            laid = to_file(x.view("i4"), names).view("f4")
            file.create_dataset("x", data=laid, **{**storage, **({"chunks": laid.shape} if storage else {})})
        with open_file(path) as file:
            tokens = Tokens.of(open_dataset(file, "x"), Axes.parse(",".join(names), 3 if "hidden" in names else None),
                               heads=3)
            assert tokens.shape == (37, 2, 3, 4)
            for start, stop in ((0, 37), (5, 5), (11, 30)):
                del counted[:]
                want = x[:, start:stop]
                assert tokens.read(start, stop).tobytes() == want.swapaxes(0, 1).tobytes()
                assert sum(counted) == want.size
                assert tokens.element(1).read(start, stop).tobytes() == want[1].tobytes()


def test_rows_are_written_in_any_order(tmp_path):
    rows = np.random.default_rng(0).standard_normal((19, 2, 3, 4)).astype("f4")
    for number, names in enumerate([*itertools.permutations(ORDER), ("hidden", "tokens", "batch")]):
        axes = Axes(names)
        path = tmp_path / f"{number}.h5"
        with write_file(path) as file:                         # which reads it back, too
            dataset = create_dataset(file, "x", rows.shape, rows.dtype, axes)
            for start in (0, 7):
                write_rows(dataset, start, rows[start:start + (7 if start == 0 else 12)])
        with h5py.File(path) as file:
            np.testing.assert_array_equal(file["x"][...], to_file(rows.swapaxes(0, 1), names))


def test_results_of_older_versions_say_no_axes(tmp_path):
    from test_shards import forge
    from test_shards import make as make_output
    path = tmp_path / "out.h5"
    out, _ = make_output(path, dtype="float32")

    def change(content):
        del content["axes"]
        return json.dumps(content).encode()

    forge(path, change)
    assert verify(path).rows("out", 0, 10).tobytes() == out.tobytes()
    assert main(["merge", str(path), str(tmp_path / "one.h5")]) == 0


def test_a_shape_that_does_not_fit_is_no_plain_valueerror():
    with pytest.raises(ShapeError, match="hidden axis of 0 heads"):
        Axes(("tokens", "hidden")).shape_in_memory((3, 8))
