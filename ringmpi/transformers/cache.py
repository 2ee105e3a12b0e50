"""A cache of transformers whose keys and values are spread over the ranks."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, get_layer_types_and_kwargs

from ..errors import OptionError
from ..kv.cache import KVCache
from ..mask import Mask
from ..torch import SequenceParallel
from ..torch.function import on_host, plain, tensor_of
from ..torch.sequence import Scores
from .models import check_model
from .tokens import Known

OPTIONS = ("accumulator", "backend", "threads", "timeout", "allow_gpu_sharing")      # that a KVCache takes too
NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_pending: list[tuple[weakref.ref[Tensor], RingLayer]] = []      # the keys that a layer has just given, and the layer


class RingLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer's keys and values, spread over the ranks; its attention is `attend`.

    Parameters
    ----------
    sequence : SequenceParallel
    window : int, optional
        Tokens that a query sees, itself among them; None: all.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(self, sequence: SequenceParallel, window: int | None) -> None:
        super().__init__()
        self.is_sliding = window is not None
        self._sequence = sequence
        self._window = window
        self._cache: KVCache | None = None
        self._made_for: tuple[Any, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first attention says what there is to make. Local."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens; their attention, which comes next, appends them. Local."""
        _pending[:] = [(weakref.ref(key_states), self)]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, known: Known, scores: Scores, sinks: Tensor | None
               ) -> Tensor:
        """Append tokens and attend to all. Collective over *comm*.

        Parameters
        ----------
        query, key, value : tensors of shape (batch, heads, tokens, dim)
            Of new tokens: the same on all ranks, or each rank's own.
        known : Known
        scores : Scores
        sinks : tensor of shape (heads,), optional

        Returns
        -------
        tensor of shape (batch, tokens, heads, dim_v)
        """
        wrong = self._find_wrong(query, key, value, known, scores)
        if wrong:
            self._sequence.refuse(OptionError(wrong))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        cache = self._open(k, v, scores)
        arrays = [plain(x, name) for name, x in (("q", q), ("k", k), ("v", v))]
        if known.replicated or self._sequence.size == 1:
            return tensor_of(cache.attend(*arrays, sinks=on_host(sinks, "sinks")))
        layout = self._sequence.layout
        cache.append(*arrays[1:], layout=layout)
        return tensor_of(cache.attend(arrays[0], sharded=True, layout=layout, sinks=on_host(sinks, "sinks")))

    def _find_wrong(self, query: Tensor, key: Tensor, value: Tensor, known: Known, scores: Scores) -> str:
        """Say what a cache can't do, or does not fit what it has."""
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return "RingCache: expected no gradients, as a cache has none; call the model within torch.no_grad()"
        if scores.dropout:
            return "RingCache: expected no dropout; call model.eval()"
        window = None if self._window is None else self._window - 1
        if not known.plain or known.structure != (True, (window, None), 0):
            said = known.structure if known.plain else "padding or packed documents"
            wanted = "a causal mask" if window is None else f"a causal mask with a window of {self._window}"
            return f"RingCache: expected {wanted}, and elements of one length, got {said}"
        if known.first != self.get_seq_length():
            return f"position_ids: expected {self.get_seq_length()}, after the tokens in the cache, got {known.first}"
        made_for = (key.shape[0], key.shape[1], key.shape[3], value.shape[3], key.dtype, scores.scale, scores.softcap)
        if self._cache is not None and made_for != self._made_for:
            return (f"RingCache: expected (batch, kv_heads, dim, dim_v, dtype, scale, softcap) {self._made_for}, as "
                    f"before, got {made_for}")
        self._made_for = made_for
        return ""

    def _open(self, k: Tensor, v: Tensor, scores: Scores) -> KVCache:
        """Give the cache; make it for the first tokens. Collective over *comm* then."""
        if self._cache is None:
            sequence = self._sequence
            options = {name: sequence.options[name] for name in OPTIONS if name in sequence.options}
            if k.is_cuda:
                options.setdefault("backend", "cuda")
            self._cache = KVCache(sequence.comm, batch=k.shape[0], kv_heads=k.shape[2], dim=k.shape[3],
                                  dim_v=v.shape[3], dtype=NAMES.get(k.dtype, str(k.dtype)), scale=scores.scale,
                                  softcap=scores.softcap, mask=Mask(causal=True, window=None if self._window is None
                                                                    else (self._window - 1, None)), **options)
        return self._cache

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give how many keys there will be, and the position of the first. Local."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Give the tokens on all ranks. Local."""
        return 0 if self._cache is None else self._cache.length

    def get_max_length(self) -> int:
        """Give -1: there is no bound. Local."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, ``-tokens_to_remove`` of them. Local; the same on every rank."""
        if tokens_to_remove > 0:
            raise OptionError(f"RingCache: expected a number of tokens to remove, negative, got {tokens_to_remove}")
        if self._cache is not None and tokens_to_remove:
            self._cache.crop(self._cache.length - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let elements of the batch go on from others, as in beam search. Local; the same on every rank."""
        if self._cache is not None:
            self._cache.reorder(beam_idx.cpu().numpy())

    def reset(self) -> None:
        """Forget all tokens. Local; the same on every rank."""
        if self._cache is not None:
            self._cache.close()
        self._cache = None

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refuse: elements of a batch that is there stay as many as they are."""
        raise OptionError("RingCache: expected a batch that stays as it is; repeat the prompt instead")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Refuse, as `batch_repeat_interleave`."""
        self.batch_repeat_interleave(1)

    def offload(self) -> None:
        """Do nothing: what is spread over ranks stays where it is. Local."""

    def prefetch(self) -> None:
        """Do nothing, as `offload`. Local."""


class RingCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers, spread over the ranks: for ``model.generate(..., cache=...)``. Local.

    Within `sequence_parallel`, on all its ranks: `generate` runs alike on all of them, on the same tokens, and each
    keeps its share of the keys (`ringmpi.KVCache`). A long prompt may go in before, split over the ranks:
    ``model(**ringmpi.transformers.shard(sequence, model, input_ids=prompt), cache=cache)``, without gradients;
    `generate` then gets it whole, and computes with what the cache has not seen.

    Parameters
    ----------
    sequence : SequenceParallel
    model : transformers.PreTrainedModel
        That says how many layers it has, and which see a window.
    untested : bool
        See `shard`.

    Raises
    ------
    OptionError
        If a layer is neither of full attention nor of a sliding window, or the model can't be split; see `shard`.
    """

    def __init__(self, sequence: SequenceParallel, model: Any, untested: bool = False) -> None:
        check_model(model, untested)
        kinds, options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        odd = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if odd:
            raise OptionError(f"RingCache: expected layers of full or sliding attention, got {', '.join(odd)}")
        super().__init__(layers=[RingLayer(sequence, some.get("sliding_window")) for some in options])


def pending(key: Tensor) -> RingLayer | None:
    """Give the layer that has just given these keys, if one has. Local.

    Raises
    ------
    OptionError
        If a model has changed them on their way to its attention, which a cache of its own would not know.
    """
    for reference, layer in _pending:
        _pending.clear()
        if reference() is key:
            return layer
        raise OptionError("RingCache: expected the keys that the cache has given to come to the attention as they are, "
                          "got others; this model can't have one")
    return None
