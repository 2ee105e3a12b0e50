"""`bench torch`: torch's own call over all ranks, beside a `RingAttention`; and a model that generates.

The drop-in gets tensors of shape (1, heads, tokens, dim), transposed views as a layer's projections are, and the peer
arrays of shape (tokens, heads, dim). The model is a Llama of transformers with random weights, whose cache is spread
over the ranks; beside it rank 0 alone generates with transformers' own cache and attention, with as many threads as all
ranks have together, while the others wait.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..attention import RingAttention
from ..checks import check_threads
from ..errors import BackendError
from ..mask import Mask
from ..mpi import comm as mpi
from ..mpi.world import comm_world
from .bench_cases import spread
from .bench_decode import in_turns


def measure_torch(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; give the rows of the table on rank 0, none elsewhere. Collective over COMM_WORLD.

    Raises
    ------
    BackendError
        If torch is not installed, or transformers where a model is to generate.
    """
    for name in ("torch", *(["transformers"] if arguments.generate else [])):
        if find_spec(name) is None:
            raise BackendError(f"bench torch: {name} is not installed; pip install 'ringmpi[{name}]'")
    import torch
    world = comm_world(arguments.timeout)
    comm = mpi.private_comm(world, arguments.timeout, exclusive=True)
    threads = check_threads(arguments.threads) or comm.threads
    torch.set_num_threads(threads)
    rows = [row for tokens in arguments.tokens for row in _measure_calls(world, comm, arguments, threads, tokens)]
    if arguments.generate:
        rows.append(_measure_generation(world, comm, arguments, threads))
    return rows if comm.rank == 0 else []


def _measure_calls(world: Any, comm: mpi.Comm, arguments: argparse.Namespace, threads: int, tokens: int
                   ) -> list[dict[str, Any]]:
    """Measure calls with so many tokens on each rank, without and with gradients. Collective over *comm*."""
    import torch

    from ..torch import scaled_dot_product_attention, sequence_parallel
    heads, kv_heads = arguments.heads
    rng = np.random.default_rng(comm.rank)
    arrays = [rng.standard_normal((tokens, many, arguments.dim), np.float32)
              for many in (heads, kv_heads, kv_heads, heads)]
    fixed = [torch.from_numpy(x)[None].transpose(1, 2) for x in arrays]
    leaves = [x.clone().requires_grad_() for x in fixed[:3]]
    options = {"threads": threads, "timeout": arguments.timeout,
               "layout": "striped" if arguments.causal else "contiguous"}
    with RingAttention(world, mask=Mask(causal=arguments.causal), **options) as attention, sequence_parallel(
            world, **options):
        def own() -> None:
            attention(*arrays[:3])
            attention.backward(arrays[3])

        def call(tensors: list[Any]) -> Any:
            q, k, v = tensors
            return scaled_dot_product_attention(q, k, v, is_causal=arguments.causal, enable_gqa=heads != kv_heads)

        passes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "forward": (lambda: call(fixed[:3]), lambda: attention(*arrays[:3], keep=False)),
            "forward and backward": (lambda: torch.autograd.grad(call(leaves), leaves, fixed[3]), own)}
        rows = []
        for name, (drop_in, peer) in passes.items():
            times = in_turns(comm, {"drop-in": drop_in, "peer": peer}, arguments.repeat, arguments.timeout)
            rows.append(_row(name, f"{tokens} tokens a rank", comm, threads, *times.values()))
    return rows


def _measure_generation(world: Any, comm: mpi.Comm, arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Measure a model that generates after a prompt, in milliseconds a token. Collective over *comm*."""
    import torch
    import transformers

    from ..torch import sequence_parallel
    from ..transformers import RingCache, register, shard
    register()
    heads, kv_heads = arguments.heads
    prompt = torch.arange(arguments.prompt)[None] % 64
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": arguments.generate,
                               "min_new_tokens": arguments.generate, "do_sample": False, "pad_token_id": 0}
    models = {}
    for name in ("ringmpi", "sdpa"):
        torch.manual_seed(0)
        models[name] = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
            vocab_size=64, hidden_size=heads * arguments.dim, intermediate_size=4 * heads * arguments.dim,
            num_hidden_layers=4, num_attention_heads=heads, num_key_value_heads=kv_heads, bos_token_id=None,
            eos_token_id=None), attn_implementation=name).eval()
    with torch.no_grad(), sequence_parallel(world, layout="striped", threads=threads,
                                            timeout=arguments.timeout) as sequence:
        def together() -> tuple[float, Any]:
            cache = RingCache(sequence, models["ringmpi"])
            models["ringmpi"](**shard(sequence, models["ringmpi"], input_ids=prompt[:, :-1]), cache=cache)
            comm.exchange("", arguments.timeout)
            start = time.perf_counter()
            text = models["ringmpi"].generate(prompt, cache=cache, **options)
            return time.perf_counter() - start, text

        def alone() -> tuple[float, Any]:
            if comm.rank:
                return 0.0, None
            torch.set_num_threads(threads * comm.size)
            cache = transformers.DynamicCache()
            models["sdpa"](prompt[:, :-1], cache=cache)
            start = time.perf_counter()
            text = models["sdpa"].generate(prompt, cache=cache, **options)
            torch.set_num_threads(threads)
            return time.perf_counter() - start, text

        times: tuple[list[float], list[float]] = ([], [])
        same = True
        for turn in range(arguments.repeat + 1):
            for mine, run in zip(times, (together, alone), strict=True):
                seconds, text = run()
                seconds = float(comm.allgather([seconds], arguments.timeout).max())
                if turn:
                    mine.append(seconds / arguments.generate)
                if run is together:
                    expected = text
                elif comm.rank == 0:
                    same = same and torch.equal(text, expected)
    row = _row("generate", f"a token after {arguments.prompt}", comm, threads, *times)
    return {**row, "same text": same}


def _row(name: str, size: str, comm: mpi.Comm, threads: int, times: list[float], peers: list[float]) -> dict[str, Any]:
    """Give a row of the table."""
    seconds, peer = statistics.median(times), statistics.median(peers)
    return {"what": name, "size": size, "ranks": comm.size, "threads": threads, "ms": 1e3 * seconds,
            "spread": spread(times, seconds), "peer ms": 1e3 * peer, "peer spread": spread(peers, peer),
            "ratio": peer / seconds, "same text": None}
