"""Names for the axes of a result, by HDF5's dimension scales as netCDF-4 has them: xarray shows (token, head, dim)."""

from __future__ import annotations

import h5py

from .axes import Axes, axes_of_results

# By this name readers of netCDF-4 know a scale that has a length and no values of its own; nothing is stored for it.
NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable. %10d"
ATTRIBUTES = {
    "out": {"long_name": "attention: values weighted by the softmax of the scores"},
    "lse": {"long_name": "log-sum-exp of the scores", "units": "1"},
}


def describe_results(file: h5py.File, axes: Axes) -> None:
    """Give the axes of `out` and `lse` names, which they share, and say what the two are. Local, or all ranks.

    Parameters
    ----------
    file : h5py.File
        In the making.
    axes : Axes
        Of `out`.
    """
    scales: dict[str, h5py.Dataset] = {}
    for result, its_axes in axes_of_results(axes).items():
        dataset = file[result]
        dataset.attrs.update(ATTRIBUTES[result])
        for axis, name in enumerate(its_axes.labels):
            length = dataset.shape[axis]
            if name not in scales:
                scales[name] = file.create_dataset(name, (length,), "<f4")
                scales[name].make_scale(NO_VARIABLE % length)
            dataset.dims[axis].attach_scale(scales[name])
