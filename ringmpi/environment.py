"""The only module that reads environment variables and asks the operating system about this process."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import shlex
import sys
from pathlib import Path

from .errors import LaunchError

LAUNCHERS = ("mpiexec", "mpirun", "prterun", "orterun")
# Variables in which launchers say how many processes they started, and which of them this one is.
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
# Slurm's comes last: an mpiexec in a batch script inherits that of the script.
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "PMI_LOCAL_RANK",
               "SLURM_LOCALID")
GPU_TRANSPORT = "RINGMPI_GPU_TRANSPORT"
HOPPER = "RINGMPI_HOPPER"
BFLOAT16_PRODUCTS = "RINGMPI_BFLOAT16_PRODUCTS"
CPU_TILES = "RINGMPI_CPU_TILES"
RATES = "RINGMPI_RATES"
FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"


def launched_sizes() -> dict[str, int]:
    """Give the number of ranks, by the name of each variable in which the launcher set it. Local.

    An mpiexec in a batch script starts ranks through a step of Slurm's with one task for each node: what Slurm says
    does not count where an mpiexec has spoken.
    """
    sizes = {name: int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdigit()}
    inner = {name: size for name, size in sizes.items() if not name.startswith("SLURM")}
    return inner or sizes


def launched_together() -> bool:
    """Say whether this process is one of several that a launcher started; Slurm's batch script is not. Local."""
    return any(size > 1 for name, size in launched_sizes().items() if name != "SLURM_NTASKS")


def launched_rank() -> int:
    """Give the rank that the launcher gave this process; 0 without a launcher. Local."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def launched_nodes() -> int:
    """Give the number of nodes that Slurm says the job has; 1 without Slurm. Local."""
    said = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"))
    return next((int(text) for text in said if text.isdigit() and int(text)), 1)


def fault_tolerant() -> bool:
    """Say whether Open MPI's mpiexec was told to keep a job alive whose ranks die, ``--with-ft ulfm``. Local."""
    return os.environ.get(FAULT_TOLERANCE, "").strip() == "1"


def launched_local_rank() -> int | None:
    """Give this process's rank on its node as the launcher set it; None if it did not. Local."""
    return next((int(os.environ[name]) for name in LOCAL_RANKS if os.environ.get(name, "").isdigit()), None)


def gpu_transport() -> str:
    """Give RINGMPI_GPU_TRANSPORT, how K and V travel from GPU to GPU; empty if not set. Local."""
    return os.environ.get(GPU_TRANSPORT, "").strip()


def hopper_kernel() -> bool:
    """Say whether the kernel that is for Hopper GPUs only may be used: unless RINGMPI_HOPPER is 0 or off. Local."""
    return os.environ.get(HOPPER, "").strip().lower() not in ("0", "off")


def bfloat16_products() -> str:
    """Give RINGMPI_BFLOAT16_PRODUCTS, how CPUs multiply bfloat16; empty if not set. Local."""
    return os.environ.get(BFLOAT16_PRODUCTS, "").strip()


def cpu_tiles() -> bool:
    """Say whether the CPU's tiles may be used: unless RINGMPI_CPU_TILES is 0 or off. Local."""
    return os.environ.get(CPU_TILES, "").strip().lower() not in ("0", "off")


def request_tiles() -> str:
    """Ask Linux for the CPU's tiles, for this process and its forks; say why it has none, empty if it has. Local."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "tiles are asked for on Linux on x86-64 only"
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(arch_prctl, request_permission, tile_data):
        return f"Linux refuses the CPU's tiles to this process: {os.strerror(ctypes.get_errno())}"
    return ""


def rates_file() -> Path | None:
    """Give RINGMPI_RATES, the file of the rates of this machine; by default one in the user's cache folder. Local.

    None if it is not set and the user has no home folder, as in some containers.
    """
    asked = os.environ.get(RATES, "").strip()
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if asked or os.path.isabs(folder):
        return Path(asked or os.path.join(folder, "ringmpi", "rates.json"))
    return None


def kernel_cache() -> Path:
    """Give the folder where CuPy caches kernels, and this package those that it compiles without CuPy. Local."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache"))     # as CuPy finds it


def mpi_gpu_switches() -> dict[str, str]:
    """Give the variables that make Cray's and Intel's MPI accept GPU memory; empty where not set. Local."""
    return {name: os.environ.get(name, "").strip().lower()
            for name in ("MPICH_GPU_SUPPORT_ENABLED", "I_MPI_OFFLOAD", "I_MPI_OFFLOAD_MODE")}


