"""The contract suite itself: a healthy model passes, each broken one fails the right check."""

from __future__ import annotations

import pytest
import torch

import mlip.models
from mlip.potential import Potential
from tests.contract.base import ELEMENTS, REFERENCES, cluster, crystal
from tests.model_contract import ModelContract
from tests.toy_models import DirectForces, SkewStress, Toy, ToyConfig, WrongSignStress

TOY = ("tests.toy_models", "Toy", "ToyConfig")


class TestHealthyToy(ModelContract):
    """The toy without a fault."""

    model = ("toy", {})

    @pytest.fixture(autouse=True, scope="class")
    def _registered(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(mlip.models._MODELS, "toy", TOY)
            yield


class ToyContract(ModelContract):
    """Checks to be run by hand on a toy with a fault; pytest does not collect this name."""

    def __init__(self, fault: str = "none", wrapper: type[Potential] = Potential) -> None:
        self.fault, self.wrapper = fault, wrapper

    def make_model(self) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Toy(ToyConfig(elements=ELEMENTS, fault=self.fault))

    def make_potential(self) -> Potential:
        """Scale by the healthy twin: some faults have no finite forces of their own."""
        if self.fault == "none" and self.wrapper is Potential:
            return super().make_potential()
        scale = ToyContract().make_potential().to_header()["scale"]["Cu"]
        return self.wrapper(
            self.make_model().double(),
            reference_energies=REFERENCES,
            scale=dict.fromkeys(ELEMENTS, scale),
        ).eval()


@pytest.mark.parametrize(
    ("fault", "check", "arguments"),
    [
        ("prefers x", "test_rotation_and_inversion", {"make": crystal}),
        ("prefers x", "test_no_net_force_no_torque_and_symmetric_stress", {}),
        ("prefers x", "test_bonds_along_the_axes_are_no_special_case", {}),
        ("prefers x", "test_perfect_rock_salt_keeps_its_symmetry", {}),
        ("chiral", "test_rotation_and_inversion", {"make": cluster}),
        ("pole", "test_bonds_along_the_axes_are_no_special_case", {}),
        ("centre of mass", "test_translation_and_wrapped_images", {"make": crystal}),
        ("wraps atoms", "test_translation_and_wrapped_images", {"make": crystal}),
        ("order of edges", "test_permutation_of_atoms", {}),
        ("order of edges", "test_permutation_of_the_edges_of_a_target", {}),
        ("mean over atoms", "test_supercells_are_extensive", {"repeats": (2, 1, 1)}),
        ("mean over atoms", "test_tiny_cells_equal_their_supercell", {"kind": "fcc"}),
        ("mean over atoms", "test_distant_fragments_add", {}),
        ("sees the batch", "test_batch_equals_single", {}),
        ("sees the batch", "test_no_gradient_across_structures", {}),
        ("sees the batch", "test_receptive_field_is_exact", {}),
        ("mean of neighbours", "test_isolated_atoms_and_empty_edge_sets", {}),
        ("mean of neighbours", "test_isolated_atoms_can_be_trained_on", {}),
        ("mean of neighbours", "test_batch_equals_single", {}),
        ("wraps atoms", "test_vacuum_of_a_slab_does_not_matter", {}),
        ("detached term", "test_forces_are_minus_the_gradient", {"make": cluster}),
        ("detached term", "test_stress_is_the_strain_derivative_per_volume", {"make": crystal}),
        ("single precision", "test_forces_are_minus_the_gradient", {"make": cluster}),
        ("no double backward", "test_hessian_by_double_backward", {}),
        ("no double backward", "test_training_gradient_through_forces_and_stress", {}),
        ("hard cutoff", "test_cutoff_crossing_is_smooth", {"bound": False}),
        ("hard cutoff", "test_cutoff_crossing_is_smooth", {"bound": True}),
        ("kinked cutoff", "test_cutoff_crossing_is_smooth", {"bound": False}),
        ("kinked cutoff", "test_cutoff_crossing_is_smooth", {"bound": True}),
        ("curvature jump", "test_cutoff_crossing_is_smooth", {"bound": False}),
        ("curvature jump", "test_cutoff_crossing_is_smooth", {"bound": True}),
        ("hard cutoff", "test_dynamics_conserve_energy", {}),
        ("noise", "test_same_input_same_bits", {}),
        ("noise", "test_global_state_is_left_alone", {}),
        ("global dtype", "test_global_state_is_left_alone", {}),
        ("edits the graph", "test_the_graph_is_left_alone", {}),
    ],
)
def test_a_broken_model_is_rejected(fault, check, arguments):
    contract = ToyContract(fault)
    with pytest.raises(AssertionError):
        getattr(contract, check)(contract.make_potential(), **arguments)


@pytest.mark.parametrize(
    ("wrapper", "check", "arguments"),
    [
        (WrongSignStress, "test_stress_is_the_strain_derivative_per_volume", {"make": crystal}),
        (WrongSignStress, "test_stress_equals_the_autograd_strain_derivative", {}),
        (SkewStress, "test_no_net_force_no_torque_and_symmetric_stress", {}),
        (DirectForces, "test_forces_are_minus_the_gradient", {"make": crystal}),
        (DirectForces, "test_dynamics_conserve_energy", {}),
    ],
)
def test_a_broken_potential_is_rejected(wrapper, check, arguments):
    contract = ToyContract(wrapper=wrapper)
    with pytest.raises(AssertionError):
        getattr(contract, check)(contract.make_potential(), **arguments)


@pytest.mark.parametrize("fault", ["hard cutoff", "chiral", "noise"])
def test_a_fault_does_not_fail_unrelated_checks(fault):
    contract = ToyContract(fault)
    potential = contract.make_potential()
    contract.test_distant_fragments_add(potential)
    contract.test_unknown_elements_are_named(potential)
    contract.test_no_gradient_across_structures(potential)
