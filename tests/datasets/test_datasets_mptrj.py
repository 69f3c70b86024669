"""The MPtrj document: found without reading it whole, units turned, damage named."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip.datasets.collection import open_dataset
from mlip.datasets.formats import mptrj
from mlip.datasets.labels import LabelKeys
from mlip.datasets.read import find_reader, iterate_file
from mlip.errors import DataError, DataWarning

KBAR = 1 / 1602.1766208  # eV/Å³
CELL = [[4.0, 0, 0], [0, 5.0, 0], [1.0, 0, 6.0]]


def site(element: str, xyz: list[float], **changes: Any) -> dict[str, Any]:
    return {"species": [{"element": element, "occu": 1}], "xyz": xyz, "properties": {}, **changes}


def frame(number: int = 0, **changes: Any) -> dict[str, Any]:
    content = {
        "structure": {
            "@class": "Structure",
            "lattice": {"matrix": CELL, "a": 4.0},
            "sites": [site("Na", [0, 0, 0]), site("Cl", [2.0, 2.5, 3.0])],
        },
        "uncorrected_total_energy": -float(number),
        "corrected_total_energy": -float(number) - 0.5,
        "force": [[0, 0, 0.1], [0, 0, -0.1]],
        "stress": [[1, 0, 0], [0, -2, 0.5], [0, 0.5, 3]],
        "magmom": None,
        "bandgap": 1.5,
        "mp_id": f"mp-{number // 2}",
        **changes,
    }
    return {name: value for name, value in content.items() if value is not ...}


def document(frames: list[dict[str, Any]]) -> dict[str, Any]:
    """Two frames a material."""
    result: dict[str, Any] = {}
    for i, content in enumerate(frames):
        result.setdefault(f"mp-{i // 2}", {})[f"mp-{i // 2}-0-{i % 2}"] = content
    return result


def write(path: Path, frames: list[dict[str, Any]], **options: Any) -> Path:
    path.write_text(json.dumps(document(frames), **options))
    return path


@pytest.mark.parametrize("indent", [None, 1])
def test_frames(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "any.json", [frame(i) for i in range(5)], indent=indent)
    assert "MPtrj" in find_reader(path).name
    data = open_dataset(path)
    assert [s.energy for s in data] == [-0.0, -1.0, -2.0, -3.0, -4.0]
    assert data.n_atoms().tolist() == [2] * 5
    s = data[3]
    assert s.numbers.tolist() == [11, 17]
    assert s.positions.tolist() == [[0, 0, 0], [2.0, 2.5, 3.0]]
    assert s.cell.tolist() == CELL
    assert s.pbc.all()
    assert s.forces.tolist() == [[0, 0, 0.1], [0, 0, -0.1]]
    expected = -KBAR * np.array([[1, 0, 0], [0, -2, 0.5], [0, 0.5, 3]])
    np.testing.assert_allclose(s.stress, expected, rtol=1e-7, atol=1e-12)
    assert s.info == {
        "sid": "mp-1-0-1", "mp_id": "mp-1", "corrected_total_energy": -3.5, "magmom": None,
        "bandgap": 1.5,
    }  # fmt: skip
    assert data.name(3) == f"{path} frame mp-1-0-1"
    assert [e.used["energy"] for e in iterate_file(path)] == [
        "uncorrected_total_energy (frame)"
    ] * 5


def test_other_energy_by_its_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [frame(2)])
    keys = LabelKeys(energy="corrected_total_energy")
    s = open_dataset(path, keys=keys)[0]
    assert s.energy == -2.5
    assert "corrected_total_energy" not in s.info
    with pytest.raises(DataError, match="no_such is missing"):
        open_dataset(path, keys=LabelKeys(energy="no_such"))[0]


def test_fractional_positions(tmp_path: Path) -> None:
    sites = [{"species": [{"element": "H", "occu": 1.0}], "abc": [0.5, 0.2, 1.0]}]
    content = frame(structure={"lattice": {"matrix": CELL}, "sites": sites}, force=[[0, 0, 0]])
    s = open_dataset(write(tmp_path / "a.json", [content]))[0]
    np.testing.assert_allclose(s.positions, [[3.0, 1.0, 6.0]], atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 100, 10**6])
def test_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Braces, quotes and backslashes within strings are no structure, wherever a chunk ends."""
    odd = ["}", '{"a": {', "\\", '"', '\\"{', "ü}"]
    frames = [frame(i, note=odd[i % 6], **{f"k{odd[i % 6]}": {"x": [{}]}}) for i in range(12)]
    path = write(tmp_path / "a.json", frames, ensure_ascii=False)
    monkeypatch.setattr(mptrj, "_CHUNK", size)
    data = open_dataset(path)
    assert len(data) == 12
    for i, s in enumerate(data):
        assert s.energy == -i
        assert s.info["note"] == odd[i % 6]
        assert s.info["sid"] == f"mp-{i // 2}-0-{i % 2}"


