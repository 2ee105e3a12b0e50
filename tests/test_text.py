"""Text to q, k and v and back: attention finds what was written before."""

import numpy as np
import pytest

from ringmpi import ShardError
from ringmpi.cli import main
from ringmpi.commands.demo_text import (
    DIM,
    ORDERS,
    SHARPNESS,
    hash_contexts,
    predict_bytes,
    read_text,
    unpack_signs,
)
from ringmpi.files.hdf5 import read_integers, read_rows
from ringmpi.files.opening import open_file


def test_a_hash_knows_its_context_and_no_more():
    data = np.frombuffer(b"the cat sat on the cat", np.uint8)
    for order in ORDERS:
        hashes = hash_contexts(data, order)
        assert (hashes[2] == hashes[17]) == (order <= 3)
        same = np.frombuffer(b"x" * 40 + b"a long context that is the same" * 2, np.uint8)
        assert (hash_contexts(same, order)[-1] == hash_contexts(same, order)[-32]) == (order <= 31)
    assert set(np.unique(unpack_signs(hashes, np.dtype("f4")))) == {-1, 1}


def test_matches_score_far_above_noise():
    rng = np.random.default_rng(0)
    hashes = hash_contexts(rng.integers(0, 256, 20000).astype(np.uint8), 8)
    x = unpack_signs(hashes, np.dtype("f4"))
    scores = SHARPNESS * x[:50] @ x.T / DIM**0.5
    off = scores[:, 50:]
    assert (scores[np.arange(50), np.arange(50)] == SHARPNESS * DIM**0.5).all()
    assert abs(off.std() / SHARPNESS - 1) < 0.02
    assert off.max() < 0.75 * SHARPNESS * DIM**0.5


def test_files_in_a_fixed_order(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(name * 10)
    (tmp_path / "not.txt").write_text("other")
    text = read_text([tmp_path], 5, 20)
    assert len(text.data) == 20
    assert sorted(text.names) == ["a.py", "b.py", "c.py"]
    assert text.offsets.tolist() == [0, 5, 15, 20]
    assert text.place(6) == f"{text.names[1]}, byte 1"
    with pytest.raises(ShardError, match="expected 31 bytes of text, got 30"):
        read_text([tmp_path], 0, 31)
    with pytest.raises(ShardError, match="no such file"):
        read_text([tmp_path / "gone"], 0, 1)


def test_attention_predicts_the_repeated_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    once = bytes(rng.integers(65, 91, 500).tolist())
    (tmp_path / "text").write_bytes(once + once)
    assert main(["make", "text", "in.h5", "text", "--tokens", "1000", "--queries", "500"]) == 0
    assert main(["attend", "in.h5", "out.h5", "--causal", "--quiet"]) == 0
    assert main(["check", "in.h5", "out.h5"]) == 0
    with open_file(tmp_path / "out.h5") as file:
        guess, head = predict_bytes(read_rows(file["out"], 0, 500), read_rows(file["lse"], 0, 500))
    truth = np.frombuffer(once + once, np.uint8)[501:]
    assert (guess[40:-1] == truth[40:]).all()
    assert (head[40:] == len(ORDERS) - 1).all()
    assert (head[:4] == -1).all()
    assert main(["analyse", "in.h5", "out.h5", "weights.h5", "--top", "2", "--rows", "100", "--quiet", "--backend",
                 "numpy"]) == 0
    with open_file(tmp_path / "weights.h5") as file:
        assert file["top_positions"][100, -1, 0] == 101
        assert file["top_weights"][100, -1, 0] > 0.99
        assert file["rows"][0, -1, 101] == file["top_weights"][100, -1, 0]
    with open_file(tmp_path / "in.h5") as file:
        assert read_integers(file, "documents").tolist() == [0, 1000]
        assert file["text"][...].tobytes() == once + once


def test_standard_library_is_the_default(tmp_path):
    assert main(["make", "text", str(tmp_path / "in.h5"), "--tokens", "3000", "--dtype", "float32"]) == 0
    with open_file(tmp_path / "in.h5") as file:
        assert file["k"].shape == (3000, len(ORDERS), DIM)
        assert file["files"][0].decode().endswith(".py")
