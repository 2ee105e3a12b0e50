"""What the parts of `gpu_first.py` share: answers that are written when they are known, the GPU, and the truth on it.

With EMULATED=1 in the environment everything is small and the GPU is the emulated one, to try the parts without a GPU.
"""

import functools
import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import oracle

from ringmpi import Mask, device
from ringmpi.dtypes import DTYPES

EMULATED = bool(os.environ.get("EMULATED"))
ROOT = Path(__file__).resolve().parents[1]
RESULTS = os.environ.get("RESULTS")


def say(**answer):
    """Write one answer, now: a line of JSON on standard output and at the end of the file $RESULTS."""
    line = json.dumps(answer, default=str).replace(f"{ROOT}/", "") + "\n"       # in one write: ranks must not mix
    sys.stdout.write(line)
    sys.stdout.flush()
    if RESULTS:
        with open(RESULTS, "ab", 0) as file:
            file.write(line.encode())


def attempt(part, case, check):
    """Run one check, which gives `ok` and what it found; a failure is an answer too. Whether it was right."""
    start = time.perf_counter()
    try:
        found = check()
    except BaseException as error:  # noqa: BLE001
        last = traceback.extract_tb(error.__traceback__)[-1]
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600],
                 "where": f"{Path(last.filename).name}:{last.lineno}: {last.line}"}
    say(part=part, case=case, **found, seconds=round(time.perf_counter() - start, 2))
    return bool(found["ok"])


def pretend():
    """Put an emulated GPU in the place of the first one, for all of the package."""
    from emulate import EmulatedDevice
    made = EmulatedDevice()
    made.uuid = f"GPU-emulated-{os.getpid()}"
    device.reason_missing = lambda: None
    device.count = lambda: 1
    device.describe = lambda: ["emulated"]
    device.view = lambda x: x
    device.index_of = lambda x: 0
    device.choose_early = lambda: None
    device.open_device = lambda index: made


@functools.cache
def backend():
    """Open the CUDA backend; RINGMPI_HOPPER says with which kernel."""
    from ringmpi.backends.cuda.backend import CudaBackend
    return CudaBackend(1, device.open_device(0))


def arrays(seed, dtype, *shapes):
    """Random arrays in one of the dtypes."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]) for shape in shapes]


def intervals(kind, n_q, n_k):
    """Which keys each query sees, by the name of a mask."""
    if kind == "random":
        rng = np.random.default_rng(5)
        begin = rng.integers(0, n_k + 1, n_q)
        return begin, np.maximum(begin, rng.integers(0, n_k + 1, n_q))
    options = {"full": {}, "causal": {"causal": True}, "window": {"window": (n_q // 3, 0)},
               "documents": {"documents": [0, n_k // 5, n_k // 5 + 1, n_k // 2, n_k]}}[kind]
    (begin, end), = Mask(**options).bounds(np.arange(n_q), n_q, n_k)
    return begin, end


def exact(q, k, v, begin, end, scale, dout=None):
    """Dense attention in float64, and its gradient where `dout` is given: by torch on the GPU, by NumPy without."""
    see = oracle.sees(begin, end, len(k))
    try:
        import torch
        on_gpu = torch.cuda.is_available() and not EMULATED
    except ImportError:
        on_gpu = False
    return exact_by_torch("cuda", q, k, v, see, scale, dout) if on_gpu else oracle.dense(q, k, v, see, scale, dout=dout)


def exact_by_torch(on, q, k, v, see, scale, dout):
    """Do as `oracle.dense` does, on a device of torch."""
    import torch
    group = q.shape[1] // k.shape[1]
    leaves = [torch.from_numpy(np.asarray(x, np.float64)).to(on).requires_grad_(dout is not None) for x in (q, k, v)]
    k, v = (x.repeat_interleave(group, dim=1) for x in leaves[1:])
    scores = torch.einsum("ihd,jhd->hij", leaves[0], k) * scale
    scores = scores.masked_fill(~torch.from_numpy(see).to(on), -torch.inf)
    lse = torch.logsumexp(scores, dim=2)
    weights = torch.exp(scores - torch.where(torch.isfinite(lse), lse, 0.0)[..., None])
    out = torch.einsum("hij,jhd->ihd", weights, v)
    found = {"out": out, "lse": lse.T}
    if dout is not None:
        grads = torch.autograd.grad(out, leaves, torch.from_numpy(np.asarray(dout, np.float64)).to(on))
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return {name: x.detach().cpu().numpy() for name, x in found.items()}


def errors_of(got, want, rows=slice(None)):
    """Largest errors by name, of gradients in units of the largest of all three: of few pairs one may cancel."""
    largest = max((np.abs(want[name]).max(initial=0.0) for name in ("dq", "dk", "dv") if name in want), default=None)
    return {name: oracle.error(x, want[name][rows], largest if name[0] == "d" else None) for name, x in got.items()}


def within(errors, bounds):
    """Give the answer: the errors, and the bounds of those that are beyond them."""
    beyond = {name: bounds[name] for name in errors if not errors[name] <= bounds[name]}
    return {"ok": not beyond, "errors": errors, **({"beyond": beyond} if beyond else {})}
