"""Which models of transformers may have their sequence split over ranks, and which may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import OptionError

NAME = "ringmpi"                # as attn_implementation
# Of text, in which tokens meet in attention alone, and all of whose attention goes through transformers' interface:
# those that the tests compare with one process.
TESTED = frozenset({"cohere2", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "gptj", "llama", "mistral",
                    "mixtral", "olmo2", "opt", "phi", "qwen2", "qwen2_moe", "qwen3", "stablelm"})
BY_LENGTH = {"dynamic", "longrope"}         # kinds of rotary positions that go by the longest position a model is given


def check_model(model: Any, untested: bool = False) -> None:
    """Raise `OptionError` if a model would be wrong, or may be, with its sequence split over ranks. Local.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    untested : bool
        Allow models that the tests do not have: compare with one process first.
    """
    config = model.config.get_text_config(decoder=True)
    kind = config.model_type
    if config._attn_implementation != NAME:
        raise OptionError(f'expected a model with attn_implementation="{NAME}", got one with '
                          f'"{config._attn_implementation}", whose attention would be among the tokens of each rank')
    if kind not in TESTED and not untested:
        raise OptionError(f'expected a model that the tests compare with one process, got model_type "{kind}"; tested '
                          f"are {', '.join(sorted(TESTED))}. Where tokens meet elsewhere too (in convolutions, states "
                          "or pooling), or positions are made otherwise, a split sequence is wrong without a word: "
                          "compare with one process, and then say untested=True")
    rotary = sorted(BY_LENGTH & set(_kinds(getattr(config, "rope_parameters", None))))
    if rotary:
        raise OptionError(f'expected rotary positions that go by the position alone, got "{rotary[0]}", which goes by '
                          "the longest that a rank has")
    if getattr(config, "output_router_logits", False):
        raise OptionError("expected output_router_logits=False, as the loss of the routers would be that of each "
                          "rank's tokens")


def _kinds(parameters: Any) -> list[str]:
    """Give the kinds of rotary positions in a configuration, which may have some for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    own = [parameters[name] for name in ("rope_type", "type") if isinstance(parameters.get(name), str)]
    return own + [kind for one in parameters.values() for kind in _kinds(one)]
