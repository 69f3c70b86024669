"""The CPU kernels of the convolution: against its definition, and by finite differences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.ops import ConvolutionSignature, convolution, neighborhood
from mlip.ops.cpu import runner, threads
from mlip.ops.cpu.convolution import kernel_convolution
from mlip.ops.cpu.library import encode, packed_convolution, packed_convolution_backward

DOUBLE = torch.float64
SIGNATURES = {
    "scalars in": ConvolutionSignature((16,), 2, (0, 1, 2), True),
    "all parities": ConvolutionSignature((16, 8, 8), 2, (0, 1, 2), False),
    "degree 3, odd channels": ConvolutionSignature((20, 3, 1, 5), 3, (0, 1, 2, 3), True),
    "degree 4": ConvolutionSignature((8, 0, 0, 0, 8), 4, (0, 3, 4), True),
    "scalars out": ConvolutionSignature((8, 8, 16), 2, (0,), True),
    "degree left out": ConvolutionSignature((3, 0, 2), 1, (0, 2), False),
}
ROWS = {"ragged": [3, 0, 37, 1, 16, 0], "empty": [0, 0, 0], "one": [5], "huge": [0, 700, 1]}


class Case:
    """Random inputs in float64."""

    def __init__(self, signature: ConvolutionSignature, counts: list[int], n_radial: int = 5):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        n_nodes, n_edges = len(counts), sum(counts)
        self.signature, self.n_nodes = signature, n_nodes
        self.target = torch.repeat_interleave(torch.arange(n_nodes), torch.tensor(counts))
        self.source = torch.randint(0, n_nodes, (n_edges,), generator=generator)
        self.rowptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        self.features = [randn(n_nodes, 2 * i + 1, n) for i, n in enumerate(signature.channels)]
        self.harmonics = randn(n_edges, (signature.lmax_edge + 1) ** 2)
        self.basis, self.kernel = randn(n_edges, n_radial), randn(n_radial, signature.n_weights)

    def inputs(self, dtype: torch.dtype, radial: bool) -> list[Tensor]:
        last = [self.basis, self.kernel] if radial else [self.basis @ self.kernel]
        tensors = [*self.features, self.harmonics, *last]
        return [t.detach().to(dtype).clone().requires_grad_(True) for t in tensors]

    def definition(self, *inputs: Tensor) -> Tensor:
        n = len(self.features)
        weights = inputs[n + 1] @ inputs[n + 2] if len(inputs) == n + 3 else inputs[n + 1]
        edges = neighborhood(torch.stack([self.source, self.target]), self.n_nodes)
        return flat(convolution(self.signature, inputs[:n], inputs[n], weights, edges))

    def kernels(self, *inputs: Tensor) -> Tensor:
        n = len(self.features)
        kernel = inputs[n + 2] if len(inputs) == n + 3 else None
        return flat(
            kernel_convolution(
                self.signature, inputs[:n], inputs[n], inputs[n + 1], kernel, self.rowptr,
                self.source,
            )
        )  # fmt: skip


def flat(features: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten() for part in features])


def derivatives(function, inputs: list[Tensor]) -> list[Tensor]:
    """Result, gradients of a nonlinear function of it, gradients of a function of those."""
    out = function(*inputs)
    probe = torch.linspace(-1, 1, out.numel(), dtype=DOUBLE).to(out.dtype)
    energy = (out * probe + 0.1 * out.square()).sum()
    first = torch.autograd.grad(energy, inputs, create_graph=True, materialize_grads=True)
    loss = sum((g.square() * (1 + i)).sum() for i, g in enumerate(first))
    second = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [t.detach() for t in (out, *first, *second)]


def equals_the_definition(case: Case, inputs: list[Tensor]) -> None:
    """Assert that the kernels give the result and two derivatives."""
    truth = derivatives(case.definition, inputs)
    for found, expected in zip(derivatives(case.kernels, inputs), truth, strict=True):
        assert found.shape == expected.shape
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, atol=1e-13 * max(scale, 1), rtol=1e-12)


@pytest.mark.parametrize("radial", [False, True], ids=["weights", "radial"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SIGNATURES)
def test_values_and_two_derivatives_equal_the_definition(name, rows, radial):
    case = Case(SIGNATURES[name], ROWS[rows])
    equals_the_definition(case, case.inputs(DOUBLE, radial))


@pytest.mark.parametrize("radial", [False, True], ids=["weights", "radial"])
@pytest.mark.parametrize("name", ["all parities", "degree 3, odd channels"])
def test_float32_is_as_accurate_as_the_definition(name, radial):
    """At most twice the error of the definition in the same precision."""
    case = Case(SIGNATURES[name], [40] * 60, n_radial=8)
    truth = derivatives(case.definition, case.inputs(DOUBLE, radial))
    single = case.inputs(torch.float32, radial)
    plain = derivatives(case.definition, single)
    fast = derivatives(case.kernels, single)

    def error(x: Tensor, true: Tensor) -> float:
        return float(torch.linalg.vector_norm(x - true) / torch.linalg.vector_norm(true))

    errors = [(error(a, t), error(b, t)) for a, b, t in zip(fast, plain, truth, strict=True)]
    assert [(a, b) for a, b in errors if a > 2 * b + 1e-8] == []


@pytest.mark.parametrize("radial", [False, True], ids=["weights", "radial"])
def test_finite_differences(radial):
    case = Case(ConvolutionSignature((2, 1), 1, (0, 1), True), [2, 0, 3], n_radial=2)
    inputs = case.inputs(DOUBLE, radial)
    assert torch.autograd.gradcheck(case.kernels, inputs)
    assert torch.autograd.gradgradcheck(case.kernels, inputs)


def packed(case: Case, radial: bool) -> list:
    """Arguments of the operator."""
    inputs = case.inputs(DOUBLE, radial)
    n = len(case.features)
    x = torch.cat([t.flatten() for t in inputs[:n]]).detach().requires_grad_(True)
    kernel = inputs[n + 2] if radial else None
    return [x, inputs[n], inputs[n + 1], kernel, case.rowptr, case.source, encode(case.signature)]


@pytest.mark.parametrize("radial", [False, True], ids=["weights", "radial"])
def test_operators_follow_the_rules_of_torch(radial):
    case = Case(ConvolutionSignature((8, 8), 1, (0, 1), True), [2, 0, 3], n_radial=2)
    arguments = packed(case, radial)
    torch.library.opcheck(packed_convolution, arguments)
    gradient = torch.ones_like(packed_convolution(*arguments)).requires_grad_(True)
    wanted = [True, True, True, radial]
    arguments = [*arguments[:4], gradient, *arguments[4:], wanted]
    torch.library.opcheck(packed_convolution_backward, arguments)


def test_what_does_not_fit_is_an_error_not_a_crash():
    case = Case(ConvolutionSignature((8, 8), 1, (0, 1), True), [2, 0, 3], n_radial=2)
    good = packed(case, True)
    packed_convolution(*good)
    wrong = {
        0: good[0][:-1],
        1: good[1][:-1],
        2: good[2].float(),
        3: good[3][:1],
        4: torch.tensor([0, 2, 2, 6]),
        5: case.source + 3,
    }
    for i, value in wrong.items():
        with pytest.raises(InputError, match="do not fit"):
            packed_convolution(*good[:i], value, *good[i + 1 :])
    with pytest.raises(InputError, match="do not fit"):
        packed_convolution(*good[:4], torch.tensor([0, 5, 2, 5]), *good[5:])


def test_views_and_expanded_tensors_are_inputs_like_any_other():
    case = Case(SIGNATURES["all parities"], [4, 0, 9])
    inputs = case.inputs(DOUBLE, False)
    strided = [
        *(t.transpose(0, 2).contiguous().transpose(0, 2) for t in inputs[:-1]
          if t.dim() == 3),
        inputs[-2].t().contiguous().t(),
        inputs[-1][:1].expand_as(inputs[-1]),
    ]  # fmt: skip
    assert not any(t.is_contiguous() for t in strided[1:])
    torch.testing.assert_close(
        case.kernels(*strided), case.definition(*strided), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("n_threads", [2, 4])
@pytest.mark.parametrize("n_edges", [20_000, 80_000, 110_000, 10**9])
def test_threads_share_the_chunks_of_the_backward_pass_evenly(n_threads, n_edges):
    parts = threads.even_parts(n_edges, runner.CHUNK_EDGES, runner.MOST_CHUNKS)
    assert parts == 1 or n_edges // parts >= runner.CHUNK_EDGES
    assert parts < n_threads or parts % n_threads == 0
    assert 2 * parts > min(runner.MOST_CHUNKS, n_edges // runner.CHUNK_EDGES)


def test_results_do_not_depend_on_threads_or_on_the_run(monkeypatch):
    """Large enough for several chunks; compared bit for bit."""
    case = Case(ConvolutionSignature((16, 16), 1, (0, 1), True), [60] * 400, n_radial=4)
    inputs = case.inputs(torch.float32, True)
    results = []
    for n in (1, 2, 3, 3):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        results.append(derivatives(case.kernels, inputs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    truth = derivatives(case.definition, case.inputs(DOUBLE, True))
    for found, expected in zip(results[0], truth, strict=True):
        torch.testing.assert_close(
            found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
        )


def force_graph(case: Case):
    """Gradient with respect to harmonics, as compilers trace it."""
    signature = encode(case.signature)

    def forces(x, harmonics, basis, kernel):
        out = packed_convolution(x, harmonics, basis, kernel, case.rowptr, case.source, signature)
        (g,) = torch.autograd.grad(torch.tanh(out).square().sum(), harmonics, create_graph=True)
        return g

    return forces


def test_traced_forces_keep_their_derivatives():
    """make_fx puts ``detach`` on saved tensors, which cuts the parameter gradients of a force loss.

    Decomposing it to an alias, as exporters must, gives them back; without, they are wrong.
    """
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    case = Case(ConvolutionSignature((8, 8), 1, (0, 1), True), [2, 0, 3, 4], n_radial=2)
    x, harmonics, basis, kernel, *_ = packed(case, True)
    forces = force_graph(case)

    def parameter_gradients(function):
        loss = function(x, harmonics, basis, kernel).square().sum()
        return torch.autograd.grad(loss, (x, basis, kernel))

    truth = parameter_gradients(forces)

    def traced(**options):
        return make_fx(forces, tracing_mode="symbolic", _allow_non_fake_inputs=True, **options)(
            x, harmonics, basis, kernel
        )

    kept = traced(decomposition_table=core_aten_decompositions())
    names = [str(node.target) for node in kept.graph.nodes if node.op == "call_function"]
    assert names.count("mlip.convolution.default") == 1
    assert names.count("mlip.convolution_backward.default") == 1
    for found, expected in zip(parameter_gradients(kept), truth, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    cut = parameter_gradients(traced())
    assert max(float((a - b).abs().max()) for a, b in zip(cut, truth, strict=True)) > 1e-3


def test_torch_compile_sees_one_operator():
    case = Case(ConvolutionSignature((8, 8), 1, (0, 1), True), [2, 0, 3, 4], n_radial=2)
    inputs = case.inputs(DOUBLE, True)
    compiled = torch.compile(case.kernels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), case.definition(*inputs), atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs).square().sum(), inputs),
        torch.autograd.grad(case.definition(*inputs).square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


SCRIPT = """
import os, sys, torch
from tests.ops.test_ops_cpu_convolution import Case
from mlip.ops import ConvolutionSignature
torch.set_num_threads(2)
case = Case(ConvolutionSignature((16,), 1, (0, 1), True), [60] * 100)
inputs = case.inputs(torch.float32, True)
def run():
    out = case.kernels(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]
