"""Two orders of the coefficients (l, m) with |m| ≤ mmax: degree by degree, and order by order.

Degree-major (l² + l + m where nothing is left out) is the order of node features; order-major is
that of features in the frame of an edge, where layers act on each order m separately.
"""

from __future__ import annotations

Coefficient = tuple[int, int]


def degree_major(lmax: int, mmax: int) -> tuple[Coefficient, ...]:
    """List (l, m) with |m| ≤ min(l, mmax): l rising, inside a degree m rising."""
    return tuple(
        (degree, order)
        for degree in range(lmax + 1)
        for order in range(-min(degree, mmax), min(degree, mmax) + 1)
    )


def order_major(lmax: int, mmax: int) -> tuple[Coefficient, ...]:
    """List (l, m) with |m| ≤ min(l, mmax): m = 0, +1, −1, +2, −2, …, inside an order l rising."""
    signed = [0, *(sign * order for order in range(1, mmax + 1) for sign in (1, -1))]
    return tuple((degree, order) for order in signed for degree in range(abs(order), lmax + 1))


def order_sizes(lmax: int, mmax: int) -> tuple[int, ...]:
    """Count the coefficients of the orders 0, +1, −1, … in the sequence of ``order_major``."""
    higher = (lmax + 1 - order for order in range(1, mmax + 1) for _ in (1, -1))
    return (lmax + 1, *higher)
