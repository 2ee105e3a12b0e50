"""Numba's cache on disk, with a digest in each file: what is damaged is removed and made anew, never run or fatal."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile

DIGEST_BYTES = hashlib.sha256().digest_size
_warned: set[str] = set()


class KernelCache(FunctionCache):
    """The cache of one function.

    Raises
    ------
    RuntimeError
        If there is no folder to write to.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, f"{self._impl.filename_base}.checked",
                                  self._impl.locator.get_source_stamp())


class _Files(IndexDataCacheFile):
    """The index of a function and a file for each signature: a digest, then what it is of."""

    def load(self, key: Any) -> Any:
        """Give what was saved under a key; None if there is nothing, or nothing that can be used."""
        name = self._load_index().get(key)
        return None if name is None else _read(Path(self._data_path(name)))

    def _load_index(self) -> dict[Any, str]:
        version, stamp, names = _read(Path(self._index_path)) or ("", None, {})
        return names if (version, stamp) == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, (self._version, self._source_stamp, overloads))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _write(self, path: str, content: Any) -> None:
        body = self._dump(content)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(body).digest() + body)


def _read(path: Path) -> Any:
    """Read a file of the cache; None if it is not there, can't be read, or is damaged, and then it is removed."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        warn_once(f"the kernel cache can't be read, kernels are compiled anew: {error}; remove the file, or set "
                  "NUMBA_CACHE_DIR to another folder")
        return None
    digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() == digest:
        with suppress(Exception):         # of another version of this package: it names what is no longer there
            return pickle.loads(body)
    else:
        warn_once(f"the kernel cache is damaged, kernels are compiled anew: {path} was removed")
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return None


def warn_once(text: str) -> None:
    """Warn of something about the cache, of the same thing once in a process. Local."""
    subject = text.split(":")[0]
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(text, RuntimeWarning, stacklevel=3)
