"""Second derivatives of the convolution in one pass over packed arrays, as in ``runner.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlip.ops.cpu.program import Asked, is_generated, second_module
from mlip.ops.cpu.runner import Array, EdgeList, Layout, Part, in_parts, radial_arrays


@dataclass(frozen=True)
class Second:
    """Where the pass writes second derivatives, to ``features`` adds them; None: not wanted."""

    features: Array | None
    harmonics: Array | None
    radial: Array | None
    kernel: Array | None
    gradient: Array | None


def covers(layout: Layout) -> bool:
    """Whether there is something to do, of degrees whose products are written out."""
    return bool(layout.paths) and is_generated(layout.paths)


def second_derivatives(
    layout: Layout,
    features: Array,
    harmonics: Array,
    radial: Array,
    kernel: Array | None,
    gradient: Array,
    along_features: Array | None,
    along_harmonics: Array,
    along_radial: Array,
    edges: EdgeList,
    out: Second,
) -> None:
    """Write gradients of φ for cotangents of the gradients by features, harmonics and radial.

    Args:
        layout: shapes, which ``covers`` says the code is for.
        features, harmonics, radial, kernel, gradient, edges: as in ``runner.backward``.
        along_features, along_harmonics, along_radial: cotangents, shaped like these; the first
            may be None.
        out: where results go.
    """
    empty = np.empty(0, features.dtype)
    weights, basis, matrix, n_radial = radial_arrays(radial, kernel)
    along_weights, along_basis, _, _ = radial_arrays(along_radial, kernel)
    asked = Asked(
        along=along_features is not None,
        radial=kernel is not None,
        harmonics=out.harmonics is not None,
        kernel=out.kernel is not None,
        slopes=out.radial is not None or out.kernel is not None,
    )
    code = second_module(layout.paths, layout.lmax_edge, features.dtype.name, asked)
    slopes = empty if out.radial is None else out.radial.ravel()
    start, step = layout.rows(edges.n_nodes)

    def call(part: Part) -> None:
        code.second_pass(
            features, empty if along_features is None else along_features, harmonics.ravel(),
            along_harmonics.ravel(), weights, along_weights, basis, along_basis, matrix, gradient,
            edges.rowptr, edges.source, part.rows, part.features,
            empty if out.harmonics is None else out.harmonics.ravel(),
            slopes if n_radial == 0 else empty, slopes if n_radial else empty, part.kernel,
            empty if out.gradient is None else out.gradient, layout.group_channels,
            layout.feature_first(edges.n_nodes), part.first, layout.w_first, layout.n_weights,
            n_radial, start, step, *part.atoms,
        )  # fmt: skip

    in_parts(layout, edges, features.dtype, out.features, out.kernel, call)
