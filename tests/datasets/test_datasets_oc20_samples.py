"""OC20 LMDB files: the samples, good and bad, give what is written down beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip.datasets.formats.oc20 import open_oc20
from mlip.datasets.formats.reader import by_index
from mlip.datasets.options import ReadOptions
from mlip.errors import DataError

SAMPLES = (
    "is2re_legacy", "is2re_oct2020", "is2re_pyg2", "oc20_numpy1", "oc20_s2ef_fc1",
    "oc20_s2ef_legacy",
)  # fmt: skip


def described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return value.dtype.name if isinstance(value, np.generic) else type(value).__name__


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_as_expected(shared: Path, name: str) -> None:
    expected = json.loads((shared / "samples" / "expected.json").read_text())[name]
    files = sorted((shared / "samples" / name).glob("*.lmdb"))
    parts = [open_oc20(path, ReadOptions()) for path in files]
    structures = [structure for part in parts for structure in part]
    first = structures[0]
    assert len(structures) == expected["structures"]
    assert sum(int(part.n_atoms().sum()) for part in parts) == expected["natoms_total"]
    assert sum(int(s.numbers.sum()) for s in structures) == expected["numbers_sum"]
    assert first.energy == expected["first_energy"]
    energies = [s.energy for s in structures if s.energy is not None]
    assert sum(energies) == pytest.approx(expected["energy_sum"], rel=1e-14)
    squares = sum(float((s.forces**2).sum()) for s in structures if s.forces is not None)
    assert squares == pytest.approx(expected["force_sumsq"], rel=1e-14)
    assert first.forces is not None
    assert first.forces[0].tolist() == expected["first_force"]
    assert sum(int(s.tags.sum()) for s in structures if s.tags is not None) == expected["tags_sum"]
    fixed = [s.fixed for s in structures if s.fixed is not None]
    assert sum(int(f.sum()) for f in fixed) == expected["fixed_sum"]
    assert first.info.get("sid") == expected.get("first_sid")
    assert first.info.get("fid") == expected.get("first_fid")
    raw = parts[0].raw(0)
    assert {key: described(value) for key, value in raw.items()} == expected["fields"]
    assert all(part.facts.problems == () for part in parts)
    if "y_relaxed_sum" in expected:
        total = sum(s.info["y_init"] for s in structures)
        assert total == pytest.approx(expected["y_init_sum"], rel=1e-14)
    if "pos_relaxed_sum" in expected:
        total = sum(float(np.sum(s.info["pos_relaxed"])) for s in structures)
        assert total == pytest.approx(expected["pos_relaxed_sum"], rel=1e-6)


def test_bad_samples(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shared / "samples" / "bad"
    refused = {"truncated_half", "truncated_meta", "empty_file", "not_lmdb", "evil_length_key"}
    seen = 0
    for case in json.loads((folder / "CASES.json").read_text()):
        path = folder / case["case"] / "data.0000.lmdb"
        if not path.exists():
            continue
        seen += 1
        if case["case"] in refused:
            with pytest.raises(DataError, match=str(path)):
                open_oc20(path, ReadOptions())
            continue
        dataset = open_oc20(path, ReadOptions())
        frames = by_index(open_oc20)(path, 0, ReadOptions())
        problems = {i: e for i, e in frames if isinstance(e, DataError)}
        assert all(str(e).startswith(f"{path}: entry {i}: ") for i, e in problems.items())
        bad = list(problems)
        wanted = [case["bad_index"]] if "bad_index" in case else []
        wanted = case.get("missing", wanted)
        if case["case"] == "missing_forces":
            assert dataset[0].forces is None
            wanted = []
        elif case["case"] == "page_zeroed":
            wanted = bad[:1]
            assert len(bad) == 1
        assert bad == wanted, case["case"]
    assert seen > 25
    assert list(tmp_path.iterdir()) == []
    for place in (folder, Path.cwd(), folder.parent):
        assert not list(place.rglob("mlip_pwned*"))
