"""Every model passes the inherited physics suite; one subclass each."""

from __future__ import annotations

from tests.model_contract import ModelContract


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


SMALL_EQUIFORMER = {
    "cutoff": 4.2,
    "layers": 2,
    "channels": 6,
    "attention_hidden": 4,
    "heads": 2,
    "alpha_channels": 3,
    "value_channels": 3,
    "feed_forward_hidden": 8,
    "edge_channels": 8,
    "n_radial": 5,
    "average_degree": 20.0,
}


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


SMALL_TDN = {
    "cutoff": 4.2,
    "layers": 2,
    "channels": 8,
    "heads": 2,
    "n_radial": 5,
    "radial_hidden": (8,),
    "average_degree": 20.0,
}


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


class OnOneBackend(ModelContract):
    """The classes above run what `auto` chooses: kernels, or plain PyTorch for odd channels.

    Here every operator runs on the named back end or fails. What shows no number is left out.
    """

    test_unknown_elements_are_named = None
    test_save_and_load_give_the_same_bits = None
    test_global_state_is_left_alone = None
    test_the_graph_is_left_alone = None
    test_vacuum_of_a_slab_does_not_matter = None
    test_dynamics_conserve_energy = None


class TestFacetOnKernels(OnOneBackend):
    model = (
        "facet",
        {"cutoff": 4.2, "hidden": ((16, 16, 16), (16, 16)), "embedding": 8, "outputs": 8},
    )
    layers = 3
    backend = "numba"


class TestFacetOnPyTorch(OnOneBackend):
    model = TestFacet.model
    layers = 3
    backend = "torch"


class TestEquiformerV3OnKernels(OnOneBackend):
    model = (
        "equiformer_v3",
        {
            **SMALL_EQUIFORMER,
            "lmax": 2,
            "mmax": 1,
            "layers": 1,
            "channels": 16,
            "attention_hidden": 16,
            "feed_forward_hidden": 16,
            "value_channels": 8,
        },
    )
    layers = 2
    inversion = False
    backend = "numba"


class TestTDNOnKernels(OnOneBackend):
    model = ("tdn", {**SMALL_TDN, "lmax": 2, "layers": 1, "channels": 16})
    layers = 2
    inversion = False
    backend = "numba"


class TestTDNOnPyTorch(OnOneBackend):
    model = ("tdn", {**SMALL_TDN, "lmax": 2, "layers": 1})
    layers = 2
    inversion = False
    backend = "torch"
