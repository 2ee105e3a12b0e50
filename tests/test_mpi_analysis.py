"""Where the attention went, on this run's ranks, against dense float64 weights. Runs under mpiexec."""

import numpy as np
import pytest
from cases import covering, make_layout, of_size
from oracle import distances, functions, near, random_qkv, visible
from test_mpi_grids import HEADS, grids
from test_weights import BOUND, dense

from ringmpi import DtypeError, Grid, Mask, OptionError, ShapeError, analysis, ring_attention

pytestmark = pytest.mark.mpi

LEVELS = {"backend": ["numba", "numpy"], "dtype": ["float32", "float64", "bfloat16"],
          "layout": ["contiguous", "uneven", "empty", "striped", "zigzag", "custom"],
          "mask": ["full", "causal", "window", "documents", "all", "trees"],
          "heads": list(HEADS), "length": [1, "P-1", 203], "grid": range(8),
          "kind": ["plain", "softcap", "alibi", "sinks", "bias", "left out by head", "all and left out by head",
                   "relative", "all and relative", "left out by head and relative"]}
CASES = covering(LEVELS, seed=3)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_dense_weights(comm, number):
    """All that is asked, on every schedule, layout and mask."""
    case = of_size(CASES[number], comm.size)
    possible = list(grids(comm.size, HEADS[case["heads"]]))
    grid = possible[case["grid"] * len(possible) // 8]
    heads, kv_heads = case["heads"]
    n, dtype = case["length"], case["dtype"]
    q, k, _ = random_qkv(number, n, n, heads, kv_heads, 16, 1, dtype)
    q *= 2
    score, sinks = functions(case["kind"], heads, np.arange(n), np.arange(n))
    score = {name: x for name, x in score.items() if not name.startswith("dropout")}
    see = visible(n, n, **case["mask"])
    p, x, lse = dense(q, k, see, 0.25, {**score, "sinks": sinks})

    seen = np.repeat(see[:, None], heads, axis=1)
    layout = make_layout(case["layout"], n, comm.size)
    mine = layout.positions(comm.rank)
    bias = None
    if "key_bias" in score:
        seen &= ~np.isneginf(score["key_bias"].T)
        bias = score["key_bias"][mine, 0] if score["key_bias"].shape[1] == 1 else score["key_bias"][mine]
    options = {"comm": comm, "key_bias": bias, "relative": score["relative"][0] if "relative" in score else None,
               "mask": Mask(**case["mask"]), "backend": case["backend"], "schedule": grid, "timeout": 60,
               "layout": case["layout"] if case["layout"] in ("striped", "zigzag") else layout,
               "softcap": score.get("softcap"), "alibi": score.get("slopes"), "dropout": 0.3 if number % 5 == 0 else 0}
    given = q[mine], k[mine], lse[mine].astype("f8" if dtype == "float64" else "f4")
    bound = BOUND[dtype]

    mass = analysis.key_mass(*given, **options)
    assert np.abs(mass - p.sum(axis=0).T[mine]).max(initial=0) <= bound * max(1, n / 20)
    groups = np.arange(n) * 7 % 4 - 1
    grouped = analysis.key_mass(*given, groups=groups[mine], n_groups=3, **options)
    for group in range(3):
        want = p[groups == group].sum(axis=0).T[mine]
        assert np.abs(grouped[..., group] - want).max(initial=0) <= bound * max(1, n / 20)

    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log(p), axis=2)
        means = p @ np.arange(n) / p.sum(axis=2)
    assert np.abs(analysis.entropy(*given, **options) - entropy[mine]).max(initial=0) <= 10 * bound
    got = analysis.mean_position(*given, **options)
    assert (np.isnan(got) == np.isnan(means[mine])).all()
    assert np.nan_to_num(np.abs(got - means[mine])).max(initial=0) <= bound * max(1, n)

    for key_groups in (groups, np.minimum(np.arange(n) // 40, 2)):
        by_group = analysis.mass_by_group(*given, key_groups[mine], 3, **options)
        for group in range(3):
            want = p[mine][..., key_groups == group].sum(axis=2)
            assert np.abs(by_group[..., group] - want).max(initial=0) <= bound

    heaviest = analysis.top(*given[:2], 4, given[2], **options)
    want = np.pad(-np.sort(-p[mine], axis=2)[..., :4], [(0, 0), (0, 0), (0, max(0, 4 - n))])
    assert np.abs(heaviest.weights - want).max(initial=0) <= bound
    some = heaviest.positions >= 0
    assert (some.sum(axis=2) == np.minimum(seen[mine].sum(axis=2), 4)).all()
    at = np.take_along_axis(p[mine], np.where(some, heaviest.positions, 0), -1) if n else heaviest.weights
    assert np.abs(np.where(some, at - heaviest.weights, 0)).max(initial=0) <= bound

    most = np.where(see[:, None], x, -np.inf).max(axis=(0, 2), initial=-np.inf)
    got = analysis.max_score(*given[:2], **options)
    assert (np.isinf(got) == np.isinf(most)).all()
    finite = np.isfinite(most)
    assert np.abs(got[finite] - most[finite]).max(initial=0) <= 200 * bound

    chosen = np.random.default_rng(1).permutation(n)[:3]
    if n:
        weights = np.zeros((len(chosen), heads, n))
        for positions, piece in analysis.rows(*given, chosen, **options):
            weights[..., positions] = piece
        assert np.abs(comm.allreduce(weights) - p[chosen]).max(initial=0) <= bound


def sharded(comm, seed=0, n=60, batch=()):
    q, k, v = (np.broadcast_to(x, (*batch, *x.shape)) for x in random_qkv(seed, n, n, 4, 2, 16, 8, "float32"))
    q = q * (1 + np.arange(len(q)))[:, None, None, None].astype("f4") if batch else q
    mine = make_layout("striped", n, comm.size).positions(comm.rank)
    return (x[..., mine, :, :] for x in (q, k, v))


@pytest.mark.parametrize("masks", [[Mask(causal=True)] * 2, [Mask(causal=True), Mask(window=(9, 4), keys=41)]],
                         ids=["one", "two"])
def test_a_batch_is_its_elements(comm, masks):
    q, k, _ = sharded(comm, batch=(2,))
    common = {"comm": comm, "layout": "striped", "timeout": 60, "schedule": "ring"}
    options = common | {"mask": masks}
    _, lse = ring_attention(q, k, k, return_lse=True, **options)
    for i in range(2):
        alone = common | {"mask": masks[i]}
        one = q[i], k[i], lse[i]
        assert (analysis.key_mass(q, k, lse, **options)[i] == analysis.key_mass(*one, **alone)).all()
        assert (analysis.entropy(q, k, lse, **options)[i] == analysis.entropy(*one, **alone)).all()
        for both, single in zip(analysis.top(q, k, 3, lse, **options), analysis.top(*one[:2], 3, lse[i], **alone),
                               strict=True):
            assert (both[i] == single).all()
        assert (analysis.max_score(q, k, **options)[i] == analysis.max_score(*one[:2], **alone)).all()
        for (there, whole), (here, part) in zip(analysis.rows(q, k, lse, [5, 0], **options),
                                                analysis.rows(*one, [5, 0], **alone), strict=True):
            assert (there == here).all()
            assert (whole[i] == part).all()


def test_without_an_lse_it_is_reckoned(comm):
    """With sinks, of which the weights' sums fall short of 1."""
    q, k, v = sharded(comm)
    sinks = np.arange(4.0)
    options = {"comm": comm, "layout": "striped", "mask": Mask(window=9), "timeout": 60}
    _, lse = ring_attention(q, k, v, sinks=sinks, return_lse=True, **options)
    for function in (analysis.key_mass, analysis.entropy, analysis.mean_position):
        got = function(q, k, None, sinks=sinks, **options)
        assert np.allclose(got, function(q, k, lse, **options), rtol=1e-5, equal_nan=True)
    total = comm.allreduce(analysis.key_mass(q, k, lse, **options).sum(axis=0))
    assert (np.diff(total) < 0).all()                              # the larger a sink, the less is left
    assert (total < 60).all()
    left = comm.allreduce((1 - np.exp(sinks - lse.astype("f8"))).sum(axis=0))
    assert np.allclose(total, left, rtol=1e-5)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_queries_that_all_ranks_have(comm, backend):
    rng = np.random.default_rng(4)
    q, k, _ = random_qkv(4, 5, 60, 4, 2, 16, 8, "float32")
    mine = make_layout("uneven", 60, comm.size)
    p, _, lse = dense(q, k, visible(5, 60, causal=True), 0.25, {})
    given = q, k[mine.positions(comm.rank)], lse.astype("f4")
    options = {"comm": comm, "layout": "replicated", "kv_layout": mine, "mask": Mask(causal=True), "backend": backend,
               "timeout": 60}
    assert np.abs(analysis.key_mass(*given, **options) - p.sum(axis=0).T[mine.positions(comm.rank)]).max(
        initial=0) <= 1e-4
    by_group = analysis.mass_by_group(*given, mine.positions(comm.rank) % 2, 2, **options)
    assert np.abs(by_group[..., 1] - p[..., 1::2].sum(axis=2)).max() <= 1e-5
    heaviest = analysis.top(*given[:2], 3, given[2], **options)
    assert np.abs(heaviest.weights - -np.sort(-p)[..., :3]).max() <= 1e-5
    assert len(set(comm.allgather(b"".join(x.tobytes() for x in heaviest) + by_group.tobytes()))) == 1
    with pytest.raises(OptionError, match="queries and sinks, where all ranks have them"):
        analysis.key_mass(q, given[1], given[2] + (rng.random() if comm.rank == comm.size - 1 and comm.size > 1 else
                                                   _fail_alone(comm)), **options)


def test_keys_that_are_left_out_are_as_keys_that_are_not_there(comm):
    """Whatever they hold; with a batch, and an lse that is reckoned; queries that see nothing else have no keys."""
    q, k, v = sharded(comm, batch=(2,))
    positions = make_layout("striped", 60, comm.size).positions(comm.rank)
    bias = np.zeros((2, len(positions)), "f4")
    bias[0, positions < 20] = -np.inf
    spoilt = k.copy()
    spoilt[0, positions < 20] = np.nan
    options = {"comm": comm, "layout": "striped", "timeout": 60, "schedule": "ring"}
    biased = options | {"mask": Mask(causal=True), "key_bias": bias}
    masked = options | {"mask": [Mask(causal=True, key_mask=np.arange(60) >= 20), Mask(causal=True)]}
    for lse in (None, ring_attention(q, spoilt, np.nan_to_num(v), return_lse=True, **biased)[1]):
        for function in (analysis.key_mass, analysis.entropy, analysis.mean_position):
            assert np.allclose(function(q, spoilt, lse, **biased), function(q, k, None, **masked), rtol=1e-5,
                               equal_nan=True), function
        got, want = (analysis.top(q, x, 3, y, **z) for x, y, z in ((spoilt, lse, biased), (k, None, masked)))
        assert (got.positions == want.positions).all()
        assert np.allclose(got.weights, want.weights, rtol=1e-5)
        assert (got.positions[0, positions < 20] == -1).all()
    assert np.allclose(analysis.max_score(q, spoilt, **biased), analysis.max_score(q, k, **masked), rtol=1e-5)
    nothing = np.full((2, len(positions)), -np.inf)
    assert (analysis.max_score(q, spoilt, **biased | {"key_bias": nothing}) == -np.inf).all()
    for (_, some), (_, others) in zip(analysis.rows(q, spoilt, None, [5, 30], **biased),
                                      analysis.rows(q, k, None, [5, 30], **masked), strict=True):
        assert np.allclose(some, others, rtol=1e-5)
    if comm.size > 1:
        with pytest.raises(ShapeError, match="rank 1: expected the same key_bias"):
            analysis.entropy(q, k, None, **options, key_bias=bias if comm.rank == 0 else None)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_tables_of_a_grid(comm, backend):
    """With an lse that is reckoned: the tables are of the call, as the mask is."""
    mask = Grid((4, 6, 5), (1, 2, None), periodic=(False, True, True))
    n, rng = 120, np.random.default_rng(2)
    q, k, _ = random_qkv(2, n, n, 4, 2, 16, 1, "float64")
    tables = [rng.standard_normal((4, width)) for width in (3, 5, 9)]
    points = np.arange(n)
    away = distances(mask.shape, mask.periodic, points, points)
    see = near(mask.shape, list(mask.sides), mask.periodic, mask.edges, mask.causal)
    p, x, _ = dense(q, k, see, 0.25, {"relative": tables, "away": away})
    layout = make_layout("empty", n, comm.size)
    mine = layout.positions(comm.rank)
    options = {"comm": comm, "mask": mask, "layout": layout, "backend": backend, "timeout": 60, "relative": tables}
    given = q[mine], k[mine], None
    assert np.abs(analysis.key_mass(*given, **options) - p.sum(axis=0).T[mine]).max(initial=0) <= 1e-11
    by_group = analysis.mass_by_group(*given, mine % 3, 3, **options)
    for group in range(3):
        assert np.abs(by_group[..., group] - p[mine][..., group::3].sum(axis=2)).max(initial=0) <= 1e-12
    heaviest = analysis.top(*given[:2], 3, **options)
    assert np.abs(heaviest.weights - -np.sort(-p[mine], axis=2)[..., :3]).max(initial=0) <= 1e-12
    most = np.where(see[:, None], x, -np.inf).max(axis=(0, 2))
    assert np.abs(analysis.max_score(*given[:2], **options) - most).max() <= 1e-11
    weights = np.zeros((2, 4, n))
    for positions, piece in analysis.rows(*given, [7, 100], **options):
        weights[..., positions] = piece
    assert np.abs(comm.allreduce(weights) - p[[7, 100]]).max() <= 1e-12


def _fail_alone(comm):
    """On one rank there is nothing to differ from."""
    if comm.size == 1:
        raise OptionError("queries and sinks, where all ranks have them")
    return 0


def test_errors_are_the_same_on_all_ranks(comm):
    q, k, v = sharded(comm)
    options = {"comm": comm, "layout": "striped", "timeout": 60}
    _, lse = ring_attention(q, k, v, return_lse=True, **options)
    last = comm.rank == comm.size - 1
    groups = np.zeros(len(q), int)
    wrong = groups.copy()
    wrong[:1] = 9 if last else 0
    for kind, text, call in [
            (ShapeError, "lse: expected shape", lambda: analysis.key_mass(q, k, lse[:-1] if last else lse, **options)),
            (DtypeError, "lse: expected dtype", lambda: analysis.entropy(q, k, lse.astype("f8") if last else lse,
                                                                         **options)),
            (OptionError, "groups: expected numbers from 0 to 2, or -1 for none, got 9",
             lambda: analysis.key_mass(q, k, lse, groups=wrong, n_groups=3, **options)),
            (DtypeError, "groups: expected integers", lambda: analysis.mass_by_group(
                q, k, lse, groups + 0.5 if last else groups, 3, **options)),
            (ShapeError, "groups: expected shape", lambda: analysis.mass_by_group(
                q, k, lse, groups[:-1] if last else groups, 3, **options)),
            (OptionError, "n_groups: expected an integer", lambda: analysis.mass_by_group(q, k, lse, groups, 0,
                                                                                          **options)),
            (OptionError, "n_groups: expected groups too", lambda: analysis.key_mass(q, k, lse, n_groups=3, **options)),
            (OptionError, "got 18446744073709551615", lambda: analysis.key_mass(
                q, k, lse, groups=np.full(len(q), 2**64 - 1, "u8"), n_groups=3, **options)),
            (OptionError, "n: expected an integer >= 1 and < 2147483648",
             lambda: analysis.top(q, k, 2**40, lse, **options)),
            (OptionError, "n: expected an integer >= 1", lambda: analysis.top(q, k, 0, lse, **options)),
            (OptionError, "chosen: expected positions from 0 to 59, got 60",
             lambda: analysis.rows(q, k, lse, [3, 60], **options)),
            (OptionError, "chosen: expected positions of queries", lambda: analysis.rows(
                q, k, lse, [1.5] if last else [1], **options)),
            (OptionError, "order", lambda: analysis.entropy(q, k, lse, order="canonical", **options))]:
        with pytest.raises(kind, match=text) as error:
            call()
        assert len(set(comm.allgather(str(error.value)))) == 1
    with pytest.raises(ShapeError, match=r"relative: expected shape \(4, 2 reach \+ 1\)"):
        analysis.entropy(q, k, lse, relative=np.zeros((4, 4 if last else 5)), **options)
    if comm.size > 1:
        for call in (lambda: analysis.top(q, k, 2 + last, lse, **options),
                     lambda: analysis.entropy(q, k, lse, **options) if last else analysis.key_mass(q, k, lse,
                                                                                                   **options),
                     lambda: list(analysis.rows(q, k, lse, [1 + last], **options))):
            with pytest.raises(OptionError):
                call()
    assert np.isfinite(analysis.entropy(q, k, lse, **options)).all()          # the communicator is as good as before
