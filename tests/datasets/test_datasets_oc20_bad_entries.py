"""OC20 LMDB files: entries that are refused, by file, entry and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.datasets.formats.oc20 import open_oc20
from mlip.datasets.formats.reader import by_index
from mlip.datasets.options import ReadOptions
from mlip.datasets.read import iterate_file
from mlip.errors import DataError
from tests.datasets.oc20_entries import N, entry, opened, relaxation

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no positions": ({"pos": None}, "pos is missing"),
    "positions transposed": ({"pos": torch.ones(3, N)}, r"pos has shape \(3, 5\)"),
    "no atoms": ({"pos": torch.ones(0, 3), "natoms": 0}, "no atoms"),
    "natoms lies": ({"natoms": 4}, "natoms is 4, but pos has 5 rows"),
    "natoms of several": ({"natoms": torch.tensor([2, 3])}, "natoms has shape"),
    "pos is text": ({"pos": "text"}, "pos has shape"),
    "pos is nan": ({"pos": torch.full((N, 3), torch.nan)}, r"pos\[0, 0\] is nan"),
    "pos is complex": ({"pos": torch.ones(N, 3, dtype=torch.complex64)}, "pos holds complex64"),
    "no numbers": ({"atomic_numbers": None}, "atomic_numbers is missing"),
    "numbers too few": ({"atomic_numbers": torch.ones(N - 1)}, r"atomic_numbers has shape \(4,\)"),
    "number 0": ({"atomic_numbers": torch.arange(float(N))}, "atomic_numbers holds 0"),
    "number 119": ({"atomic_numbers": torch.full((N,), 119)}, "atomic_numbers holds 119"),
    "number 1.5": ({"atomic_numbers": torch.full((N,), 1.5)}, "atomic_numbers holds 1.5"),
    "number nan": ({"atomic_numbers": torch.full((N,), torch.nan)}, "atomic_numbers holds nan"),
    "no cell": ({"cell": None}, "cell is missing"),
    "flat cell": ({"cell": torch.zeros(1, 3, 3)}, "cell has no volume"),
    "coplanar cell": ({"cell": torch.ones(1, 3, 3)}, "cell has no volume"),
    "cell of two": ({"cell": torch.ones(2, 3, 3)}, r"cell has shape \(2, 3, 3\)"),
    "cell inf": ({"cell": torch.full((3, 3), torch.inf)}, r"cell\[0, 0\] is inf"),
    "energy inf": ({"y": float("inf")}, "y is inf"),
    "energy text": ({"y": "-1.5"}, "y is '-1.5', expected a number"),
    "energy true": ({"y": True}, "y is True"),
    "energy huge": ({"y": 2**60}, ""),
    "energies": ({"y": torch.ones(2)}, r"y has shape \(2,\)"),
    "two energies": ({"energy": -2.0}, "y is -1.5, but energy is -2.0"),
    "forces short": ({"force": torch.ones(N - 1, 3)}, r"force has shape \(4, 3\)"),
    "forces transposed": ({"force": torch.ones(3, N)}, r"force has shape \(3, 5\)"),
    "forces nan": ({"force": torch.full((N, 3), torch.nan)}, r"force\[0, 0\] is nan"),
    "two forces": ({"forces": torch.zeros(N, 3)}, "force and forces differ"),
    "tags half": ({"tags": torch.full((N,), 0.5)}, "tags holds 0.5"),
    "tags short": ({"tags": torch.zeros(N - 1)}, "tags has shape"),
    "fixed two": ({"fixed": torch.full((N,), 2)}, "fixed holds 2"),
    "edges out of range": ({"edge_index": torch.full((2, 3), N)}, "edge_index names atom 5"),
    "edges negative": ({"edge_index": torch.full((2, 3), -1)}, "edge_index names atom -1"),
    "edges transposed": ({"edge_index": torch.zeros(7, 2)}, r"edge_index has shape \(7, 2\)"),
    "edges real": ({"edge_index": torch.zeros(2, 7)}, "edge_index is of type float32"),
    "offsets short": (
        {"edge_index": torch.zeros(2, 7).long(), "cell_offsets": torch.zeros(6, 3).long()},
        r"cell_offsets has shape \(6, 3\), expected \(7, 3\)",
    ),
    "stress skew": ({"stress": torch.arange(9.0).reshape(3, 3)}, "stress is not symmetric"),
    "spin text": ({"spin": "up"}, "spin is 'up'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_entries_name_file_entry_and_field(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    path = tmp_path / "a.lmdb"
    dataset = opened(path, entry(), entry(**changes), entry())
    if not message:
        assert dataset[1].energy == 2.0**60
        return
    with pytest.raises(DataError, match=message) as caught:
        dataset[1]
    assert str(caught.value).startswith(f"{path}: entry 1: ")
    assert dataset[0].energy == dataset[2].energy == -1.5
    frames = list(by_index(open_oc20)(path, 0, ReadOptions()))
    assert [isinstance(frame, DataError) for _, frame in frames] == [False, True, False]
    found = list(iterate_file(path))
    assert [e.problem is None for e in found] == [True, False, True]
    assert found[1].problem is not None
    assert found[1].problem.count(str(path)) == 1


def test_bad_entries_of_a_relaxation(tmp_path: Path) -> None:
    cases = [
        ({"pos_relaxed": torch.ones(N - 1, 3)}, None, "pos_relaxed has shape"),
        ({"pos_relaxed": None}, "relaxed", "pos_relaxed is missing"),
        ({"y_relaxed": float("nan")}, "relaxed", "y_relaxed is nan"),
        ({"y_init": float("nan")}, None, "y_init is nan"),
    ]
    for i, (changes, frame, message) in enumerate(cases):
        dataset = opened(tmp_path / f"{i}.lmdb", relaxation(), relaxation(**changes), is2re=frame)
        with pytest.raises(DataError, match=message):
            dataset[1]
