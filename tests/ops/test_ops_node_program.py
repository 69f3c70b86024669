"""Steps of node programs against PyTorch in float64, and products on the sphere against a grid."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from mlip.ops import sphere_products
from mlip.ops.cpu import node_program, threads
from mlip.ops.cpu.node_program import Matrix, Program
from mlip.ops.cpu.packed_products import PackedProducts
from mlip.so3 import minimal_grid

ATOMS, CHANNELS, SCALE = 37, 40, 0.7  # two tiles; the last vector is half full in float32
CASES = [
    (1, 1, 2),
    (1, 3, 4),
    (2, 2, 3),
    (2, 0, 3),
    (3, 1, 3),
    (2, 2, 4),
    (4, 4, 2),
]  # degrees, factors
DTYPES = [torch.float32, torch.float64]
DOUBLE = torch.float64


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


def packed(channels: tuple[int, ...], atoms: int = ATOMS) -> list[torch.Tensor]:
    """Random features, one [N, 2l + 1, C] for each degree."""
    return [random(atoms, 2 * degree + 1, n) for degree, n in enumerate(channels)]


def flat(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts]).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, factor: float = 8) -> bool:
    bound = factor * torch.finfo(found.dtype).eps * expected.norm()
    return bool((found.double() - expected).norm() <= bound)


def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((size,), torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("atoms", [1, 7, 108])
@pytest.mark.parametrize("shape", [(5, 3), (33, 50), (40, 16), (16, 64), (0, 8), (3, 129), (4, 0)])
def test_matrix_products_of_each_degree(shape, atoms, dtype):
    depth, columns = shape
    x, before = packed((2, depth), atoms), packed((0, columns), atoms)
    matrix = random(depth, columns)
    program = Program()
    given, out = program.given((2, depth)), program.given((0, columns))
    program.multiply(out, given, 1, Matrix(matrix.to(dtype)))
    found = empty(atoms * 3 * columns, dtype)
    program.run(atoms, flat(x, dtype), found)
    assert close(found, (x[1] @ matrix).flatten())
    program = Program()
    given, out = program.given((2, depth)), program.given((0, columns))
    program.multiply(out, given, 1, Matrix(matrix.to(dtype)), add=True)
    found = flat(before, dtype)
    program.run(atoms, flat(x, dtype), found)
    assert close(found, (before[1] + x[1] @ matrix).flatten())


def test_a_matrix_of_another_shape_is_refused():
    program = Program()
    x, out = program.given((5,)), program.local((3,))
    with pytest.raises(ValueError, match=r"matrix of degree 0 is \(3, 5\), not \(5, 3\)"):
        program.multiply(out, x, 0, Matrix(torch.zeros(3, 5)))


@pytest.mark.parametrize("x", [torch.zeros(9), torch.zeros(10, dtype=DOUBLE), torch.zeros(20)[::2]])
def test_a_tensor_that_is_not_what_its_buffer_holds_is_refused(x):
    """The compiled code would read beyond it."""
    program = Program()
    given, out = program.given((5,)), program.given((3,))
    program.multiply(out, given, 0, Matrix(torch.zeros(5, 3)))
    with pytest.raises(ValueError, match=r"a buffer of 10 numbers got \("):
        program.run(2, x, torch.zeros(6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_its_slopes(dtype):
    x = torch.cat([torch.linspace(-120, 120, 999, dtype=DOUBLE), random(1000)])
    x = x.to(dtype).double().requires_grad_()  # values that both precisions hold
    seed = random(1999).to(dtype).double()
    expected = torch.nn.functional.silu(x)
    (slopes,) = torch.autograd.grad(expected, x, seed)
    program = Program()
    given, gradient, out, of_x = (program.given((1,)) for _ in range(4))
    program.multiply(program.local((1,)), given, 0, Matrix(torch.ones(1, 1, dtype=dtype)))
    program.silu(out, given)
    program.silu_slopes(of_x, gradient, given)
    found = [empty(1999, dtype) for _ in range(2)]
    program.run(1999, x.detach().to(dtype), seed.to(dtype), *found)
    eps = torch.finfo(dtype).eps
    assert ((found[0].double() - expected).abs() <= 4 * eps * expected.abs() + 1e-30).all()
    assert ((found[1].double() - slopes).abs() <= 8 * eps * (1 + slopes.abs())).all()


def test_values_that_are_not_numbers_stay_so():
    program = Program()
    given, out = program.given((1,)), program.given((1,))
    program.multiply(program.local((1,)), given, 0, Matrix(torch.ones(1, 1)))
    program.silu(out, given)
    found = torch.zeros(2)
    program.run(2, torch.tensor([torch.nan, 1.0]), found)
    assert found[0].isnan()
    assert found[1].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_and_their_slopes(dtype):
    channels = (CHANNELS, 17, 3)
    x = [part.requires_grad_() for part in packed(channels)]
    gates = random(ATOMS, sum(channels)).requires_grad_()
    seeds = [part.flip(0) for part in packed(channels)]
    first, *others = gates.split(channels, 1)
    out = [x[0] + first[:, None]]
    out += [part * (1 + gate[:, None]) for part, gate in zip(x[1:], others, strict=True)]
    slopes = torch.autograd.grad(out, [*x, gates], seeds)
    program = Program()
    wide = gates.shape[1:]
    of_x, of_gates, seed, given, gate, result = (
        program.given(n) for n in (channels, wide, channels, channels, wide, channels)
    )
    unit = torch.eye(CHANNELS, dtype=dtype)
    program.multiply(program.local((CHANNELS,)), given, 0, Matrix(unit))
    program.gated(result, given, gate)
    program.gated(of_x, seed, gate, add_gates=False)
    program.gate_slopes(of_gates, given, seed)
    found = [empty(n, dtype) for n in program.sizes(ATOMS)]
    found[2:5] = flat(seeds, dtype), flat(x, dtype), flat([gates], dtype)
    program.run(ATOMS, *found)
    assert close(found[5], flat(out, DOUBLE))
    assert close(found[0], flat(list(slopes[:3]), DOUBLE))
    assert close(found[1], slopes[3].flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_channels_are_added_and_copied(dtype):
    x, before = packed((5, 20)), packed((7, 16, 3))
    program = Program()
    given, out, copied = (program.given(n) for n in ((5, 20), (7, 16, 3), (7,)))
    program.multiply(program.local((5,)), given, 0, Matrix(torch.eye(5, dtype=dtype)))
    program.add(out, given)
    program.copy(copied, given, 0)
    found = [flat(x, dtype), flat(before, dtype), empty(7 * ATOMS, dtype)]
    program.run(ATOMS, *found)
    before[0][..., :5] += x[0]
    before[1] += x[1][..., :16]
    assert close(found[1], flat(before, DOUBLE))
    wide = torch.nn.functional.pad(x[0], (0, 2))
    assert torch.equal(found[2], wide.flatten().to(dtype))


def sphere_truth(lmax: int, lmax_out: int, order: int) -> list[list[torch.Tensor]]:
    """Factors, products, a seed, and the slopes of the factors, in float64 on an exact grid."""
    u = random(ATOMS, (lmax + 1) ** 2, order * CHANNELS).requires_grad_()
    seed = random(ATOMS, (lmax_out + 1) ** 2, (order - 1) * CHANNELS)
    grid = minimal_grid(order * lmax + lmax_out, max(lmax, lmax_out))
    to_grid = SCALE * grid.to_grid[:, : (lmax + 1) ** 2]
    out = sphere_products(u, to_grid, grid.from_grid[: (lmax_out + 1) ** 2], order, "torch")
    (slopes,) = torch.autograd.grad(out, u, seed)
    sizes = [[2 * l + 1 for l in range(top + 1)] for top in (lmax, lmax_out)]  # noqa: E741
    return [x.split(sizes[x.shape[1] != (lmax + 1) ** 2], 1) for x in (u, out, seed, slopes)]


def sphere_program(case: tuple[int, int, int], dtype: torch.dtype) -> Program:
    """Products and slopes; from and to the memory of the caller by unit matrices."""
    lmax, lmax_out, order = case
    program = Program(PackedProducts(*case, SCALE, CHANNELS))
    factors = (order * CHANNELS,) * (lmax + 1)
    products = ((order - 1) * CHANNELS,) * (lmax_out + 1)
    u, seed, out, of_u = (program.given(n) for n in (factors, products, products, factors))
    v, dv, du = (program.local(n) for n in (products, products, factors))
    program.products(v, u)
    for degree, n in enumerate(products):
        program.multiply(out, v, degree, Matrix(torch.eye(n, dtype=dtype)))
        program.multiply(dv, seed, degree, Matrix(torch.eye(n, dtype=dtype)))
    program.slopes(du, dv, u)
    for degree, n in enumerate(factors):
        program.multiply(of_u, du, degree, Matrix(torch.eye(n, dtype=dtype)))
    return program


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_on_the_sphere_and_slopes(case, dtype):
    u, out, seed, slopes = (flat(list(x), DOUBLE) for x in sphere_truth(*case))
    found = [empty(len(x), dtype) for x in (out, slopes)]
    sphere_program(case, dtype).run(ATOMS, u.to(dtype), seed.to(dtype), *found)
    assert close(found[0], out)
    assert close(found[1], slopes)


def test_threads_do_not_change_a_bit(monkeypatch):
    u, out, seed, slopes = (flat(list(x), torch.float32) for x in sphere_truth(2, 2, 3))
    program = sphere_program((2, 2, 3), torch.float32)
    monkeypatch.setattr(node_program, "SERIAL", 0)
    runs = []
    for n in (1, 3):
        monkeypatch.setattr(threads, "available_threads", lambda n=n: n)
        found = [torch.zeros_like(x) for x in (out, slopes)]
        program.run(ATOMS, u, seed, *found)
        runs.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_atoms():
    none = torch.empty(0)
    sphere_program((2, 2, 3), torch.float32).run(0, none, none, none, none)


def test_matrices_of_two_precisions_are_refused():
    program = Program()
    x, out = program.given((5,)), program.given((3,))
    program.multiply(out, x, 0, Matrix(torch.zeros(5, 3)))
    with pytest.raises(ValueError, match="of one precision"):
        program.multiply(out, x, 0, Matrix(torch.zeros(5, 3, dtype=DOUBLE)), add=True)


@pytest.mark.parametrize("kind", ["products", "slopes"])
def test_products_of_factors_that_lie_elsewhere_are_refused(kind):
    """The compiled code takes the address of factors as it comes."""
    program = Program(PackedProducts(1, 1, 2, SCALE, CHANNELS))
    given, local = program.given((80, 80)), program.local((80, 80))
    write = {
        "products": program.products,
        "slopes": lambda out, u: program.slopes(out, out, u),
    }[kind]
    for out, u in ((local, local), (given, given)):
        with pytest.raises(ValueError, match="factors of products are given"):
            write(out, u)
