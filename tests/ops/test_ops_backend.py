"""The choice of a back end: checked on the user's structure, and explained when it fails."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlip.errors import InputError
from mlip.nn.sphere_product import SphereBasis, gated_product, grid_matrices
from mlip.ops import (
    ConvolutionSignature,
    Neighborhood,
    RotationSignature,
    backend,
    default_backend,
    forces_and_virial,
    neighborhood,
    operator_apply,
    operator_gather,
    operator_scatter,
    rotate_gather,
    sphere_products,
    sum_messages,
)
from mlip.ops.cpu import runner

SIGNATURE = ConvolutionSignature((16,), 2, (0, 1, 2), True)


@pytest.fixture(autouse=True)
def _nothing_decided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "_refused", {})
    monkeypatch.setattr(backend, "_uncovered", {})


def summed(name: str, dtype=torch.float64, signature=SIGNATURE, n_edges=60, n_radial=4) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n_nodes = 6
    target = torch.arange(n_edges) // 10
    source = torch.randint(0, n_nodes, (n_edges,), generator=generator)
    out = sum_messages(
        signature, tuple(randn(n_nodes, 2 * i + 1, n) for i, n in enumerate(signature.channels)),
        randn(n_edges, (signature.lmax_edge + 1) ** 2), randn(n_edges, n_radial),
        randn(n_radial, signature.n_weights), neighborhood(torch.stack([source, target]), n_nodes),
        name,
    )  # fmt: skip
    return torch.cat([part.flatten() for part in out])


def test_auto_checks_once_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="mlip"):
        first = summed("auto")
        again = summed("auto")
    (record,) = caplog.records
    assert "CPU kernel, relative error" in record.getMessage()
    assert torch.equal(first, again)
    torch.testing.assert_close(first, summed("torch"), atol=1e-12, rtol=0)
    assert torch.equal(first, summed("numba"))


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_weights_of_many_radial_functions_are_stored_while_they_are_few(name, monkeypatch):
    forms = []

    def spied(function, which):
        def call(*arguments):
            forms.append(which(arguments))
            return function(*arguments)

        return call

    from mlip.ops import messages
    from mlip.ops.cpu import convolution as kernels

    def is_stored(arguments):
        return arguments[4] is None

    stored = spied(kernels.kernel_convolution, is_stored)
    monkeypatch.setattr(kernels, "kernel_convolution", stored)
    monkeypatch.setattr(messages, "convolution", spied(messages.convolution, lambda _: True))
    moments = spied(messages.radial_convolution, lambda _: False)
    monkeypatch.setattr(messages, "radial_convolution", moments)
    many = summed(name, n_radial=40)
    summed(name, n_radial=4)
    monkeypatch.setattr(messages, "CACHED_WEIGHTS", 60 * SIGNATURE.n_weights - 1)
    torch.testing.assert_close(summed(name, n_radial=40), many, rtol=0, atol=1e-11)
    assert forms == [True, False, name == "torch"]


@pytest.mark.refusals
def test_a_wrong_kernel_is_not_used(caplog, monkeypatch):
    right = runner.backward

    def wrong(*arguments):
        right(*arguments)
        arguments[-1].harmonics[0] *= 1.01

    monkeypatch.setattr(runner, "backward", wrong)
    with caplog.at_level(logging.WARNING, logger="mlip"):
        found = summed("auto")
        summed("auto")
    (record,) = caplog.records
    assert "plain PyTorch instead of the CPU kernel" in record.getMessage()
    assert "relative error" in record.getMessage()
    assert torch.equal(found, summed("torch"))


@pytest.mark.refusals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_of_two_that_err_may_be_twice_an_error(dtype):
    limit = backend.TOLERANCE[dtype]
    tensors = [torch.ones(1, dtype=dtype)]

    def used(name, found):
        return backend.use_kernel("auto", name, tensors, lambda: found, otherwise="loops")

    assert used("error below", (0.9 * limit, 1.0))
    assert not used("error above", (1.1 * limit, 0.0))
    assert used("difference below", 1.9 * limit)
    assert not used("difference above", 2.1 * limit)
    assert not used("difference unknown", float("nan"))
    told = {name.split(",")[0]: how for name, how in backend.decisions().items()}
    assert told["error above"] == f"loops: relative error {1.1 * limit:.1e} (loops 0.0e+00)"
    above = f"loops: relative difference from loops {2.1 * limit:.1e}"
    assert told["difference above"] == above


@pytest.mark.refusals
def test_a_kernel_that_does_not_compile_is_not_used(caplog, monkeypatch):
    def broken(*arguments):  # noqa: ARG001
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(runner, "program", broken)
    with caplog.at_level(logging.WARNING, logger="mlip"):
        found = summed("auto")
    assert "RuntimeError: no such instruction" in caplog.text
    assert torch.equal(found, summed("torch"))


def test_what_a_kernel_cannot_do_goes_to_pytorch_or_is_an_error(monkeypatch):
    half = summed("auto", torch.bfloat16)
    assert torch.equal(half, summed("torch", torch.bfloat16))
    with pytest.raises(InputError, match="float32 or float64"):
        summed("numba", torch.bfloat16)
    monkeypatch.setattr(backend, "numba_missing", lambda: "Numba cannot be imported")
    with pytest.raises(InputError, match="Numba cannot be imported"):
        summed("numba")
    assert torch.equal(summed("auto"), summed("torch"))


def test_a_kernel_is_for_its_own_device(monkeypatch):
    cpu, gpu = torch.zeros(1), torch.zeros(1, device="meta")
    assert "tensors are on cpu, meta" in str(backend.refusal([cpu, gpu], None, None))
    two = "tensors are torch.float32, torch.float64"
    assert two in str(backend.refusal([cpu, cpu.double()], None, None))
    with pytest.raises(InputError, match=r"backend='cuda'.*tensors are on the device cpu"):
        summed("cuda")
    monkeypatch.setenv("MLIP_BACKEND", "cuda")
    with pytest.raises(InputError, match="tensors are on the device cpu"):
        forces_and_virial(
            torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64), 1, 1,
        )  # fmt: skip


def test_tensors_on_a_gpu_go_to_its_kernels(monkeypatch):
    """With tensors that have a device but no numbers."""
    monkeypatch.setattr(backend, "cuda_missing", lambda: None)
    signature = RotationSignature(2, 1)
    with FakeTensorMode():
        x, y = torch.empty(5, 9, 3, device="cuda"), torch.empty(7, 9, 3, device="cuda")
        ends = torch.empty(2, 7, dtype=torch.int64, device="cuda")
        scale = torch.empty(7, 3, 6, device="cuda")
        orders = rotate_gather(signature, x, y.new_empty(7, 7, 9), scale, ends, "cuda")
        assert [tuple(part.shape) for part in orders] == [(7, 3, 6), (7, 2, 6), (7, 2, 6)]
        matrix, weights = y.new_empty(7, 4, 9), y.new_empty(7, 3)
        assert operator_gather(x, matrix, weights, ends, "cuda").shape == (7, 4, 3)
        assert operator_scatter(y, matrix, weights, ends, 5, "cuda").device.type == "cuda"
        assert operator_apply(y, matrix, weights, "cuda").shape == (7, 4, 3)
        batch = torch.empty(5, dtype=torch.int64, device="cuda")
        forces, virial = forces_and_virial(weights, weights, ends, batch, 5, 2, "cuda")
        assert (forces.shape, virial.shape) == ((5, 3), (2, 3, 3))
        tables = x.new_empty(20, 9), x.new_empty(4, 20)
        assert sphere_products(y, *tables, 3, "cuda").shape == (7, 4, 2)
        with pytest.raises(InputError, match="device cuda"):
            operator_gather(x, matrix, weights, ends, "numba")
    assert backend._refused == {}


def test_convolutions_on_a_gpu_go_to_its_kernels(monkeypatch):
    """Any number of channels; with tensors that have a device but no numbers."""
    monkeypatch.setattr(backend, "cuda_missing", lambda: None)
    signature = ConvolutionSignature((5, 3), 2, (0, 1, 2), True)
    with FakeTensorMode():

        def empty(*shape: int, dtype=torch.float64) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        rowptr, index = empty(7, dtype=torch.int64), empty(60, dtype=torch.int64)
        edges = Neighborhood(index, index, 6, rowptr)

        def sums(signature: ConvolutionSignature, *inputs: Tensor) -> tuple[Tensor, ...]:
            return sum_messages(signature, inputs[:2], *inputs[2:], edges, "cuda")

        inputs = [empty(6, 1, 5), empty(6, 3, 3), empty(60, 9), empty(60, 4)]
        inputs.append(empty(4, signature.n_weights))
        out = sums(signature, *inputs)
        assert [part.shape for part in out] == [
            (6, 2 * i + 1, n) for i, n in enumerate(signature.out_channels)
        ]
        high = ConvolutionSignature((5, 3), 5, (0,))  # harmonics that no product needs
        (only,) = sums(high, *inputs[:2], empty(60, 36), inputs[3], empty(4, high.n_weights))
        assert only.shape == (6, 1, high.out_channels[0])


def test_no_edges_decide_nothing():
    assert not summed("auto", n_edges=0).any()
    assert backend.decisions() == {}


def test_code_for_channels_that_fill_no_vector_is_checked_by_itself():
    signature, product = RotationSignature(1, 1), SphereBasis(1, 1, False)
    to_grid, from_grid = grid_matrices(product)
    frames = torch.eye(4, dtype=torch.float64)[[0, 2, 3, 1]].expand(3, -1, -1)
    ends = torch.tensor([[0, 1, 1]])
    for channels in (16, 8, 5, 12):
        ones = torch.ones(3, 4, channels, dtype=torch.float64)
        rotate_gather(signature, ones[:2], frames, ones[:, :1], ends)
        sphere_products(torch.cat([ones, ones], dim=2), to_grid, from_grid, 2)
        gated_product(product, [torch.cat([ones, ones], dim=2).flatten(1)], 0, ones[:, 0])
    names = [name for name, how in backend.decisions().items() if "CPU kernel, agrees" in how]
    assert len(names) == 6
    assert sum("any number of channels, float64" in name for name in names) == 3


def test_decisions_say_what_ran_and_why():
    summed("auto")
    summed("auto", torch.bfloat16)
    kernel, plain = sorted(backend.decisions().items(), key=lambda item: "bfloat16" in item[0])
    assert kernel[0].endswith("float64")
    assert kernel[1].startswith("CPU kernel")
    assert plain[1].startswith("plain PyTorch: tensors are torch.bfloat16")


def test_the_variable_chooses(monkeypatch):
    monkeypatch.setenv("MLIP_BACKEND", "torch")
    assert default_backend() == "torch"
    monkeypatch.setenv("MLIP_BACKEND", "fast")
    with pytest.raises(InputError, match="MLIP_BACKEND is 'fast'"):
        default_backend()
    monkeypatch.delenv("MLIP_BACKEND")
    assert default_backend() == "auto"
