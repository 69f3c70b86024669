"""CUDA kernels of the published sizes compile for real GPUs; registers suffice, no GPU needed."""

from __future__ import annotations

import re

import pytest

from mlip.errors import InputError
from mlip.nn.sphere_product import SphereBasis, sphere_tables
from mlip.ops import RotationSignature
from mlip.ops.cuda import compiler, edge_gradient
from mlip.ops.cuda.gated_product import product_program
from mlip.ops.cuda.program import Program
from mlip.ops.cuda.rotation import rotation_program
from mlip.ops.cuda.shared_operator import operator_program
from mlip.ops.cuda.sphere_products import products_program


def gated_program(lmax: int, mmax: int, in_frame: bool) -> Program:
    return product_program(lmax, mmax, in_frame, sphere_tables(SphereBasis(lmax, mmax, in_frame)))


# program, and the most registers of its kernels in float32 and in float64; None: they may spill
PROGRAMS = {
    "rotations, degrees 3, orders 2": (rotation_program(RotationSignature(3, 2)), 110, 160),
    "rotations, degrees 4, orders 2": (rotation_program(RotationSignature(4, 2)), 110, 160),
    "rotations, degrees 6, orders 2": (rotation_program(RotationSignature(6, 2)), 130, 170),
    "shared operator, degree 2": (operator_program(9, 9), 110, 170),
    "shared operator, degree 3": (operator_program(16, 16), 150, 170),
    "shared operator, degree 4": (operator_program(25, 25), 110, 130),
    "forces and virial": (edge_gradient.PROGRAM, 50, 50),
    "three factors, degree 2": (products_program(9, 9, 3), 130, 210),
    "three factors, degree 3 to 1": (products_program(16, 4, 3), 160, None),
    "three factors, degree 3": (products_program(16, 16, 3), 190, None),
    "two factors, degree 4": (products_program(25, 25, 2), 190, None),
    "gated product, edges, degree 3": (gated_program(3, 2, True), 90, 150),
    "gated product, edges, degree 4": (gated_program(4, 2, True), 100, 180),
    "gated product, edges, degree 6": (gated_program(6, 2, True), 130, None),
    "gated product, atoms, degree 3": (gated_program(3, 3, False), 110, 180),
    "gated product, atoms, degree 4": (gated_program(4, 4, False), 160, 255),
    "gated product, atoms, degree 6": (gated_program(6, 6, False), 255, None),
}


@pytest.fixture(autouse=True)
def _compiler():
    try:
        compiler.nvrtc()
    except InputError as error:
        pytest.skip(str(error))


def usage(program: Program, architecture: str) -> dict[str, tuple[int, int]]:
    """Registers of each kernel, and bytes of memory that it takes in their place."""
    done = compiler.compile_source(
        program.file, program.headers, program.kernels, architecture, resources=True
    )
    of = {lowered: name for name, lowered in done.names.items()}
    found = {}
    for part in done.log.split("Compiling entry function '")[1:]:
        name = of[part.split("'")[0]]
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", part)))
        found[name] = registers, spilled
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_spills(name, architecture):
    program, *most = PROGRAMS[name]
    found = usage(program, architecture)
    assert set(found) == set(program.kernels)
    for kernel, (registers, spilled) in found.items():
        limit = most["double" in kernel]
        if limit is not None:
            assert spilled == 0, f"{kernel}: {found}"
            assert registers <= limit, f"{kernel}: {found}"
