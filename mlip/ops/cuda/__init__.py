"""CUDA kernels of the operators: sources in ``kernels/``, compiled on first use through CuPy."""
