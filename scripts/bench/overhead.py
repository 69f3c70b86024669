"""Time what a call of the ASE calculator costs beside the model.

    OMP_NUM_THREADS=1 python scripts/bench/overhead.py [--atoms 108] [--cutoff 5]

The model is one that does nothing: its energy is zero times the sum of the edge vectors. What is
left is neighbours, the graph, checks, the way through autograd, forces, virial and ASE. Atoms move
as in dynamics. Processor time of one thread, median and range of 50 calls.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from copper import copper
from pydantic import BaseModel
from spread import spread
from torch import Tensor, nn

from mlip.potential import Potential
from mlip.simulation.calculator import Calculator


class NothingConfig(BaseModel):
    """What every model has."""

    elements: tuple[int, ...] = (29,)
    cutoff: float = 5.0


class Nothing(nn.Module):
    """No model."""

    elements = (29,)

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff, self.config = cutoff, NothingConfig(cutoff=cutoff)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, graph) -> Tensor:  # type: ignore[no-untyped-def]
        return (0 * graph.edge_vector.sum()).expand(len(graph.atomic_numbers))


def main() -> None:
    """Print one line for each way of keeping neighbours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atoms", type=int, default=108)
    parser.add_argument("--cutoff", type=float, default=5.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    atoms = copper(args.atoms)
    rng = np.random.default_rng(0)
    potential = Potential(
        Nothing(args.cutoff), reference_energies={29: 0.0}, metadata={"model": "nothing"}
    ).eval()
    for name, options in (("with the default skin", {}), ("without skin", {"skin": 0.0})):
        atoms.calc = Calculator(potential, **options)
        times = []
        for _ in range(55):
            atoms.positions += rng.normal(0, 1e-3, atoms.positions.shape)
            start = time.process_time()
            atoms.get_forces()
            atoms.get_stress()
            atoms.get_potential_energy()
            times.append(1e3 * (time.process_time() - start))
        print(f"{len(atoms)} atoms, {name}: {spread(times[5:])} ms")


if __name__ == "__main__":
    main()
