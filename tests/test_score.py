"""The random words of dropout, and what a score knows of itself."""

import numpy as np
import pytest

from ringmpi.score import Score, dropout_keys, random_words


@pytest.mark.parametrize(("counter", "key", "word"), [
    ((0x00000000, 0x00000000), 0x00000000, 0xFF1DAE59),
    ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, 0x2C3F628B),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, 0xDD7CE038)])
def test_known_answers_of_philox(counter, key, word):
    """Those that Random123 is shipped with."""
    assert random_words(key, counter[1], counter[0]) == word


def test_words_are_uniform_and_know_each_argument():
    i, j = np.arange(-200, 300)[:, None], np.arange(400)
    words = random_words(7, i, j)
    assert words.shape == (500, 400)
    assert words.dtype == np.uint32
    assert len(np.unique(words)) > 0.999 * words.size
    for other in (random_words(8, i, j), random_words(7, i + 1, j), random_words(7, i, j + 1)):
        assert (other == words).mean() < 1e-4
        both = (words < 2**31) == (other < 2**31)
        assert abs(both.mean() - 0.5) < 5 * 0.5 / words.size**0.5
    for bit in range(32):
        assert abs(((words >> bit) & 1).mean() - 0.5) < 5 * 0.5 / words.size**0.5
    kept = (words >= Score(1, dropout=0.3).threshold).mean()
    assert abs(kept - 0.7) < 5 * (0.21 / words.size)**0.5


@pytest.mark.parametrize("p", [1e-12, 2.0**-32, 0.1, 0.5, 1 - 2.0**-20, 1 - 2.0**-33, 1 - 2.0**-53])
def test_what_is_kept_makes_up_for_what_is_dropped(p):
    score = Score(1, dropout=p)
    assert score.gain * (1 - score.threshold / 2**32) == 1
    assert 0 <= score.threshold < 2**32


def test_dropout_keys_differ():
    a = dropout_keys(0, 3, 50)
    assert a.shape == (3, 50)
    assert len(np.unique(a)) == 150
    assert a.dtype == np.uint32
    for seed in (1, 2, 2**63, 2**64 - 1):
        assert not np.isin(dropout_keys(seed, 3, 50), a).any()
    assert (dropout_keys(0, 3, 50) == a).all()


def test_plain():
    assert Score(0.3).plain
    assert not Score(0.3, softcap=1.0).plain
    assert not Score(0.3, slopes=np.ones(2)).plain
    assert not Score(0.3, dropout=0.1).plain
    assert not Score(0.3, key_bias=np.zeros((3, 1))).plain
