"""Pieces of the headers of kernels: tables that the compiler knows, and tables that code reads."""

from __future__ import annotations

from collections.abc import Iterable


def constant_function(name: str, index: str, values: Iterable[int], arguments: str = "") -> str:
    """Write a function of compile-time constants, ``index`` an expression of its arguments."""
    numbers = ", ".join(map(str, values))
    arguments = arguments or f"int {index}"
    return (
        f"__device__ constexpr int {name}({arguments}) {{\n"
        f"  constexpr int table[] = {{{numbers}}};\n  return table[{index}];\n}}\n"
    )


def array(name: str, values: Iterable[int]) -> str:
    """Write an array of small integers in the memory of the device."""
    return f"__device__ const short {name}[] = {{{', '.join(map(str, values))}}};"
