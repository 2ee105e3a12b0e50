"""Pictures of what jobs did, and of masks and layouts; by matplotlib, which no job needs."""

from importlib.util import find_spec

from ..errors import BackendError


def check_pictures(option: str) -> None:
    """Raise `BackendError`, naming the option or command that wants pictures, unless they can be drawn. Local."""
    if find_spec("matplotlib") is None:
        raise BackendError(f"{option}: matplotlib is not installed; pip install 'ringmpi[plot]'")
