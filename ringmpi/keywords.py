"""Keywords of other libraries that ours don't take: the error says what does the same here."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_DOCUMENTS = "mask=ringmpi.Mask(documents=offsets)"
_LSE = "return_lse=True"
_WEIGHTS = f"{_LSE}, and ringmpi.analysis for what the weights are: key_mass, rows, top, entropy"
OURS = {
    **dict.fromkeys(("causal", "is_causal"), "mask=ringmpi.Mask(causal=True)"),
    **dict.fromkeys(("window", "window_size", "sliding_window", "local_window_size"),
                    "mask=ringmpi.Mask(window=(left, right)), where None, not -1, is no limit"),
    **dict.fromkeys(("attn_mask", "attention_mask", "attn_bias", "block_mask", "mask_fn"),
                    "mask=ringmpi.Mask(...): causal, window, documents, spans, prefix and first, in any combination"),
    "key_padding_mask": "mask=ringmpi.Mask(key_mask=...), True for keys that may be seen, or Mask(keys=lengths)",
    **dict.fromkeys(("documents", "cu_seqlens", "cu_seqlens_k", "cu_seq_lens"), _DOCUMENTS),
    "cu_seqlens_q": f"{_DOCUMENTS}, and q_documents=offsets where the queries have others",
    **{name: f"mask=ringmpi.Mask({name}=...)" for name in
       ("prefix", "first", "q_offset", "spans", "prompts", "parents", "document_ids", "q_documents", "keys",
        "key_mask")},
    **dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k"), f"nothing: {_DOCUMENTS} is enough"),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "scale="),
    **dict.fromkeys(("soft_cap", "logits_soft_cap", "logit_softcapping", "attn_logit_softcapping"), "softcap="),
    **dict.fromkeys(("dropout_p", "p_dropout", "attention_dropout"), "dropout="),
    **dict.fromkeys(("alibi_slopes", "slopes"), "alibi="),
    **dict.fromkeys(("bias", "score_bias", "log_weights"), "key_bias=, in the call, a number for each key"),
    **dict.fromkeys(("relative_position_bias", "rel_pos_bias", "position_bias", "rpb"),
                    "relative=, in the call, a table by the distance of query and key"),
    **dict.fromkeys(("s_aux", "attn_sink", "attention_sinks"), "sinks=, in the call"),
    "return_softmax_lse": _LSE,
    **dict.fromkeys(("return_attn_probs", "return_softmax", "output_attentions", "need_weights"), _WEIGHTS),
    **dict.fromkeys(("enable_gqa", "num_key_value_groups"), "nothing: heads may be any multiple of kv_heads"),
    **dict.fromkeys(("group", "process_group", "cp_group", "sp_group", "ring_pg", "axis_name", "mesh"),
                    "comm=, an MPI communicator"),
    **dict.fromkeys(("num_threads", "n_threads"), "threads="),
    "striped": 'layout="striped"',
    "rng": "seed=, in the call",
}


def explained(takes_options_of: Callable[..., Any] | None = None) -> Callable[[Function], Function]:
    """Make a decorator: the `TypeError` about a keyword that a function does not take names the one that it does.

    Parameters
    ----------
    takes_options_of : callable, optional
        What the function's ``**options`` go to.
    """
    def decorate(function: Function) -> Function:
        known = _names(function) | (_names(takes_options_of) if takes_options_of else set())

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            if not known.issuperset(keywords):
                name = next(name for name in keywords if name not in known)
                raise TypeError(_explanation(function.__qualname__, name, known))
            return function(*arguments, **keywords)

        return cast(Function, checked)

    return decorate


def _names(function: Callable[..., Any]) -> set[str]:
    """Names that a function takes as keywords."""
    return {name for name, x in inspect.signature(function).parameters.items()
            if x.kind in (x.KEYWORD_ONLY, x.POSITIONAL_OR_KEYWORD) and name != "self"}


def _explanation(function: str, name: str, known: Iterable[str]) -> str:
    text = f"{function.removesuffix('.__init__').removesuffix('.__call__')} got an unexpected keyword argument {name!r}"
    if name in OURS:
        return f"{text}; here that is {OURS[name]}"
    close = difflib.get_close_matches(name, known, 1, 0.7)
    return f"{text}; did you mean {close[0]}=?" if close else f"{text}; it takes {', '.join(sorted(known))}"
