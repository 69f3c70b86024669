"""Every architecture passes the physics suite on a GPU, by kernels and by plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlip.graph import AtomicGraph
from mlip.ops.backend import decisions
from mlip.potential import Potential, Prediction
from tests.contract.base import crystal
from tests.contract.models import EQUIFORMER_V3, FACET, TDN
from tests.finite_differences import evaluate
from tests.model_contract import OnOneBackend

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class OnDevice(Potential):
    """A potential on the device that takes graphs from the CPU and gives its results there."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.to(DEVICE)

    def forward(self, graph: AtomicGraph, **options: bool) -> Prediction:
        there = super().forward(copy.copy(graph).to(DEVICE), **options)
        assert all(part is None or part.device.type == DEVICE.type for part in there)
        return Prediction(*(None if part is None else part.cpu() for part in there))


class OnGPU(OnOneBackend):
    """Plain PyTorch adds in any order there, unless told otherwise: some checks compare bits."""

    wrapper = OnDevice

    @pytest.fixture(autouse=True, scope="class")
    def _in_order(self) -> Iterator[None]:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


class ByKernels(OnGPU):
    """What `auto` chooses; `operators` are those that must have been a kernel.

    Attributes:
        operators: how their names begin in what `mlip info --backends` prints.
    """

    backend = "auto"
    operators: tuple[str, ...]

    def test_kernels_ran(self, potential: Potential) -> None:
        evaluate(potential, crystal())
        kernels = [name for name, how in decisions().items() if how.startswith("CUDA kernel")]
        for operator in self.operators:
            assert any(name.startswith(operator) for name in kernels), operator


class TestFacetByKernels(ByKernels):
    model = FACET
    layers = 3
    operators = ("convolution", "forces and virial")


class TestEquiformerV3ByKernels(ByKernels):
    model = EQUIFORMER_V3
    layers = 2
    inversion = False
    operators = ("rotation into the frames", "forces and virial")


class TestTDNByKernels(ByKernels):
    model = TDN
    layers = 2
    inversion = False
    operators = ("shared operator", "forces and virial")


class ByPyTorch(OnGPU):
    backend = "torch"


class TestFacetByPyTorch(ByPyTorch):
    model = FACET
    layers = 3


class TestEquiformerV3ByPyTorch(ByPyTorch):
    model = EQUIFORMER_V3
    layers = 2
    inversion = False


class TestTDNByPyTorch(ByPyTorch):
    model = TDN
    layers = 2
    inversion = False
