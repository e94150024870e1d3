"""The C backend: fused kernels for any CPU, loaded with ctypes, run on a small thread pool."""
