"""The GPU: CUDA C++ from kernels/, compiled and launched by CuPy."""
