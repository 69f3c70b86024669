"""The hot-path operators: one public function each, defined in plain PyTorch.

``sum_messages`` runs the convolution by CPU kernels where it can (``mlip.ops.cpu``).
"""

from mlip.ops.backend import Backend, default_backend
from mlip.ops.convolution import ConvolutionSignature, Features, convolution, radial_convolution
from mlip.ops.edge_gradient import forces_and_virial
from mlip.ops.edge_sums import edge_sum, envelope_softmax, structure_sum
from mlip.ops.edge_vectors import edge_vectors
from mlip.ops.messages import sum_messages
from mlip.ops.nearest import nearest_edges
from mlip.ops.neighborhood import Neighborhood, neighborhood
from mlip.ops.recompute import by_groups
from mlip.ops.rotation import RotationSignature, rotate_gather, rotate_scatter
from mlip.ops.segment import segment_sum
from mlip.ops.shared_operator import operator_apply, operator_gather, operator_scatter
from mlip.ops.sphere_products import sphere_products
from mlip.ops.tables import table_like

__all__ = [
    "Backend",
    "ConvolutionSignature",
    "Features",
    "Neighborhood",
    "RotationSignature",
    "by_groups",
    "convolution",
    "default_backend",
    "edge_sum",
    "edge_vectors",
    "envelope_softmax",
    "forces_and_virial",
    "nearest_edges",
    "neighborhood",
    "operator_apply",
    "operator_gather",
    "operator_scatter",
    "radial_convolution",
    "rotate_gather",
    "rotate_scatter",
    "segment_sum",
    "sphere_products",
    "structure_sum",
    "sum_messages",
    "table_like",
]
