"""Kernels of the operators for processors, generated and compiled with Numba when first used."""
