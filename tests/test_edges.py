"""The library's edges in one process: keywords of other libraries, copies, what a closed backend keeps, threads."""

import copy
import pickle
import subprocess
import sys
from inspect import signature

import numpy as np
import pytest

from ringmpi import RingAttention, ring_attention, ring_attention_backward
from ringmpi.backends import open_backend
from ringmpi.keywords import OURS
from ringmpi.score import Score
from ringmpi.softmax import State

Q = np.ones((4, 2, 8), "f4")


@pytest.fixture
def alone():
    from mpi4py import MPI
    return MPI.COMM_SELF


@pytest.mark.parametrize(("name", "ours"), [
    ("causal", r"mask=ringmpi\.Mask\(causal=True\)"), ("is_causal", r"mask=ringmpi\.Mask\(causal=True\)"),
    ("softmax_scale", "here that is scale="), ("window_size", r"Mask\(window=\(left, right\)\)"),
    ("dropout_p", "dropout="), ("cu_seqlens", "documents=offsets"), ("attn_mask", "prefix and first"),
    ("cu_seqlens_q", "q_documents=offsets"), ("document_ids", r"Mask\(document_ids="),
    ("backends", "did you mean backend="), ("colour", "it takes accumulator, alibi, ")])
def test_keywords_of_others_are_answered_with_ours(alone, name, ours):
    match = rf"got an unexpected keyword argument '{name}'.*{ours}"
    with pytest.raises(TypeError, match=f"^RingAttention {match}"):
        RingAttention(alone, **{name: True})
    with pytest.raises(TypeError, match=f"^ring_attention {match}"):
        ring_attention(Q, Q, Q, comm=alone, **{name: True})
    with pytest.raises(TypeError, match=f"^ring_attention_backward {match}"):
        ring_attention_backward(Q, Q, Q, Q, Q, Q, comm=alone, **{name: True})


def test_keywords_of_a_call_too(alone):
    with RingAttention(alone, backend="numpy") as attention, \
            pytest.raises(TypeError, match=r"RingAttention got .* 'is_causal'; here that is mask=ringmpi"):
        attention(Q, Q, Q, is_causal=True)


def test_no_keyword_of_ours_is_said_to_be_another_s():
    for function in (RingAttention, RingAttention.__call__, ring_attention):
        assert not OURS.keys() & signature(function).parameters.keys()


def test_a_copy_is_the_object_and_a_pickle_says_why_not(alone):
    with RingAttention(alone, backend="numpy") as attention:
        assert copy.copy(attention) is attention
        assert copy.deepcopy({"layer": [attention]})["layer"][0] is attention
        for protocol in (2, pickle.HIGHEST_PROTOCOL):
            with pytest.raises(TypeError, match=r"a RingAttention can't be pickled: .*state_dict\(\)"):
                pickle.dumps(attention, protocol)


def test_a_closed_numba_backend_keeps_no_work_space():
    backend, one = open_backend("numba", 2), np.ones(300, np.int64)
    x = np.ones((300, 2, 8), "f4")
    sum(backend.accumulate(State.empty(300, 2, 8, "f4"), x, x, x, 0 * one, one, Score(1.0)))
    gradient = backend.new_gradient(x, x, x[..., 0].copy(), None, np.zeros_like(x))
    sum(backend.backward(gradient, x, x, x, np.zeros_like(x), np.zeros_like(x), 0 * one, one, Score(1.0)))
    assert backend._scratch
    assert backend._packed
    assert backend._buffers
    backend.close()
    assert not any((backend._scratch, backend._packed, backend._buffers))
    with pytest.raises(RuntimeError, match="this backend is closed"):
        sum(backend.accumulate(State.empty(300, 2, 8, "f4"), x, x, x, 0 * one, one, Score(1.0)))
    assert not any((backend._scratch, backend._packed, backend._buffers))


@pytest.mark.parametrize("level", ["funneled", "serialized"])
def test_another_thread_needs_an_mpi_that_allows_it(level):
    code = f"""
import mpi4py, threading
mpi4py.rc.thread_level = {level!r}
import numpy as np, ringmpi
from mpi4py import MPI
x, said = np.ones((2, 1, 4), "f4"), []
attention = ringmpi.RingAttention(MPI.COMM_WORLD, backend="numpy")
attention(x, x, x)
def call(function, *arguments, **options):
    try:
        function(*arguments, **options)
        said.append("done")
    except Exception as error:
        said.append(f"{{type(error).__name__}}: {{error}}")
def move():
    ringmpi.redistribute(x, comm=MPI.COMM_WORLD)
for work in ((attention.backward, x), (attention, x, x, x), (ringmpi.RingAttention, MPI.COMM_WORLD), (move,)):
    thread = threading.Thread(target=call, args=work, name="autograd")
    thread.start()
    thread.join()
print(*said, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        if level == "serialized":
            assert line == "done"
        else:
            assert line.startswith("CommError: MPI was initialised with MPI_THREAD_FUNNELED")
            assert "thread 'autograd'" in line
            assert "MPI_THREAD_SERIALIZED" in line
