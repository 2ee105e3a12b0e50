"""What a GPU is asked first, part by part; `gpu_first.sh` asks all of them, each with a time limit of its own.

    python tests/gpu_first.py about                 the card, the driver, what is installed
    python tests/gpu_first.py prove                 every kernel on its self-tests, side by side
    python tests/gpu_first.py masks                 masks and biases, forward and backward, against float64
    python tests/gpu_first.py long                  sampled rows of 16384 tokens; the same bits in four runs
    python tests/gpu_first.py speed NAME            beside torch in the same process: see `QUESTIONS` of gpu_speed.py
    python tests/gpu_first.py library               torch's kernels, where ours leave gradients to them
    python tests/gpu_first.py dlpack                arrays of torch and JAX
    mpiexec -n 2 python tests/gpu_first.py ranks    two ranks that share the GPU
    mpiexec -n 2 python tests/gpu_first.py ring     their seconds beside those of one rank with all the work
    python tests/gpu_first.py proof DTYPE DIM DIM_V plain|functions|bias|relative|several forward|backward

RINGMPI_HOPPER says whether the parts about kernels are about that for Hopper. Each answer is a line of JSON, written
when it is known. These are no tests of pytest: a part that fails, or hangs, must not take the others with it.
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))             # a checkout that is not installed; in front of one that is
PARTS = {"about": "gpu_card", "prove": "gpu_right", "proof": "gpu_right", "masks": "gpu_right", "long": "gpu_right",
         "speed": "gpu_speed", "ring": "gpu_speed", "library": "gpu_library", "ranks": "gpu_arrays",
         "dlpack": "gpu_arrays"}
OF_EITHER_KERNEL = ("prove", "masks", "long")


def main(part, *arguments):
    """Ask; the exit code says whether that could be done, and of a proof whether it held."""
    import gpu_answers

    from ringmpi import device
    from ringmpi.environment import hopper_kernel
    if gpu_answers.EMULATED:
        gpu_answers.pretend()
    reason = None if part == "about" else device.reason_missing()
    try:
        work = getattr(importlib.import_module(PARTS[part]), part)
    except ImportError as error:
        reason = reason or str(error)
    if reason:
        gpu_answers.say(part=part, case=" ".join(arguments), ok=False, error=reason)
        return 1
    if part in OF_EITHER_KERNEL:
        arguments = (hopper_kernel(),)
    return int(work(*arguments) is False)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
