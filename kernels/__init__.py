"""CUDA C++ sources of the operators in `mlip.ops`, shipped as files. Holds no code."""
