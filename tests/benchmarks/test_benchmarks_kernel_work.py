"""Counts of operations against loops over single numbers, whose results autograd confirms."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from mlip.benchmarks.kernel_cases import FACTORS, N_RADIAL, Sizes, cases
from mlip.benchmarks.kernel_work import Work, products_work
from mlip.ops.sphere_products import ProductSignature
from mlip.so3 import clebsch_gordan

Entries = list[tuple[int, int]]
ATOMS, EDGES, CHANNELS, LMAX = 3, 5, 2, 3
DOUBLE = torch.float64


class Tally:
    """Arithmetic that counts itself: two for a multiply-add or a scaling, one for the rest."""

    def __init__(self) -> None:
        self.operations = 0

    def multiply_add(self, total: float, a: float, b: float) -> float:
        self.operations += 2
        return total + a * b

    def dot(self, pairs: list[tuple[float, float]]) -> float:
        total = 0.0
        for a, b in pairs:
            total = self.multiply_add(total, a, b)
        return total

    def scaled(self, weight: float, values: list[float]) -> list[float]:
        self.operations += 2 * len(values)
        return [weight * value for value in values]

    def product(self, a: float, b: float) -> float:
        self.operations += 1
        return a * b

    def add(self, a: float, b: float) -> float:
        self.operations += 1
        return a + b


def numbers(*shape: int) -> Tensor:
    generator = random.Random(sum(shape))
    size = torch.Size(shape).numel()
    return torch.tensor([generator.gauss(0, 1) for _ in range(size)], dtype=DOUBLE).view(shape)


def case_work(name: str) -> Work:
    (case,) = cases([name], Sizes(ATOMS, EDGES, CHANNELS, LMAX, torch.zeros(0)))
    return case.work


class FourLinear:
    """φ = Σ y[k] · w · M[k, i] · x[i] with w given, or w = b·K; one edge, one channel."""

    def __init__(self, entries: Entries, d_in: int, d_out: int, n_radial: int = 0) -> None:
        self.entries, self.d_in, self.d_out = entries, d_in, d_out
        mask = torch.zeros(d_out, d_in, dtype=DOUBLE)
        for k, i in entries:
            mask[k, i] = 1
        shapes = [(d_out,), (d_out, d_in), (d_in,)] + ([(n_radial,)] * 2 if n_radial else [(1,)])
        self.arguments = [numbers(*shape) for shape in shapes]
        self.cotangents = [torch.cos(3 * a) for a in self.arguments[1:]]
        self.arguments[1] *= mask
        self.cotangents[0] *= mask
        self.mask = mask

    def value(self, y: Tensor, m: Tensor, x: Tensor, *weight: Tensor) -> Tensor:
        w = weight[0] @ weight[1] if len(weight) > 1 else weight[0]
        return (y * w) @ (m * self.mask) @ x

    def truth(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Result, gradients by M, x and weights, gradients of those along the cotangents."""
        leaves = [a.clone().requires_grad_() for a in self.arguments]
        result, *first = torch.autograd.grad(self.value(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(first, leaves, self.cotangents)
        return result.detach(), [part.detach() for part in first], list(second)

    def sums(self, tally: Tally, rows: list[float] | None, columns: list[float] | None, m: list):
        """Σ_k y[k] M[k, i], or Σ_i M[k, i] x[i]."""
        total = [0.0] * (self.d_in if columns is None else self.d_out)
        for k, i in self.entries:
            at, factor = (i, rows[k]) if columns is None else (k, columns[i])
            total[at] = tally.multiply_add(total[at], m[k][i], factor)
        return total

    def outer(self, tally: Tally, w: float, y: list[float], x: list[float], out: list) -> None:
        """Add w·y⊗x to out at the entries."""
        if self.d_out <= self.d_in:
            y = tally.scaled(w, y)
        else:
            x = tally.scaled(w, x)
        for k, i in self.entries:
            out[k][i] = tally.multiply_add(out[k][i], y[k], x[i])

    def weight(self, tally: Tally, first: list[float], second: list[float] | None) -> float:
        if second is None:
            return first[0]
        return tally.dot(list(zip(first, second, strict=True)))

    def zeros(self) -> list[list[float]]:
        return [[0.0] * self.d_in for _ in range(self.d_out)]

    def forward(self, tally: Tally) -> list[float]:
        _, m, x, b, *kernel = (part.tolist() for part in self.arguments)
        w = self.weight(tally, b, kernel[0] if kernel else None)
        if self.d_in < self.d_out:
            return self.sums(tally, None, tally.scaled(w, x), m)
        return tally.scaled(w, self.sums(tally, None, x, m))

    def backward(self, tally: Tally) -> list[list]:
        y, m, x, b, *kernel = (part.tolist() for part in self.arguments)
        w = self.weight(tally, b, kernel[0] if kernel else None)
        t, by_m = self.sums(tally, y, None, m), self.zeros()
        by_x = [tally.multiply_add(0.0, w, value) for value in t]
        by_w = tally.dot(list(zip(t, x, strict=True)))
        self.outer(tally, w, y, x, by_m)
        if not kernel:
            return [by_m, by_x, [by_w]]
        return [by_m, by_x, *(tally.scaled(by_w, part) for part in (kernel[0], b))]

    def double_backward(self, tally: Tally) -> list[list]:
        y, m, x, b, *kernel = (part.tolist() for part in self.arguments)
        of_m, of_x, of_b, *of_kernel = (part.tolist() for part in self.cotangents)
        w, of_w = b[0], of_b[0]
        if kernel:
            w = self.weight(tally, b, kernel[0])
            of_w = tally.dot(list(zip(of_b + b, kernel[0] + of_kernel[0], strict=True)))
        plain = self.sums(tally, None, x, m)
        pairs = zip(self.sums(tally, None, of_x, m), self.sums(tally, None, x, of_m), strict=True)
        turned = [a + b for a, b in pairs]  # one sum of twice as many terms: nothing to count
        by_y = [tally.dot([(w, t), (of_w, p)]) for t, p in zip(turned, plain, strict=True)]
        back = zip(self.sums(tally, y, None, of_m), self.sums(tally, y, None, m), strict=True)
        by_x = [tally.dot([(w, s), (of_w, r)]) for s, r in back]
        by_w, by_m = tally.dot(list(zip(y, turned, strict=True))), self.zeros()
        self.outer(tally, w, y, of_x, by_m)
        self.outer(tally, of_w, y, x, by_m)
        if not kernel:
            return [by_y, by_m, by_x, [by_w]]
        slope = tally.dot(list(zip(y, plain, strict=True)))
        by_weights = [
            [tally.dot([(a, by_w), (c, slope)]) for a, c in zip(values, along, strict=True)]
            for values, along in ((kernel[0], of_kernel[0]), (b, of_b))
        ]
        return [by_y, by_m, by_x, *by_weights]

    def work(self) -> Work:
        """Count the passes, after their results have been found right."""
        tallies = [Tally() for _ in Work._fields]
        found = (
            self.forward(tallies[0]),
            self.backward(tallies[1]),
            self.double_backward(tallies[2]),
        )
        result, first, second = self.truth()
        torch.testing.assert_close(torch.tensor(found[0], dtype=DOUBLE), result)
        for own, truth in ((found[1], first), (found[2], second)):
            for a, b in zip(own, truth, strict=True):
                torch.testing.assert_close(torch.tensor(a, dtype=DOUBLE), b)
        return Work(*(tally.operations for tally in tallies))


def total(works: list[Work], times: int) -> tuple[int, ...]:
    return tuple(times * sum(parts) for parts in zip(*works, strict=True))


def paths_of_the_case() -> list[tuple[int, int, int]]:
    degrees = range(LMAX + 1)
    return [
        path
        for path in itertools.product(degrees, repeat=3)
        if sum(path) % 2 == 0 and abs(path[0] - path[1]) <= path[2] <= path[0] + path[1]
    ]


@pytest.mark.parametrize(
    ("name", "n_radial"), [("convolution", 0), ("radial_convolution", N_RADIAL)]
)
def test_convolution(name, n_radial):
    works = []
    for l1, l2, l3 in paths_of_the_case():
        table = clebsch_gordan(l1, l2, l3).abs().amax(1) > 1e-10  # [m1, m3]
        entries = [(m3, m1) for m1, m3 in table.nonzero().tolist()]
        works.append(FourLinear(entries, 2 * l1 + 1, 2 * l3 + 1, n_radial).work())
    assert case_work(name) == total(works, EDGES * CHANNELS)


@pytest.mark.parametrize(("name", "ends"), [("rotate_gather", 2), ("rotate_scatter", 1)])
def test_rotations(name, ends):
    works = []
    for degree in range(LMAX + 1):
        rows, columns = 2 * min(degree, 2) + 1, 2 * degree + 1  # the case keeps orders to 2
        pair = (rows, columns) if name == "rotate_scatter" else (columns, rows)
        entries = list(itertools.product(range(pair[1]), range(pair[0])))
        works.append(FourLinear(entries, *pair).work())
    assert case_work(name) == total(works, ends * EDGES * CHANNELS)


@pytest.mark.parametrize(("name", "ends"), [("operator_gather", 2), ("operator_scatter", 1)])
def test_shared_operators(name, ends):
    width = (LMAX + 1) ** 2
    entries = list(itertools.product(range(width), repeat=2))
    product = FourLinear(entries, width, width).work()
    one = (ends - 1) * width  # features of the other ends added, or a gradient added to them
    sums = Work(
        one,  # x
        one + one,  # x, gradient by it
        one + one + one,  # x, its cotangent, gradient by x
    )
    assert case_work(name) == total([product, sums], EDGES * CHANNELS)


class Products:
    """Running products of values of functions at one point, from and to coefficients."""

    def __init__(self, order: int, rows: int, out_rows: int) -> None:
        self.order = order
        self.u, self.c = numbers(order, rows), numbers(rows, order).T.contiguous()
        self.g = numbers(order - 1, out_rows)
        self.there, self.back = numbers(rows) + 1, numbers(out_rows) - 1

    def value(self, u: Tensor, g: Tensor) -> Tensor:
        f = u @ self.there
        return sum((g[i - 1] @ self.back) * f[: i + 1].prod() for i in range(1, self.order))

    def values(self, tally: Tally, u: Tensor, at: Tensor) -> list[float]:
        return [tally.dot(list(zip(row, at.tolist(), strict=True))) for row in u.tolist()]

    def coefficients(self, tally: Tally, values: list[float], at: Tensor) -> list[list[float]]:
        return [[tally.multiply_add(0.0, v, a) for a in at.tolist()] for v in values]

    def running(self, tally: Tally, f: list[float]) -> list[float]:
        return list(itertools.accumulate(f, tally.product))

    def forward(self, tally: Tally) -> list[list[float]]:
        products = self.running(tally, self.values(tally, self.u, self.there))
        return self.coefficients(tally, products[1:], self.back)

    def backward(self, tally: Tally) -> list[list[float]]:
        f, h = self.values(tally, self.u, self.there), self.values(tally, self.g, self.back)
        p, by_f, slope = self.running(tally, f[:-1]), [0.0] * self.order, h[-1]
        for i in range(self.order - 1, 0, -1):
            by_f[i] = tally.product(slope, p[i - 1])
            slope = tally.product(slope, f[i])
            if i > 1:
                slope = tally.add(slope, h[i - 2])
        by_f[0] = slope
        return self.coefficients(tally, by_f, self.there)

    def double_backward(self, tally: Tally) -> list[list[list[float]]]:
        f, h = self.values(tally, self.u, self.there), self.values(tally, self.g, self.back)
        c = self.values(tally, self.c, self.there)
        p, q = self.running(tally, f[:-1]), [c[0]]  # products and their slopes along c
        for i in range(1, self.order):
            q.append(tally.add(tally.product(q[-1], f[i]), tally.product(p[i - 1], c[i])))
        by_f, of_q, of_p = [0.0] * self.order, h[-1], None
        for i in range(self.order - 1, 0, -1):
            by_f[i], next_p = tally.product(of_q, q[i - 1]), tally.product(of_q, c[i])
            if of_p is not None:
                by_f[i] = tally.add(by_f[i], tally.product(of_p, p[i - 1]))
                next_p = tally.add(next_p, tally.product(of_p, f[i]))
            if i > 1:
                of_q = tally.add(tally.product(of_q, f[i]), h[i - 2])
            of_p = next_p
        by_f[0] = of_p
        by_g = self.coefficients(tally, q[1:], self.back)
        return [self.coefficients(tally, by_f, self.there), by_g]


@pytest.mark.parametrize("order", [2, 3, 4])
def test_sphere_products(order):
    case, tallies = Products(order, 4, 3), [Tally() for _ in Work._fields]
    u, g = (part.clone().requires_grad_() for part in (case.u, case.g))
    by_u, by_g = torch.autograd.grad(case.value(u, g), (u, g), create_graph=True)
    second = torch.autograd.grad((by_u * case.c).sum(), (u, g))
    found = case.double_backward(tallies[2])
    pairs = [(case.forward(tallies[0]), by_g), (case.backward(tallies[1]), by_u)]
    for own, truth in [*pairs, *zip(found, second, strict=True)]:
        torch.testing.assert_close(torch.tensor(own, dtype=DOUBLE), truth.detach())
    counted = tuple(2 * tally.operations for tally in tallies)
    assert products_work(ProductSignature(4, 3, 2, order)) == counted


def test_products_of_the_case():
    width = (LMAX + 1) ** 2
    (case,) = cases(["sphere_products"], Sizes(ATOMS, EDGES, CHANNELS, LMAX, torch.zeros(0)))
    one, other = (products_work(ProductSignature(width, width, g, FACTORS)) for g in (1, 2))
    points = case.work.forward // (one.forward * ATOMS * CHANNELS)
    assert points >= width  # fewer could not hold the functions
    assert case.work == one.times(points * ATOMS * CHANNELS)
    assert other == one.times(2)


def test_forces_and_virial():
    """Loops over the components of one edge; the symmetric part belongs to a structure."""
    g, d, u, v, force = (numbers(3).roll(i) for i in range(5))
    strain = numbers(3, 3)
    tallies = [Tally() for _ in Work._fields]
    both = list(itertools.product(range(3), repeat=2))

    def moved(total: list[float], values: Tensor, tally: Tally, sign: int) -> list[float]:
        return [tally.add(a, sign * b) for a, b in zip(total, values.tolist(), strict=True)]

    def tensor(pairs: list[tuple[Tensor, Tensor]], tally: Tally) -> Tensor:
        out = torch.zeros(3, 3, dtype=DOUBLE)
        for (i, j), (a, b) in itertools.product(both, pairs):
            out[i, j] = tally.multiply_add(float(out[i, j]), float(a[i]), float(b[j]))
        return (out + out.T) / 2

    def applied(s: Tensor, vector: Tensor, start: list[float], tally: Tally) -> Tensor:
        rows = zip(start, s.tolist(), strict=True)
        return torch.tensor(
            [a + tally.dot(list(zip(row, vector.tolist(), strict=True))) for a, row in rows],
            dtype=DOUBLE,
        )

    def value(g: Tensor, d: Tensor, force: Tensor, strain: Tensor) -> Tensor:
        outer = torch.outer(g, d)  # the source is an atom at rest: its force is 0 here
        return force @ g + (strain * (outer + outer.T) / 2).sum()

    zero, s = [0.0] * 3, (strain + strain.T) / 2
    leaves = [part.clone().requires_grad_() for part in (g, d, force, strain)]
    first = torch.autograd.grad(value(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad((first[0] * u).sum() + (first[1] * v).sum(), leaves)
    target, _ = moved(zero, g, tallies[0], 1), moved(zero, g, tallies[0], -1)
    virial = tensor([(g, d)], tallies[0])
    start = moved(force.tolist(), torch.zeros(3), tallies[1], -1)
    slopes = applied(s, d, start, tallies[1]), applied(s, g, zero, tallies[1])
    of_force, _ = moved(zero, u, tallies[2], 1), moved(zero, u, tallies[2], -1)
    of_strain = tensor([(u, d), (v, g)], tallies[2])
    of_both = applied(s, v, zero, tallies[2]), applied(s, u, zero, tallies[2])
    found = [*slopes, torch.tensor(target, dtype=DOUBLE), virial]
    for own, truth in zip(found, first, strict=True):
        torch.testing.assert_close(own, truth.detach())
    found = [*of_both, torch.tensor(of_force, dtype=DOUBLE), of_strain]
    for own, truth in zip(found, second, strict=True):
        torch.testing.assert_close(own, truth)
    counted = Work(*(tally.operations for tally in tallies))
    assert case_work("forces_and_virial") == counted.times(EDGES)


def test_a_sum_over_rows():
    """The gradient is a copy; the gradient of that by the gradient of the sum is a sum again."""
    assert case_work("segment_sum") == (EDGES * CHANNELS, 0, EDGES * CHANNELS)


@pytest.mark.parametrize("name", ["segment_softmax", "gated_product"])
def test_what_has_several_forms_is_not_counted(name):
    assert case_work(name) is None