def debian_mpich() -> str:
    """Give the path of the MPICH that Debian and Ubuntu install; empty if it is not installed. Local."""
    return next((str(path) for path in sorted(Path("/usr/lib").glob("*/libmpich.so.12"))), "")


def virtual_prefix() -> str | None:
    """Give HDF5_VDS_PREFIX, the folder in which HDF5 looks for the sources of virtual datasets. Local."""
    return os.environ.get("HDF5_VDS_PREFIX")


def boot_id() -> str:
    """Give the kernel's boot id, which tells machines of the same name apart; empty if there is none. Local."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def affinity() -> set[int]:
    """Give the cores that this thread may run on. Local."""
    return os.sched_getaffinity(0)


def most_threads() -> int:
    """Give the number of threads beyond which a request must be a mistake: four for each core. Local."""
    return max(64, 4 * (os.cpu_count() or 1))


def set_affinity(cores: set[int]) -> None:
    """Let this thread, and the threads it starts, run on `cores` only. Local."""
    os.sched_setaffinity(0, cores)


@functools.cache
def cache_bytes(level: int) -> int:
    """Give the size in bytes of a core's data cache of `level`; a modest guess if the system does not say. Local."""
    try:
        for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
            if (index / "level").read_text().strip() == str(level) and "I" not in (index / "type").read_text():
                return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        pass
    return {1: 2**15, 2: 2**18}.get(level, 2**20)


def vector_bytes() -> int:
    """Give the width in bytes of this CPU's vectors, by the flags that the kernel lists; 16 if unknown. Local."""
    flags = _cpu_info("flags").split()
    return 64 if "avx512f" in flags else 32 if "avx2" in flags else 16


def cycles_per_second() -> float:
    """Give this CPU's frequency in Hz if the kernel knows it; else a usual one. Local."""
    try:
        return float(_cpu_info("cpu MHz")) * 1e6
    except ValueError:
        return 2.5e9


def _cpu_info(name: str) -> str:
    """Read a field of the first core in /proc/cpuinfo; empty if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split("\t")[0] == name), "")


def resident_bytes(peak: bool = False) -> int:
    """Give the resident memory of this process in bytes, now or at its `peak`. Local."""
    said = _status_bytes("VmHWM:" if peak else "VmRSS:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if said is None else said


def node_memory() -> tuple[int, str]:
    """Give the bytes that all ranks of this job may take on this node, and who says so. Local.

    What Slurm gives the job here, if its variables say; else all that the node has.
    """
    return slurm_memory() or (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "its memory")


def shared_bytes() -> int:
    """Give the bytes of this process's resident memory that are of files: processes of a node share them. Local."""
    return _status_bytes("RssFile:") or 0


def _status_bytes(field: str) -> int | None:
    """Read a field of what the kernel says of this process; None if it says nothing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def slurm_memory() -> tuple[int, str] | None:
    """Give the bytes that Slurm gives this job on this node, and the variables that say so; None if none do. Local."""
    for name, count in (("SLURM_MEM_PER_NODE", ""), ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
                        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE")):
        each = os.environ.get(name, "")
        number = os.environ.get(count, "") if count else "1"
        if each.isdigit() and number.isdigit() and int(each) * int(number):          # --mem=0 is all of the node
            return int(each) * int(number) * 2**20, f"{name}={each}" + (f", {count}={number}" if count else "")
    return None


def stderr_is_terminal() -> bool:
    """Say whether standard error ends up on a terminal, be it through the pipe of an mpiexec. Local."""
    return sys.stderr.isatty() or any(link.startswith(("/dev/pts/", "/dev/tty")) for link in _launcher_error())


def _launcher_error(depth: int = 4) -> list[str]:
    """Say where the standard error of the mpiexec above this process goes; empty if none is found."""
    process = os.getppid()
    try:
        for _ in range(depth):
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
            if status["Name"].startswith(LAUNCHERS):
                return [os.readlink(f"/proc/{process}/fd/2")]
            process = int(status["PPid"])
    except (OSError, KeyError, ValueError):       # no such process, or not ours to read
        pass
    return []


def require_single_process(command: str) -> None:
    """Raise `LaunchError` if a launcher started several processes of a command that runs in one. Local."""
    for name, size in launched_sizes().items():
        if size > 1 and name != "SLURM_NTASKS":       # set in a batch script too, outside srun
            raise LaunchError(f"{command} runs in one process, got {size} ({name}); start it without mpiexec or srun")


def command_line() -> str:
    """Give the command line as typed, for records. Local."""
    return shlex.join(["ringmpi", *sys.argv[1:]])
