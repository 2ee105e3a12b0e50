"""Files of jobs in a line each: random inputs, arrays as they are, and what `ringmpi attend` makes of them."""

from ringmpi.cli import main
from ringmpi.files.hdf5 import create_dataset, read_rows, write_file, write_rows
from ringmpi.files.opening import open_file


def make_random(path, tokens, **options):
    """An input of random numbers; `kv_heads=2` is the option `--kv-heads 2`."""
    flags = [str(x) for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    assert main(["make", "random", str(path), "--tokens", str(tokens), *flags]) == 0
    return path


def write_arrays(path, arrays):
    """A file as `ringmpi make` writes it."""
    with write_file(path, force=True) as file:
        for name, x in arrays.items():
            write_rows(create_dataset(file, name, x.shape, x.dtype), 0, x)


def read_arrays(path, names="qkv"):
    with open_file(path) as file:
        return [read_rows(file[name], 0, len(file[name])) for name in names]


def attend(source, target, *options):
    """Attend in this process, by NumPy, and say nothing."""
    assert main(["attend", str(source), str(target), "--backend", "numpy", "--quiet", *options]) == 0
