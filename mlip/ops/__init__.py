"""The hot-path operators: one public function each, defined in plain PyTorch."""

from mlip.ops.convolution import ConvolutionSignature, Features, convolution, radial_convolution
from mlip.ops.edge_gradient import forces_and_virial
from mlip.ops.nearest import nearest_edges
from mlip.ops.neighborhood import Neighborhood, neighborhood
from mlip.ops.recompute import by_groups
from mlip.ops.segment import segment_sum
from mlip.ops.softmax import envelope_softmax
from mlip.ops.tables import table_like

__all__ = [
    "ConvolutionSignature",
    "Features",
    "Neighborhood",
    "by_groups",
    "convolution",
    "envelope_softmax",
    "forces_and_virial",
    "nearest_edges",
    "neighborhood",
    "radial_convolution",
    "segment_sum",
    "table_like",
]
