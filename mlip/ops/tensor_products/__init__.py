"""The family of equivariant tensor products behind one interface; docs/tdn.md compares them."""

from mlip.ops.tensor_products.coupling import ClebschGordanProduct, SharedProduct
from mlip.ops.tensor_products.factors import (
    EXACT_RANK,
    Factors,
    equivariance_error,
    find_factors,
    load_factors,
    published_rank,
    save_factors,
)
from mlip.ops.tensor_products.gaunt import GauntProduct
from mlip.ops.tensor_products.interface import Degrees, TensorProduct, coupled_paths
from mlip.ops.tensor_products.low_rank import LowRankProduct, mixed_product
from mlip.ops.tensor_products.vector_harmonics import VectorHarmonicProduct

__all__ = [
    "EXACT_RANK",
    "ClebschGordanProduct",
    "Degrees",
    "Factors",
    "GauntProduct",
    "LowRankProduct",
    "SharedProduct",
    "TensorProduct",
    "VectorHarmonicProduct",
    "coupled_paths",
    "equivariance_error",
    "find_factors",
    "load_factors",
    "mixed_product",
    "published_rank",
    "save_factors",
]
