"""CUDA kernels of the published sizes compile for real GPUs; registers suffice, no GPU needed."""

from __future__ import annotations

import re

import pytest

from mlip.errors import InputError
from mlip.ops import RotationSignature
from mlip.ops.cuda import compiler, edge_gradient
from mlip.ops.cuda.program import Program
from mlip.ops.cuda.rotation import rotation_program
from mlip.ops.cuda.shared_operator import operator_program

# program, and the most registers of its kernels in float32 and in float64
PROGRAMS = {
    "rotations, degrees 3, orders 2": (rotation_program(RotationSignature(3, 2)), 110, 160),
    "rotations, degrees 4, orders 2": (rotation_program(RotationSignature(4, 2)), 110, 160),
    "rotations, degrees 6, orders 2": (rotation_program(RotationSignature(6, 2)), 130, 170),
    "shared operator, degree 2": (operator_program(9, 9), 110, 170),
    "shared operator, degree 3": (operator_program(16, 16), 150, 170),
    "shared operator, degree 4": (operator_program(25, 25), 110, 130),
    "forces and virial": (edge_gradient.PROGRAM, 50, 50),
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
        assert spilled == 0, f"{kernel}: {found}"
        assert registers <= most["double" in kernel], f"{kernel}: {found}"
