"""Every model passes the inherited physics suite; one subclass each.

Most run what `auto` chooses; the last ones run every operator on the named back end, or fail.
"""

from __future__ import annotations

from tests.contract.models import EQUIFORMER_V3, FACET, SMALL_EQUIFORMER, SMALL_TDN, TDN
from tests.model_contract import ModelContract, OnOneBackend


class TestFacet(ModelContract):
    model = (
        "facet",
        {"cutoff": 4.2, "hidden": ((6, 4, 3), (6, 4, 3)), "embedding": 6, "outputs": 6},
    )
    layers = 3


class TestFacetWithHighDegreeMessages(ModelContract):
    """The architecture of the shipped potential: messages of a higher degree than features."""

    model = (
        "facet",
        {
            "cutoff": 4.2,
            "hidden": ((6, 3),),
            "message": (5, 4, 4, 3),
            "embedding": 6,
            "outputs": 6,
        },
    )
    layers = 2


class TestFacetWithoutVectors(ModelContract):
    """A degree may be left out between the scalars and the highest."""

    model = (
        "facet",
        {"cutoff": 4.2, "hidden": ((6, 0, 4),), "embedding": 6, "outputs": 6},
    )
    layers = 2


class TestEquiformerV3(ModelContract):
    """Orders above mmax are dropped; the embedding passes messages too."""

    model = ("equiformer_v3", {**SMALL_EQUIFORMER, "lmax": 3, "mmax": 2})
    layers = 3
    inversion = False


class TestEquiformerV3WithAllOrders(ModelContract):
    model = ("equiformer_v3", {**SMALL_EQUIFORMER, "lmax": 2, "mmax": 2, "layers": 1})
    layers = 2
    inversion = False


class TestDirectEquiformerV3(ModelContract):
    """Forces of heads: no derivatives of the energy, so nothing that follows from one."""

    model = ("equiformer_v3", {**SMALL_EQUIFORMER, "lmax": 3, "mmax": 2, "prediction": "direct"})
    layers = 3
    inversion = False

    test_bonds_along_the_axes_are_no_special_case = None
    test_isolated_atoms_and_empty_edge_sets = None  # the stress head gives a lone atom a pressure
    test_no_net_force_no_torque_and_symmetric_stress = None
    test_forces_are_minus_the_gradient = None
    test_stress_is_the_strain_derivative_per_volume = None
    test_stress_equals_the_autograd_strain_derivative = None
    test_hessian_by_double_backward = None
    test_dynamics_conserve_energy = None


class TestTDN(ModelContract):
    """The embedding passes messages too. Cross products count: enantiomers may differ."""

    model = ("tdn", {**SMALL_TDN, "lmax": 2})
    layers = 3
    inversion = False


class TestTDNWithPublishedNorm(ModelContract):
    model = ("tdn", {**SMALL_TDN, "lmax": 3, "layers": 1, "norm": "degree"})
    layers = 2
    inversion = False


class TestDirectTDN(ModelContract):
    """Forces of a head and no stress: no derivatives of the energy, nothing that follows."""

    model = ("tdn", {**SMALL_TDN, "lmax": 2, "prediction": "direct"})
    layers = 4
    inversion = False

    test_isolated_atoms_and_empty_edge_sets = None
    test_training_gradient_through_forces_and_stress = None
    test_derivatives_on_request = None
    test_no_net_force_no_torque_and_symmetric_stress = None
    test_forces_are_minus_the_gradient = None
    test_stress_is_the_strain_derivative_per_volume = None
    test_stress_equals_the_autograd_strain_derivative = None
    test_hessian_by_double_backward = None
    test_dynamics_conserve_energy = None


class TestFacetOnKernels(OnOneBackend):
    model = FACET
    layers = 3
    backend = "numba"


class TestFacetOnPyTorch(OnOneBackend):
    model = TestFacet.model
    layers = 3
    backend = "torch"


class TestEquiformerV3OnKernels(OnOneBackend):
    model = EQUIFORMER_V3
    layers = 2
    inversion = False
    backend = "numba"


class TestTDNOnKernels(OnOneBackend):
    model = TDN
    layers = 2
    inversion = False
    backend = "numba"


class TestTDNOnPyTorch(OnOneBackend):
    model = ("tdn", {**SMALL_TDN, "lmax": 2, "layers": 1})
    layers = 2
    inversion = False
    backend = "torch"
