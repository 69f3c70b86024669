"""Mathematics of rotations: harmonics, Clebsch–Gordan tensors, Wigner matrices, sphere grids."""

from mlip.so3.clebsch_gordan import clebsch_gordan
from mlip.so3.grids import SphereGrid, latitude_longitude_grid, minimal_grid
from mlip.so3.harmonics import spherical_harmonics
from mlip.so3.orders import degree_major, order_major, order_sizes
from mlip.so3.wigner import rotation_to_axis, wigner_matrices

__all__ = [
    "SphereGrid",
    "clebsch_gordan",
    "degree_major",
    "latitude_longitude_grid",
    "minimal_grid",
    "order_major",
    "order_sizes",
    "rotation_to_axis",
    "spherical_harmonics",
    "wigner_matrices",
]
