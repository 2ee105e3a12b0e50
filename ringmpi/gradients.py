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


class GradientsWithRelative(NamedTuple):
    """Those of q, k and v, and of a bias by distance: an array, or one for each axis of a grid."""

    dq: Array
    dk: Array
    dv: Array
    drelative: Array


class GradientsWithSinksAndRelative(NamedTuple):
    """Those of q, k and v, of the sinks and of a bias by distance."""

    dq: Array
    dk: Array
    dv: Array
    dsinks: Array
    drelative: Array


class GradientsWithBiasAndRelative(NamedTuple):
    """Those of q, k and v, of the bias of the keys and of a bias by distance."""

    dq: Array
    dk: Array
    dv: Array
    dkey_bias: Array
    drelative: Array


class GradientsWithAll(NamedTuple):
    """Those of q, k and v, of the sinks, of the bias of the keys and of a bias by distance."""

    dq: Array
    dk: Array
    dv: Array
    dsinks: Array
    dkey_bias: Array
    drelative: Array


AnyGradients = (Gradients | GradientsWithSinks | GradientsWithBias | GradientsWithSinksAndBias | GradientsWithRelative
                | GradientsWithSinksAndRelative | GradientsWithBiasAndRelative | GradientsWithAll)
_KINDS: dict[tuple[str, ...], Any] = {kind._fields: kind for kind in AnyGradients.__args__}


def named(of_inputs: tuple[Array, Array, Array | None], **others: Any) -> AnyGradients:
    """Name gradients of q, k and v, and of what else there is: those that are not None. Local."""
    given = {**dict(zip(Gradients._fields, of_inputs, strict=True)),
             **{name: x for name, x in others.items() if x is not None}}
    kind: AnyGradients = _KINDS[tuple(given)](*given.values())
    return kind
