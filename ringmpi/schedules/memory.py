"""The arrays and buffers of a rank in a forward pass, in bytes, from the sizes alone."""

from __future__ import annotations

from .movers import carrier_class
from .spec import Schedule
from .traffic import Shape, kv_heads_inside


def arrays(shape: Shape, schedule: Schedule, on_gpu: bool) -> dict[str, int]:
    """Give the bytes of what the rank with most tokens has where it computes, with any backend. Local.

    What a backend needs for itself comes on top: see `Backend.scratch_bytes`.
    """
    ranks = schedule.ranks
    n_q = shape.most_q or (shape.n_q if shape.replicated else -(-shape.n_q // ranks))
    n_k = shape.most_k or -(-shape.n_k // ranks)
    rows, keys = shape.batch * n_q * shape.heads, shape.batch * n_k * shape.kv_heads
    q, out, lse = rows * shape.dim * shape.item, rows * shape.dim_v * shape.item, rows * shape.wide
    acc = rows * shape.dim_v * shape.wide
    kv = keys * shape.key_width * shape.item
    sharing = 1 if shape.replicated else schedule.queries
    inside = kv * schedule.heads * kv_heads_inside(shape, schedule.heads).most // shape.kv_heads    # some have several
    bias = shape.batch * n_k * shape.wide * shape.bias
    inside += bias * schedule.heads // (1 if shape.bias == 1 else schedule.heads)
    buffers = carrier_class(schedule.carrier).buffer_blocks(schedule.keys, on_gpu)
    sizes = {
        "q": q,
        "k": keys * shape.dim * shape.item,
        "v": keys * (shape.key_width - shape.dim) * shape.item,
        **({"key_bias": bias} if bias else {}),
        "out": out,
        "lse": lse,
        "acc": sharing * acc,
        "max and sum": sharing * 2 * lse,
        "K/V buffers": buffers * inside,
    }
    if sharing > 1:                              # the rows, and what is packed and received: queries, then states
        sizes["queries of others"] = 2 * sharing * q + 2 * (sharing - 1) * (acc + 2 * lse)
    if shape.replicated:                         # the states of all ranks
        sizes["states of others"] = (ranks + 2) * (acc + 2 * lse)
    if schedule.heads > 1:                       # by heads, and what is packed and received
        sizes["exchange of heads"] = 3 * (q + inside) + out + lse
    if shape.canonical and ranks > 1:            # keys in whole tiles: what is packed, received and put in order
        sizes["K/V in tiles"] = 3 * (kv + bias)
    return sizes
