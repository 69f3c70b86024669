"""Compare TDN with numbers of the official code.

Reads the golden format. A .npz holds factors ``cp_a``, ``cp_b``, ``cp_c`` and products of them; or
official weights ``sd/``, structures with edges, outputs and intermediates ``mid/``; or numbers of
the training code. A .json holds the shapes of all weights by name. Parts may be missing; what has
no counterpart here is listed as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlip.errors import DataError
from mlip.models.tdn_official import config_from_official, model_from_official, official_sizes
from mlip.ops.tensor_products import Degrees, Factors, mixed_product
from mlip.ops.tensor_products.factors import NAMES
from mlip.ops.tensor_products.interface import coupling_tensor
from mlip.penalty import penalty
from mlip.so3 import spherical_harmonics
from mlip.validation.parity import (
    TOLERANCE,
    Arrays,
    Deviation,
    Omission,
    Reading,
    Row,
    read_arrays,
    worst,
)
from mlip.validation.parity_tdn_model import compare_model

_TRAINING = re.compile(r"(loss_|eval_|rec/|record_|split/)")
_BY_STRUCTURE = "means over structures of means over their atoms; losses here are means over atoms"
_WITHOUT_COUNTERPART = {
    r"(loss|eval)_(rmse|mse|mae)": _BY_STRUCTURE,
    r"loss_p1": "penalises components: it depends on how a structure is turned; no such loss here",
    r"loss_cosine": "no such loss here",
    r"rec/|record_": "records of PubChemQCR are pickles, which this project does not read",
    r"batch": "serves means over structures alone",
    r"edge_vec": "the second input of the product is not made of it",
    r"split/": "drawn by Python's random module; `mlip data split` draws by NumPy's",
    r".*": "no counterpart known",
}


def compare_file(path: str | Path) -> list[Row]:
    """Compare one golden file of products, of a model or of the training code.

    Raises:
        DataError: not a file of the golden format.
    """
    if Path(path).suffix == ".json":
        return _compare_names(path)
    arrays = Reading(read_arrays(path))
    try:
        rows = _compare(arrays, path)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not a golden file of TDN ({reason})") from error
    return rows + _left_out(arrays.unread)


def _compare(arrays: Reading, path: str | Path) -> list[Row]:
    if {*NAMES, "x1"} <= set(arrays):
        return compare_product(arrays)
    if any(name.startswith("sd/") for name in arrays):
        return compare_model(arrays)
    if any(_TRAINING.match(name) for name in arrays):
        return compare_training(arrays)
    raise DataError(
        f"{path}: holds no factors with products, no weights sd/, nothing of the training of TDN"
    )


def compare_product(arrays: Arrays) -> list[Row]:
    """Compare a product with given factors and with the exact tensor, in float64 and float32."""
    mode = json.loads(str(arrays["meta"]))["mode"]
    factors = Factors(*(torch.from_numpy(arrays[name]).double() for name in NAMES))
    exact = coupling_tensor(Degrees(*(factors.lmax,) * 3))
    x, y, w = (torch.from_numpy(arrays[name]) for name in ("x1", "x2", "w"))
    rows: list[Row] = []
    if "cg" in arrays:
        rows.append(Deviation("exact tensor", "float64", worst(exact, arrays["cg"]), 1e-12))
    if y.shape[2] == 1 and "edge_vec" in arrays:
        vectors = torch.from_numpy(arrays["edge_vec"]).double()
        harmonics = spherical_harmonics(factors.lmax, vectors)[:, :, None]
        rows.append(Deviation("harmonics", "float64", worst(harmonics, arrays["x2"]), 1e-12))
    found = len(rows)
    for name, tensor in (("out_cp", factors.tensor), ("out_exact", exact)):
        for ending, dtype in (("", "float64"), ("", "float32"), ("_f32", "float32")):
            if name + ending not in arrays:
                continue
            truth = arrays[name + ending]
            scale = max(1.0, float(np.abs(truth).max(initial=0.0)))
            tolerance = TOLERANCE["float64"] if dtype == "float64" else 3e-5 * scale
            m, a, b, c = (part.to(getattr(torch, dtype)) for part in (tensor, x, y, w))
            ours = mixed_product(m, a, b, c, mode)
            rows.append(Deviation(name + ending, dtype, worst(ours, truth), tolerance))
    if len(rows) == found:
        raise KeyError("out_cp")
    return rows


def compare_training(arrays: Arrays) -> list[Row]:
    """Compare the one loss that both have: the mean length of the residual forces of atoms."""
    if not {"loss_p2", "pred", "target"} <= set(arrays):
        return []
    target = arrays["target"]
    kept = target[arrays["mask"]] if "mask" in arrays else target
    residual = torch.from_numpy(arrays["pred"] - kept).double()
    loss = penalty(residual, "l1", 0.0).mean()
    tolerance = TOLERANCE[arrays["loss_p2"].dtype.name]
    return [Deviation("loss_p2", "float64", worst(loss, arrays["loss_p2"]), tolerance)]


def _compare_names(path: str | Path) -> list[Row]:
    """Build a model of the size that shapes by name tell, which fails where one does not fit."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable .json file ({error})") from error
    if not (isinstance(content, Mapping) and all(isinstance(s, list) for s in content.values())):
        return [Omission(Path(path).name, "holds no shapes of weights by name")]
    weights = {name: torch.zeros(shape) for name, shape in content.items()}
    sizes = official_sizes(weights)
    model_from_official(weights, config_from_official(sizes, (1,)), dtype=torch.float32)
    return [Deviation(f"names and shapes of {len(weights)} weights", "float32", 0.0, 0.0)]


def _left_out(names: list[str]) -> list[Row]:
    """List what nobody asked for, with the reason; records and splits are one row each."""
    groups: dict[tuple[str, str], int] = {}
    for name in names:
        reason = next(r for pattern, r in _WITHOUT_COUNTERPART.items() if re.match(pattern, name))
        folder = re.sub(r"^(rec|split)/.*", r"\1/…", name)
        groups[folder, reason] = groups.get((folder, reason), 0) + 1
    return [
        Omission(f"{folder} ({n} arrays)" if n > 1 else folder, reason)
        for (folder, reason), n in groups.items()
    ]
