"""Arrays as other libraries make them, where they refuse to be read; none needs a GPU.

What each raises, and for what, is what torch 2.13 and JAX 0.10 do.
"""

import numpy as np

CPU, CUDA, METAL = 1, 2, 8          # of DLPack


class Deleted:
    """An array of JAX whose memory was given away."""

    shape = (3, 2, 4)
    dtype = np.dtype("f4")

    @property
    def __cuda_array_interface__(self):
        raise AttributeError("__cuda_array_interface__ is only supported for unsharded arrays.")

    def __dlpack_device__(self):
        raise TypeError("object of type 'NoneType' has no len()")

    def __array__(self, *_, **__):
        raise RuntimeError("Array has been deleted with shape=float32[3].")

    def __repr__(self):
        raise RuntimeError("Array has been deleted with shape=float32[3].")

    def __float__(self):
        raise RuntimeError("Array has been deleted with shape=float32[3].")


class Traced:
    """An array of JAX that has no values yet."""

    shape = (3, 2, 4)
    dtype = np.dtype("f4")

    def __array__(self, *_, **__):
        raise TypeError("The numpy.ndarray conversion method __array__() was called on traced array\nSee the docs")

    def __getattr__(self, name):
        raise AttributeError(f"DynamicJaxprTracer has no attribute {name}")


class Raising:
    """Whatever is asked of it, it raises."""

    def __init__(self, error):
        object.__setattr__(self, "error", error)

    def __getattribute__(self, name):
        raise object.__getattribute__(self, "error")


class Elsewhere:
    """An array on a device of some kind, that DLPack tells of; of a dtype that CUDA's interface has no name for."""

    def __init__(self, kind):
        self.kind = kind

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **_):
        raise BufferError("not to be asked for")

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("INVALID_ARGUMENT: unsupported type")


def cuda_tensor(torch):
    """The class of tensors that say of themselves what torch's CUDA tensors say, in the memory of the host."""

    class CudaTensor(torch.Tensor):
        is_cuda = True

        def __dlpack_device__(self):
            return CUDA, 0

        @property
        def __cuda_array_interface__(self):
            if self.requires_grad:
                raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")
            return {"shape": tuple(self.shape), "typestr": "<f4", "data": (self.data_ptr(), False), "version": 2}

        def __dlpack__(self, **_):
            if self.requires_grad:
                raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
            if self.is_conj():
                raise BufferError("Can't export tensors with the conjugate bit set")
            return super().__dlpack__()          # the negative bit is not looked at

        def __array__(self, *_, **__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    return CudaTensor
