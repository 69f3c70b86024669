"""Forces and virial from edge gradients against derivatives of strained coordinates."""

from __future__ import annotations

import torch

from mlip.ops import forces_and_virial, segment_sum


def test_equals_autograd_of_positions_and_strain():
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    batch = torch.tensor([0, 0, 0, 1, 1])
    edge_index = torch.tensor([[1, 2, 0, 1, 4, 3], [0, 0, 1, 2, 3, 4]])
    offsets = torch.randn(6, 3, generator=generator, dtype=torch.float64)

    def energy(r, strain):
        deform = torch.eye(3, dtype=torch.float64) + strain
        moved = torch.einsum("ni,nij->nj", r, deform[batch])
        shifts = torch.einsum("ei,eij->ej", offsets, deform[batch[edge_index[1]]])
        vectors = moved[edge_index[0]] - moved[edge_index[1]] + shifts
        return vectors, (vectors**4).sum() + vectors.prod(1).sum()

    r = positions.clone().requires_grad_(True)
    strain = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    vectors, total = energy(r, strain)
    force_truth, virial_truth = torch.autograd.grad(total, (r, strain), retain_graph=True)
    (gradient,) = torch.autograd.grad(total, vectors)
    forces, virial = forces_and_virial(gradient, vectors.detach(), edge_index, batch, 5, 2)
    torch.testing.assert_close(forces, -force_truth, atol=1e-12, rtol=0)
    symmetric = 0.5 * (virial_truth + virial_truth.transpose(1, 2))
    torch.testing.assert_close(virial, symmetric, atol=1e-12, rtol=0)


def test_segment_sum_with_empty_segments():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    summed = segment_sum(values, torch.tensor([2, 2, 0]), 4)
    assert summed.tolist() == [[5.0, 6.0], [0.0, 0.0], [4.0, 6.0], [0.0, 0.0]]
