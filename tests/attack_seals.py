"""Texts that say other things under a right digest, by numbered seeds, and rates, which have no digest.

The manifest of an OUT.h5, the rows of a result in one file, the description of a cache. What they say may be believed
if it makes sense, but the numbers that are shown are right, or it is refused.
"""

import hashlib
import json
import random
from pathlib import Path

from attack_cases import OTHER, REFUSED, RIGHT, Case, arrays, in_child, verdict
from attack_mutations import SEEDS, _cache, _outcome, _output, _read_cache, _read_single, _single, mutated

ODD = (-1, 0, 1, 3, 2**31, 2**63, 2**70, 1e308, 0.5, float("nan"), True, None, "", "x", "../x", "/etc/hostname",
       "a/b/c.h5", [], {}, [1])


def other_text(whole, seed):
    """Damage bytes, or put an odd value in the place of one of those in JSON, or away with it."""
    chance = random.Random(seed)
    if chance.random() < 0.3:
        return mutated(whole, seed)
    content = json.loads(whole)
    places = [(inside, key) for inside in tables(content) for key in (inside if isinstance(inside, dict) else
                                                                     range(len(inside)))]
    inside, key = chance.choice(places)
    if chance.random() < 0.1:
        del inside[key]
    else:
        inside[key] = chance.choice((*ODD, [inside[key]] * 2))
    return json.dumps(content).encode()


def tables(content):
    """Every table and list in JSON."""
    if isinstance(content, (dict, list)):
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from tables(value)


def resealed(path, name, seed):
    """Put another text in the place of one that is sealed, with its digest."""
    import h5py
    import numpy as np
    with h5py.File(path, "r+") as file:
        text = other_text(bytes(file[name][()]), seed).rstrip(b"\0")          # HDF5 strips them
        del file[name]
        file[name] = np.bytes_(text)
        file.attrs[f"{name}_sha256"] = np.bytes_(hashlib.sha256(text).hexdigest())


def seals(folder, seeds=SEEDS):
    """What a file says of itself is another thing: what it shows is right, or it is refused."""
    (folder / "out").mkdir()
    out, _ = _output(Path(folder) / "out")
    shown = arrays(out)
    single, cache = Path(folder) / "single.h5", Path(folder) / "cache.h5"
    rows, blocks = _single(single, "together")[1:], _cache(cache)[1:]
    kinds = (("manifest", out, lambda: verdict(out, shown), None),
             ("rows", single, lambda: numbers(_read_single(single)), rows),
             ("cache", cache, lambda: numbers(_read_cache(cache)), blocks))
    whole = {path: path.read_bytes() for _, path, _, _ in kinds}
    for seed in seeds:
        name, path, read, right = kinds[seed % len(kinds)]
        resealed(path, name, seed)
        outcome = in_child(lambda read=read, right=right: _outcome(read, right))
        path.write_bytes(whole[path])
        yield Case(f"seed {seed}", f"{name}: {outcome}", "" if outcome in (REFUSED, RIGHT) else outcome)


def numbers(found):
    """What was read, without what the file says of it."""
    return found if isinstance(found, str) else found[1:]


def rates(folder, seeds=SEEDS):
    """The rates of a machine: they are read, or refused; wrong ones cost time and no result."""
    from ringmpi.schedules.rates import CPU
    path = Path(folder) / "rates.json"
    CPU.save(path)
    whole = path.read_bytes()
    for seed in seeds:
        path.write_bytes(other_text(whole, seed))
        outcome = in_child(lambda: _outcome(lambda: _read_rates(path), CPU))
        yield Case(f"seed {seed}", f"rates: {outcome}", "" if outcome in (REFUSED, RIGHT, OTHER) else outcome)


def _read_rates(path):
    from ringmpi.errors import OptionError
    from ringmpi.schedules.rates import Rates
    try:
        return Rates.load(path)
    except OptionError:
        return REFUSED
