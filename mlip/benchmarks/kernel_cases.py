"""The hot-path operators with random inputs of a chosen size, to be timed on every back end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlip.benchmarks.kernel_work import (
    FORCES_AND_VIRIAL,
    SEGMENT_SUM,
    Work,
    convolution_work,
    operator_work,
    products_work,
    rotation_work,
)
from mlip.nn.edge_frames import EdgeFrameBuilder
from mlip.nn.sphere_product import SphereBasis, gated_product, grid_matrices
from mlip.ops import (
    Backend,
    ConvolutionSignature,
    Neighborhood,
    RotationSignature,
    edge_sum,
    envelope_softmax,
    forces_and_virial,
    neighborhood,
    operator_gather,
    operator_scatter,
    rotate_gather,
    rotate_scatter,
    sphere_products,
    sum_messages,
)
from mlip.ops.shared_operator import OperatorSignature
from mlip.ops.sphere_products import ProductSignature
from mlip.so3 import degree_major, order_sizes, spherical_harmonics

N_RADIAL, HEADS, FACTORS = 8, 8, 3
NEAR = 100  # neighbours are that near in the numbering
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """How much of everything: atoms N, edges E, channels C, highest degree L, precision, device."""

    atoms: int
    edges: int
    channels: int
    lmax: int
    like: Tensor


@dataclass(frozen=True)
class Case:
    """One operator and its inputs.

    run: takes the back end and the inputs; returns tensors. work: operations of each pass, None
    where forms of the operator differ. masks: of inputs whose derivative exists for some entries
    alone. derivatives: how often the kernel can be differentiated.
    """

    name: str
    run: Callable[..., Outputs]
    inputs: Outputs
    work: Work | None
    masks: Mapping[int, Tensor] = field(default_factory=dict)
    derivatives: int = 2


class Inputs:
    """Random numbers, and edges between atoms that are near in order, sorted by target."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self._generator = sizes, torch.Generator().manual_seed(0)
        target = torch.arange(sizes.edges) * sizes.atoms // sizes.edges
        offset = torch.randint(-NEAR, NEAR + 1, (sizes.edges,), generator=self._generator)
        edge_index = torch.stack([(target + offset) % sizes.atoms, target]).to(sizes.like.device)
        self.edges: Neighborhood = neighborhood(edge_index, sizes.atoms)
        self.edge_index = edge_index

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers in the precision and on the device of the measurement."""
        numbers = torch.randn(*shape, generator=self._generator, dtype=torch.float64)
        return numbers.to(self.sizes.like)

    def directions(self) -> Tensor:
        """Vectors of edges [E, 3], float64 on the CPU."""
        return torch.randn(self.sizes.edges, 3, generator=self._generator, dtype=torch.float64)


def _convolution(inputs: Inputs, radial: bool) -> Case:
    size, lmax = inputs.sizes, inputs.sizes.lmax
    degrees = tuple(range(lmax + 1))
    signature = ConvolutionSignature((size.channels,) * (lmax + 1), lmax, degrees, True)
    n, n_weights = len(degrees), signature.n_weights
    x = [inputs.randn(size.atoms, 2 * degree + 1, size.channels) for degree in degrees]
    harmonics = spherical_harmonics(lmax, inputs.directions()).to(size.like)
    last = [inputs.randn(size.edges, N_RADIAL if radial else n_weights)]
    if radial:
        last.append(inputs.randn(N_RADIAL, n_weights))

    def run(backend: Backend, *tensors: Tensor) -> Outputs:
        kernel = tensors[n + 2] if radial else None
        return sum_messages(
            signature, tensors[:n], tensors[n], tensors[n + 1], kernel, inputs.edges, backend
        )

    work = convolution_work(signature, N_RADIAL if radial else 0)
    name = "radial_convolution" if radial else "convolution"
    return Case(name, run, (*x, harmonics, *last), work.times(size.edges * size.channels))


def _rotation(inputs: Inputs, back: bool) -> Case:
    size, lmax = inputs.sizes, inputs.sizes.lmax
    signature = RotationSignature(lmax, min(lmax, 2))
    matrix = EdgeFrameBuilder(lmax, signature.mmax)(inputs.directions()).matrix.to(size.like)
    source_and_target, target = inputs.edge_index, inputs.edge_index[1:]
    column = torch.tensor([degree for degree, _ in degree_major(lmax, lmax)])
    blocks = torch.tensor(signature.degrees)[:, None] == column
    n_ends = 1 if back else 2
    scale = inputs.randn(size.edges, 1 if back else lmax + 1, n_ends * size.channels)

    def gather(backend: Backend, x: Tensor, matrix: Tensor, scale: Tensor) -> Outputs:
        return rotate_gather(signature, x, matrix, scale, source_and_target, backend)

    def scatter(backend: Backend, matrix: Tensor, scale: Tensor, *orders: Tensor) -> Outputs:
        return (rotate_scatter(signature, orders, matrix, scale, target, size.atoms, backend),)

    work = rotation_work(signature, back).times(n_ends * size.channels * size.edges)
    blocks = blocks.to(size.like.device)
    if back:
        orders = [inputs.randn(size.edges, rows, size.channels) for rows in signature.sizes]
        return Case("rotate_scatter", scatter, (matrix, scale, *orders), work, {0: blocks})
    x = inputs.randn(size.atoms, signature.n_coefficients, size.channels)
    return Case("rotate_gather", gather, (x, matrix, scale), work, {1: blocks})


def _shared_operator(inputs: Inputs, back: bool) -> Case:
    size, width = inputs.sizes, (inputs.sizes.lmax + 1) ** 2
    target = inputs.edge_index[1:]

    def run(backend: Backend, x: Tensor, matrix: Tensor, weights: Tensor) -> Outputs:
        if back:
            return (operator_scatter(x, matrix, weights, target, size.atoms, backend),)
        return (operator_gather(x, matrix, weights, inputs.edge_index, backend),)

    x = inputs.randn(size.edges if back else size.atoms, width, size.channels)
    matrix = inputs.randn(size.edges, width, width)
    weights = inputs.randn(size.edges, size.channels)
    work = operator_work(OperatorSignature(width, width, 1 if back else 2))
    name = "operator_scatter" if back else "operator_gather"
    return Case(name, run, (x, matrix, weights), work.times(size.edges * size.channels))


def _segment_sum(inputs: Inputs) -> Case:
    size, target = inputs.sizes, inputs.edge_index[1]

    def run(backend: Backend, values: Tensor) -> Outputs:
        return (edge_sum(values, target, size.atoms, backend),)

    values = inputs.randn(size.edges, size.channels)
    return Case("segment_sum", run, (values,), SEGMENT_SUM.times(values.numel()))


def _segment_softmax(inputs: Inputs) -> Case:
    size, target = inputs.sizes, inputs.edge_index[1]

    def run(backend: Backend, logits: Tensor, envelope: Tensor) -> Outputs:
        return (envelope_softmax(logits, envelope, target, size.atoms, 1e-6, backend),)

    logits = inputs.randn(size.edges, HEADS)
    return Case("segment_softmax", run, (logits, inputs.randn(size.edges).sigmoid()), None)


def _forces_and_virial(inputs: Inputs) -> Case:
    size = inputs.sizes
    structure = torch.zeros(size.atoms, dtype=torch.int64, device=size.like.device)

    def run(backend: Backend, gradient: Tensor, vector: Tensor) -> Outputs:
        return forces_and_virial(
            gradient, vector, inputs.edge_index, structure, size.atoms, 1, backend
        )

    tensors = inputs.randn(size.edges, 3), inputs.randn(size.edges, 3)
    return Case("forces_and_virial", run, tensors, FORCES_AND_VIRIAL.times(size.edges))


def _gated_product(inputs: Inputs) -> Case:
    size, lmax = inputs.sizes, inputs.sizes.lmax
    basis = SphereBasis(lmax, min(lmax, 2), in_frame=True)

    def run(backend: Backend, gate: Tensor, *hidden: Tensor) -> Outputs:
        return gated_product(basis, hidden, 0, gate, backend)

    gate = inputs.randn(size.edges, size.channels)
    rows = order_sizes(lmax, basis.mmax)
    hidden = [inputs.randn(size.edges, 2 * size.channels * n) for n in rows]
    return Case("gated_product", run, (gate, *hidden), None, derivatives=1)


def _sphere_products(inputs: Inputs) -> Case:
    size, width = inputs.sizes, (inputs.sizes.lmax + 1) ** 2
    basis = SphereBasis(size.lmax, size.lmax, in_frame=False)
    to_grid, from_grid = (matrix.to(size.like) for matrix in grid_matrices(basis))

    def run(backend: Backend, u: Tensor) -> Outputs:
        return (sphere_products(u, to_grid.to(u), from_grid.to(u), FACTORS, backend),)

    signature = ProductSignature(width, width, len(to_grid), FACTORS)
    work = products_work(signature).times(size.channels * size.atoms)
    u = inputs.randn(size.atoms, width, FACTORS * size.channels)
    return Case("sphere_products", run, (u,), work)


BUILDERS: dict[str, Callable[[Inputs], Case]] = {
    "convolution": lambda inputs: _convolution(inputs, radial=False),
    "radial_convolution": lambda inputs: _convolution(inputs, radial=True),
    "rotate_gather": lambda inputs: _rotation(inputs, back=False),
    "rotate_scatter": lambda inputs: _rotation(inputs, back=True),
    "operator_gather": lambda inputs: _shared_operator(inputs, back=False),
    "operator_scatter": lambda inputs: _shared_operator(inputs, back=True),
    "sphere_products": _sphere_products,
    "gated_product": _gated_product,
    "segment_sum": _segment_sum,
    "segment_softmax": _segment_softmax,
    "forces_and_virial": _forces_and_virial,
}


def cases(names: list[str], sizes: Sizes) -> Iterator[Case]:
    """Make the operators of these names of ``BUILDERS``, one after another."""
    for name in names:
        yield BUILDERS[name](Inputs(sizes))
