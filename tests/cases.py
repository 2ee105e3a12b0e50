"""Cases of calls on several ranks: what varies, coverings of it, layouts and masks."""

import itertools

import numpy as np
from hypothesis import strategies as st

from ringmpi import Contiguous, Custom
from ringmpi.dtypes import DTYPES
from ringmpi.layout import make

FACTORS = {
    "backend": ["numpy", "numba"],
    "dtype": list(DTYPES),
    "layout": ["contiguous", "uneven", "empty", "striped", "zigzag", "custom"],
    "mask": ["full", "causal", "window", "documents", "prefix", "first", "all", "trees", "numbered", "holes"],
    "heads": [(4, 4), (8, 2), (3, 1)],
    "length": [1, 2, "P-1", 1003, 4097],
    "dim_v": [16, 9],
}


def covering(factors, seed=0):
    """Cases in which every pair of levels of any two factors occurs; the long length seldom more than needed."""
    names = list(factors)
    rng = np.random.default_rng(seed)
    missing = {(a, b, x, y) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    cases = []
    while missing:
        best, gain = None, -1
        for _ in range(60):
            case = {name: factors[name][rng.integers(len(factors[name]))] for name in names}
            covers = {(a, b, case[a], case[b]) for a, b in itertools.combinations(names, 2)} & missing
            if len(covers) > gain:
                best, gain = (case, covers), len(covers)
        cases.append(best[0])
        missing -= best[1]
    return cases


def make_layout(kind, length, size):
    """A layout of each kind, deterministic; the shards of `uneven` differ, one of `empty` holds nothing."""
    rng = np.random.default_rng(length * 31 + size)
    if kind in ("contiguous", "striped", "zigzag"):
        return make(kind, length, size)
    if kind == "custom":
        owner = rng.integers(0, size, length)
        return Custom([np.flatnonzero(owner == rank) for rank in range(size)])
    cuts = np.sort(rng.integers(0, length + 1, size - 1))
    counts = np.diff([0, *cuts, length])
    if kind == "empty" and size > 1:
        counts[0] += counts[size // 2]
        counts[size // 2] = 0
    return Contiguous(counts)


def make_mask(kind, n_k, n_q=None):
    """Options of a mask of each kind, for as many queries as keys unless it is said."""
    inner = sorted({n_k // 5, n_k // 3, n_k // 2} - {0, n_k})
    documents = [0, *inner, n_k] if n_k else [0]
    padded = [0, *inner, *inner[:2], n_k - n_k // 9]              # empty documents, and tokens in none
    made = {"full": {}, "causal": {"causal": True}, "window": {"window": (n_k // 4, 3)},
            "documents": {"documents": sorted(padded)}, "prefix": {"causal": True, "prefix": n_k // 3},
            "first": {"window": (n_k // 6, 0), "first": 3},
            "all": {"causal": True, "window": (n_k // 4, None), "documents": documents, "prefix": n_k // 3, "first": 5},
            "trees": trees(documents) | {"causal": True}, "numbered": numbered(n_k) | {"window": (n_k // 3, n_k // 9)},
            "holes": {"window": (n_k // 2, n_k // 5), "keys": n_k - n_k // 8, "key_mask": holes(n_k)},
            }[kind]
    packed = "documents" in made or "document_ids" in made
    return made | ({"q_offset": n_k - n_q} if packed and n_q not in (None, n_k) else {})


def trees(documents):
    """Documents of which the second and the fourth go on from the first, the third has a prompt, one is a span."""
    number = len(documents) - 1
    prompt = documents[0] + 1, max(documents[0] + 1, documents[-1] // 7)
    return {"documents": documents, "parents": [-1, 0, -1, 0][:number],
            "prompts": [(-1, -1), (-1, -1), prompt, (-1, -1)][:number] or None,
            "spans": [documents[-2:]] if number else None}


def numbered(n_k):
    """Three documents that take turns, some padding, and a span over the ends of several."""
    numbers = np.arange(n_k) // max(1, n_k // 10) % 3
    numbers[n_k // 2:n_k // 2 + n_k // 20] = -1
    return {"document_ids": numbers.tolist(), "spans": [(n_k // 4, n_k // 4 + n_k // 5)]}


def holes(n_k):
    """Most keys, but some of the first, and some in the middle."""
    there = np.arange(n_k) >= n_k // 50
    there[n_k // 3:n_k // 3 + n_k // 15] = False
    return there.tolist()


def of_size(case, size):
    """A case of `covering` for a number of ranks."""
    length = size - 1 if case["length"] == "P-1" else case["length"]
    return case | {"length": length, "mask": make_mask(case["mask"], length)}


def draw_mask(draw, length):
    """Options of any mask."""
    documents = [0, *sorted(draw(st.lists(st.integers(0, length) | st.just(length), max_size=4)))]
    packed = draw(st.sampled_from([{}, {"documents": documents}, trees(documents), numbered(length)]))
    offsets = st.integers(-9, 60)
    return {"causal": draw(st.booleans()), "prefix": draw(st.none() | st.integers(0, 60)),
            "window": draw(st.none() | st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))),
            "first": draw(st.integers(0, 5)), "q_offset": draw(offsets if packed else st.none() | offsets), **packed}
