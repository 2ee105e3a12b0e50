"""`ringmpi analyse`: from files to a file, on ranks and without."""

import itertools

import h5py
import numpy as np
import oracle
import pytest
from job_files import attend, make_random, read_arrays
from test_job import run
from test_weights import dense

from ringmpi.cli import main
from ringmpi.files.opening import open_file

ASKED = ["--key-mass", "--entropy", "--mean-position", "--by-document", "--max-score", "--top", "3", "--rows", "7,0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An input with documents and sinks, and its result."""
    folder = tmp_path_factory.mktemp("analyse")
    source = make_random(folder / "in.h5", 203, heads=4, kv_heads=2, dim=16, documents=5)
    with h5py.File(source, "r+") as file:
        file["sinks"] = np.array([0.5, -1, 0, 2], "f4")
        file.attrs["complete"] = True
    attend(source, folder / "out.h5", "--causal", "--window", "90,", "--sinks", "--softcap", "3", "--layout", "striped")
    return source, folder / "out.h5"


def check(source, result):
    q, k, _ = read_arrays(source)
    with open_file(source) as file:
        offsets, sinks = file["documents"][...], file["sinks"][...]
    see = oracle.visible(203, 203, causal=True, window=(90, None))
    p, x, _ = dense(q, k, see, 0.25, {"softcap": 3, "sinks": sinks})
    positions = np.arange(203)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = {"key_mass": p.sum(axis=0).T, "entropy": -np.nansum(p * np.log(p), axis=2),
                "mean_position": p @ positions / p.sum(axis=2), "max_score": x.max(axis=(0, 2)),
                "mass_by_document": np.stack([p[..., a:b].sum(axis=2) for a, b in itertools.pairwise(offsets)], -1),
                "top_weights": -np.sort(-p, axis=2)[..., :3], "rows": p[[7, 0]]}
    with open_file(result) as file:
        assert file.attrs["complete"]
        for name, x in want.items():
            assert file[name].shape == x.shape
            assert oracle.error(file[name][...], x) <= 2e-5, name
        top = file["top_positions"][...]
        assert (file["rows_of"][...] == [7, 0]).all()
    some = top >= 0
    assert (some.sum(axis=2) == np.minimum(see.sum(axis=1), 3)[:, None]).all()
    at = np.take_along_axis(p, np.where(some, top, 0), -1)
    assert np.abs(np.where(some, at - want["top_weights"], 0)).max() <= 2e-5


@pytest.mark.parametrize(("ranks", "layout"), [(3, "striped"), (4, "contiguous")])
def test_on_ranks(files, tmp_path, ranks, layout):
    result = run(ranks, "analyse", *files, tmp_path / "weights.h5", *ASKED, "--layout", layout, folder=tmp_path)
    assert result.code == 0, result.text
    assert "key_mass (203, 4): " in result.ranks[0]
    check(files[0], tmp_path / "weights.h5")


def test_one_file_and_no_question(files, tmp_path):
    """Of a merged result, by NumPy; without a question key_mass alone."""
    assert main(["merge", str(files[1]), str(tmp_path / "one.h5")]) == 0
    given = ["analyse", str(files[0]), str(tmp_path / "one.h5"), str(tmp_path / "weights.h5"), "--quiet", "--backend",
             "numpy"]
    assert main([*given, *ASKED]) == 0
    check(files[0], tmp_path / "weights.h5")
    assert main(given) == 6                                     # it is there
    assert main([*given, "--force"]) == 0
    with open_file(tmp_path / "weights.h5") as file:
        assert sorted(file) == ["key_mass"]


def test_a_bias_of_the_keys(tmp_path):
    """Of the input, as the result says that it had one; keys of which it leaves some out."""
    source = make_random(tmp_path / "in.h5", 90, heads=4, kv_heads=2, dim=16)
    bias = oracle.key_bias("left out by head", 4, 90)
    with h5py.File(source, "r+") as file:
        file["key_bias"] = bias
        file.attrs["complete"] = True
    attend(source, tmp_path / "out.h5", "--causal", "--key-bias")
    asked = "--key-mass", "--max-score", "--top", "3", "--rows", "80", "--layout", "striped"
    result = run(2, "analyse", source, tmp_path / "out.h5", tmp_path / "weights.h5", *asked, folder=tmp_path)
    assert result.code == 0, result.text
    q, k, _ = read_arrays(source)
    p, x, _ = dense(q, k, oracle.visible(90, 90, causal=True), 0.25, {"key_bias": bias})
    with open_file(tmp_path / "weights.h5") as file:
        for name, want in {"key_mass": p.sum(axis=0).T, "max_score": x.max(axis=(0, 2)), "rows": p[[80]],
                           "top_weights": -np.sort(-p, axis=2)[..., :3]}.items():
            assert oracle.error(file[name][...], want) <= 2e-5, name
        assert (file["top_positions"][:30] == -1).all()


@pytest.mark.parametrize("of_axes", [False, True])
def test_a_bias_by_distance(tmp_path, of_axes):
    """Of the input, as the result says that it had one."""
    source = make_random(tmp_path / "in.h5", 90, heads=4, kv_heads=2, dim=16)
    rng = np.random.default_rng(3)
    tables = [rng.standard_normal((4, width)) for width in ((7, 3) if of_axes else (21,))]
    with h5py.File(source, "r+") as file:
        for number, table in enumerate(tables):
            file[f"relative_{number}" if of_axes else "relative"] = table
        file.attrs["complete"] = True
    attend(source, tmp_path / "out.h5", "--relative", *(("--grid", "9x10", "--grid-window", "2") if of_axes else ()))
    asked = "--key-mass", "--max-score", "--top", "3", "--rows", "80", "--layout", "striped"
    result = run(2, "analyse", source, tmp_path / "out.h5", tmp_path / "weights.h5", *asked, folder=tmp_path)
    assert result.code == 0, result.text
    q, k, _ = read_arrays(source)
    i = np.arange(90)
    away = oracle.distances((9, 10), (False, False), i, i) if of_axes else [i[:, None] - i]
    see = oracle.near((9, 10), [2, 2], (False, False), "cut", False) if of_axes else np.ones((90, 90), bool)
    p, x, _ = dense(q, k, see, 0.25, {"relative": tables, "away": away})
    with open_file(tmp_path / "weights.h5") as file:
        for name, want in {"key_mass": p.sum(axis=0).T, "max_score": x.max(axis=(0, 2)), "rows": p[[80]],
                           "top_weights": -np.sort(-p, axis=2)[..., :3]}.items():
            assert oracle.error(file[name][...], want) <= 2e-5, name


def test_errors_leave_nothing(files, tmp_path):
    source, out = map(str, files)
    target = tmp_path / "weights.h5"
    for code, arguments in [
            (2, [source, out, str(target), "--rows", "203"]), (2, [source, out, source, "--force"]),
            (3, [str(tmp_path / "none.h5"), out, str(target)]), (3, [source, source, str(target)]),
            (6, [source, out, str(tmp_path / "no folder" / "weights.h5")])]:
        assert main(["analyse", *arguments, "--quiet", "--backend", "numpy"]) == code, arguments
    other = make_random(tmp_path / "other.h5", 100, heads=4, kv_heads=2, dim=16)
    assert main(["analyse", str(other), out, str(target), "--quiet", "--backend", "numpy"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.h5"]
    read_arrays(source)                                         # still there
