"""The physics that every model must obey; a model joins with one subclass in tests/models.

All checks run in float64 on random weights, scaled so that forces are of order 1 eV/Å, through
`Potential`, and compare with finite differences, larger cells, rotated copies: never with stored
numbers. Lengths are multiples of the model's own cutoff where they must reach past it.
"""

from __future__ import annotations

from tests.contract.derivatives import Derivatives
from tests.contract.locality import Locality
from tests.contract.programs import Programs
from tests.contract.symmetry import Symmetry


class ModelContract(Symmetry, Locality, Derivatives, Programs):
    """Inherit and set `model` and `layers`; pytest then runs every check on the model."""


class OnOneBackend(ModelContract):
    """The checks that show numbers, for operators that run on a named back end."""

    test_unknown_elements_are_named = None
    test_save_and_load_give_the_same_bits = None
    test_global_state_is_left_alone = None
    test_the_graph_is_left_alone = None
    test_vacuum_of_a_slab_does_not_matter = None
    test_dynamics_conserve_energy = None
