"""What a backward pass gives: gradients by name, of those inputs that the call had.

Where values are the first numbers of keys, dv is None, for it is in those of dk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any                       # of NumPy, or of CuPy on a GPU


class Gradients(NamedTuple):
    """Gradients of q, k and v."""

    dq: Array
    dk: Array
    dv: Array


class GradientsWithSinks(NamedTuple):
    """Those of q, k and v, and of the sinks."""

    dq: Array
    dk: Array
    dv: Array
    dsinks: Array


class GradientsWithBias(NamedTuple):
    """Those of q, k and v, and of the bias of the keys."""

    dq: Array
    dk: Array
    dv: Array
    dkey_bias: Array


class GradientsWithSinksAndBias(NamedTuple):
    """Those of q, k and v, of the sinks and of the bias of the keys."""

    dq: Array
    dk: Array
    dv: Array
    dsinks: Array
    dkey_bias: Array


AnyGradients = Gradients | GradientsWithSinks | GradientsWithBias | GradientsWithSinksAndBias


def named(of_inputs: tuple[Array, Array, Array | None], dsinks: Array | None, dkey_bias: Array | None) -> AnyGradients:
    """Name gradients of q, k and v, and of what else there is. Local."""
    if dsinks is None:
        return Gradients(*of_inputs) if dkey_bias is None else GradientsWithBias(*of_inputs, dkey_bias)
    if dkey_bias is None:
        return GradientsWithSinks(*of_inputs, dsinks)
    return GradientsWithSinksAndBias(*of_inputs, dsinks, dkey_bias)
