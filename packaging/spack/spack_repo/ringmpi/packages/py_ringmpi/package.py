"""Spack's recipe: MPI, and whether HDF5 is parallel, are what the site has chosen for py-mpi4py and py-h5py."""

from spack.package import *
from spack_repo.builtin.build_systems.python import PythonPackage


class PyRingmpi(PythonPackage):
    """Exact attention over long sequences on a ring of MPI ranks.

    As a job from HDF5 to HDF5, and as a library on the communicator of other MPI programs.
    """

    pypi = "ringmpi/ringmpi-0.1.0.tar.gz"

    license("BSD-3-Clause")

    version("0.1.0", sha256="0000000000000000000000000000000000000000000000000000000000000000")

    variant("plot", default=False, description="Pictures: ringmpi plot")
    variant("torch", default=False, description="ringmpi.torch")

    depends_on("py-setuptools@77:", type="build")

    with default_args(type=("build", "run")):
        depends_on("python@3.10:")
        depends_on("py-numpy@1.26:")
        depends_on("py-mpi4py@4.1:")
        depends_on("py-h5py@3.16:")
        depends_on("py-numba@0.62:")
        depends_on("py-ml-dtypes@0.5:")
        depends_on("py-threadpoolctl@3.5:")
        depends_on("py-tqdm@4.66:")
        depends_on("py-matplotlib@3.6:", when="+plot")
        depends_on("py-torch@2.4:", when="+torch")

    # Others want CuPy, torch, transformers or JAX.
    import_modules = ("ringmpi", "ringmpi.analysis", "ringmpi.cli", "ringmpi.hdf5")
