"""Products with constant matrices in the layout of oneDNN."""

from __future__ import annotations

import pytest
import torch

from mlip.ops import PackedMatrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 7, 256, 1000])
def test_equal_to_the_plain_product(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    matrix, x, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((48, 37), (rows, 37), (48,))
    )
    packed = PackedMatrix(matrix.to(dtype))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    exact = torch.einsum("ei,oi->eo", x, matrix)
    for found, expected in (
        (packed(x.to(dtype)), exact),
        (packed(x.to(dtype), bias.to(dtype)), exact + bias),
        (packed(torch.cat([x, x], dim=1).to(dtype)[:, 37:]), exact),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * 10)
    turned = PackedMatrix(matrix.to(dtype).T)
    back = turned(exact.to(dtype)).double()
    torch.testing.assert_close(back, exact @ matrix, rtol=tolerance, atol=1e-3 * tolerance * 1e4)


def test_it_can_be_switched_off(monkeypatch):
    assert PackedMatrix(torch.ones(2, 2, dtype=torch.float64)).packed is False
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = PackedMatrix(torch.ones(2, 2))
    assert not plain.packed
    assert plain(torch.ones(1, 2)).tolist() == [[2.0, 2.0]]