first = run()
torch.set_num_threads(1)  # torch's own threads do not survive a fork
if os.fork() == 0:
    from mlip.ops.cpu import threads
    threads.available_threads = lambda: 2
    same = all(torch.equal(a, b) for a, b in zip(first, run()))
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def start(folder: Path, repository: Path) -> subprocess.Popen:
    environment = {**os.environ, "MLIP_CACHE": str(folder), "PYTHONPATH": str(repository)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_cold_cache_several_processes_and_forked_workers(tmp_path: Path, repository: Path):
    """Three processes fill an empty cache at once, one more is killed while it compiles.

    Each forks, as loader workers are.
    """
    folder = tmp_path / "kernels"
    killed = start(tmp_path, repository)
    while killed.poll() is None and not list(folder.glob("mlip_convolution*.py")):
        time.sleep(0.005)
    time.sleep(0.2)  # the text is there, and the compiler at work
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not list(folder.glob("__pycache__/mlip_convolution*.nbc"))
    started = [start(tmp_path, repository) for _ in range(3)]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    files = {file.name for file in folder.glob("*")}
    assert sum(name.startswith("mlip_convolution") for name in files) == 1
    assert not [name for name in files if name.startswith(".")]
    assert list(folder.glob("__pycache__/mlip_convolution*.nbc"))