def test_document_that_ends_early(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [frame(i) for i in range(4)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.warns(DataWarning, match=r"ends early, the last whole frame is .*mp-1-0-0"):
        data = open_dataset(path)
    assert [data[i].energy for i in range(3)] == [0, -1, -2]
    with pytest.raises(DataError, match=r"a\.json frame 3: .*ends early.*mp-1-0-0: fetch it again"):
        data[3]
    entries = list(iterate_file(path))
    assert [e.problem is None for e in entries] == [True, True, True, False]
    with pytest.warns(DataWarning):
        assert len(open_dataset(path, policy="skip")) == 3
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"a\.json: "):
        open_dataset(path)


def disordered() -> dict[str, Any]:
    half = [{"element": "Na", "occu": 0.5}, {"element": "K", "occu": 0.5}]
    return {"lattice": {"matrix": CELL}, "sites": [site("Na", [0, 0, 0], species=half)]}


def with_sites(*sites: Any) -> dict[str, Any]:
    return {"lattice": {"matrix": CELL}, "sites": list(sites)}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "disordered": ({"structure": disordered()}, r"site 0 is disordered \(Na 0.5, K 0.5\)"),
    "no element": ({"structure": with_sites(site("Qq", [0, 0, 0]))}, "'Qq', which is no element"),
    "no place": (
        {"structure": with_sites({"species": [{"element": "H", "occu": 1}]})},
        "neither xyz",
    ),
    "no structure": ({"structure": ...}, "no structure with a list of sites"),
    "no lattice": ({"structure": {"sites": [site("H", [0, 0, 0])]}}, "no lattice matrix"),
    "null energy": ({"uncorrected_total_energy": None}, "uncorrected_total_energy is null"),
    "short force": ({"force": [[0, 0, 0]]}, r"force has shape \(1, 3\)"),
    "odd stress": ({"stress": [[0, 1, 0], [0, 0, 0], [0, 0, 0]]}, "stress is not symmetric"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_frame_costs_only_itself(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    path = write(tmp_path / "a.json", [frame(0), frame(1, **changes), frame(2)])
    data = open_dataset(path)
    assert (data[0].energy, data[2].energy) == (0, -2)
    with pytest.raises(DataError, match=message) as caught:
        data[1]
    assert str(caught.value).startswith(f"{path} frame mp-0-0-1: ")


def test_damaged_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [frame(i) for i in range(3)])
    path.write_bytes(path.read_bytes().replace(b"-1.0,", b"-1-0,", 1))
    data = open_dataset(path)
    assert (data[0].energy, data[2].energy) == (0, -2)
    with pytest.raises(DataError, match=r"a\.json frame 1: the frame is no JSON"):
        data[1]


def test_document_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read is larger than a chunk or a frame."""
    path = write(tmp_path / "a.json", [frame(i) for i in range(400)])
    monkeypatch.setattr(mptrj, "_CHUNK", 10_000)
    sizes = [len(chunk) for _, chunk in mptrj._chunks(path)]
    assert max(sizes) <= 10_001
    assert sum(sizes) == path.stat().st_size
    data = open_dataset(path)
    assert data._places.nbytes <= 16 * 400
    assert len(data._bytes(7)) < 1000


def test_fork_pickle_fingerprint(
    tmp_path: Path, in_child: Callable[[Callable[[], Any]], tuple[str, Any]]
) -> None:
    path = write(tmp_path / "a.json", [frame(i) for i in range(3)])
    data = open_dataset(path)
    assert in_child(lambda: data[2].energy) == ("ok", -2.0)
    copy = pickle.loads(pickle.dumps(data))
    assert copy[1].energy == -1
    before = data.fingerprint()
    assert copy.fingerprint() == before
    write(path, [frame(i + 1) for i in range(3)])
    assert open_dataset(path).fingerprint() != before
    with pytest.raises(DataError, match="changed while in use"):
        data[0]


def test_sample_is_what_others_made_of_it(shared: Path) -> None:
    """The same frames through another converter, in another order."""
    folder = shared / "samples" / "mptrj_json"
    data = open_dataset(folder / "MPtrj_2022.9_full.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        others = {s.info["sid"]: s for s in open_dataset(folder / "aselmdb*")}
    assert len(data) == len(others) == 30
    for s in data:
        other = others[s.info["sid"]]
        assert s.energy == other.energy
        assert s.numbers.tolist() == other.numbers.tolist()
        assert s.forces.tolist() == other.forces.tolist()
        np.testing.assert_allclose(s.cell, other.cell, atol=1e-12)
        np.testing.assert_allclose(s.stress, other.stress, rtol=1e-7)
        shift = np.linalg.solve(s.cell.T, (s.positions - other.positions).T)
        np.testing.assert_allclose(shift, np.rint(shift), atol=1e-9)
