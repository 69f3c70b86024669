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
