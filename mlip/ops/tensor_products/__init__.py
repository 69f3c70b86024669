"""The family of equivariant tensor products behind one interface; docs/tdn.md compares them."""

from mlip.ops.tensor_products.coupling import (
    ClebschGordanProduct,
    SharedProduct,
    apply_operator,
)
from mlip.ops.tensor_products.gaunt import GauntProduct
from mlip.ops.tensor_products.interface import Degrees, TensorProduct, coupled_paths
from mlip.ops.tensor_products.vector_harmonics import VectorHarmonicProduct

__all__ = [
    "ClebschGordanProduct",
    "Degrees",
    "GauntProduct",
    "SharedProduct",
    "TensorProduct",
    "VectorHarmonicProduct",
    "apply_operator",
    "coupled_paths",
]
