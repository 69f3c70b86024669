"""Every format ASE reads comes in frame by frame; bad frames and damaged files are named."""

from __future__ import annotations

import bz2
import gzip
import lzma
from importlib.util import find_spec
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from mlip.datasets.collection import open_dataset
from mlip.datasets.labels import LabelKeys
from mlip.datasets.read import iterate_file
from mlip.datasets.store import StructureStore
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError

EXACT = {"traj", "db", "json"}


@pytest.fixture(scope="module")
def vasp_files() -> Path:
    """The VASP outputs that ASE ships for its own tests."""
    spec = find_spec("ase")
    folder = Path(spec.submodule_search_locations[0]) / "test" / "testdata" / "vasp"
    if not folder.is_dir():
        pytest.skip("this ASE comes without its test data")
    return folder


@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz", "a.traj", "a.db", "a.json"])
def test_formats_written_by_ase(tmp_path: Path, emt_frames: list[Atoms], name: str) -> None:
    path = tmp_path / name
    form = "extxyz" if path.suffix == ".xyz" else path.suffix[1:]
    ase.io.write(path, emt_frames, format=form)
    data = open_dataset(path)
    assert len(data) == len(emt_frames)
    assert data.n_atoms().tolist() == [len(a) for a in emt_frames]
    tolerance = 0 if form in EXACT else 1e-8
    for i, (structure, atoms) in enumerate(zip(data, emt_frames, strict=True)):
        results = atoms.calc.results
        np.testing.assert_allclose(structure.positions, atoms.positions, rtol=0, atol=tolerance)
        np.testing.assert_allclose(structure.cell, atoms.cell.array, rtol=0, atol=1e-12)
        np.testing.assert_allclose(structure.energy, results["energy"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(structure.forces, results["forces"], rtol=0, atol=tolerance)
        assert structure.numbers.tolist() == atoms.numbers.tolist()
        assert structure.pbc.tolist() == atoms.pbc.tolist()
        assert structure.tags.tolist() == atoms.get_tags().tolist()
        assert (structure.stress is None) == ("stress" not in results)
        if structure.stress is not None:
            expected = atoms.get_stress(voigt=False, apply_constraint=False)
            np.testing.assert_allclose(structure.stress, expected, rtol=0, atol=1e-8)
        fixed = np.zeros(len(atoms), bool) if structure.fixed is None else structure.fixed
        assert np.flatnonzero(fixed).tolist() == ([0, 1, 2] if i in {1, 3} else [])
        assert data.name(i) == f"{path} frame {i}"


@pytest.mark.parametrize("opener", [lzma, gzip, bz2], ids=lambda m: m.__name__)
def test_compressed_extxyz(tmp_path: Path, emt_frames: list[Atoms], opener: object) -> None:
    suffix = {lzma: "xz", gzip: "gz", bz2: "bz2"}[opener]
    plain, packed = tmp_path / "a.extxyz", tmp_path / f"b.extxyz.{suffix}"
    ase.io.write(plain, emt_frames)
    packed.write_bytes(opener.compress(plain.read_bytes()))
    energies = [s.energy for s in open_dataset(plain)]
    assert [s.energy for s in open_dataset(packed)] == energies
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"b.extxyz.*after \d+ frames.*interrupted download.*fetch"):
        open_dataset(packed)


def test_store_is_a_data_set_and_lists_concatenate(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    ase.io.write(tmp_path / "a.extxyz", emt_frames[:2])
    ase.io.write(tmp_path / "b.extxyz", emt_frames[2:])
    with StructureWriter(tmp_path / "c.lmdb") as writer:
        for structure in open_dataset(tmp_path / "a.extxyz"):
            writer.append(structure)
    assert isinstance(open_dataset(tmp_path / "c.lmdb"), StructureStore)
    both = open_dataset([tmp_path / "c.lmdb", str(tmp_path / "?.extxyz")])
    assert len(both) == 2 + 6
    expected = [a.calc.results["energy"] for a in [*emt_frames[:2], *emt_frames]]
    np.testing.assert_allclose([s.energy for s in both], expected, atol=1e-8)
    assert both.n_atoms().tolist() == [len(s) for s in both]
    assert both[-1].energy == both[7].energy
    assert both.name(4) == f"{tmp_path / 'b.extxyz'} frame 0"
    assert both.name(1) == f"{tmp_path / 'c.lmdb'} entry 1"
    with pytest.raises(IndexError):
        both[8]


KBAR = 1 / 1602.1766208  # eV/Å³


def test_vasp_outputs(vasp_files: Path) -> None:
    """Numbers read off the two files by eye; VASP counts compression positive, in kbar."""
    xml = open_dataset(vasp_files / "vasprun_pstress.xml")[-1]
    assert xml.energy == pytest.approx(-20.24720095, abs=1e-8)
    np.testing.assert_allclose(xml.stress, np.eye(3) * 165.9956258 * KBAR, rtol=1e-6, atol=1e-12)
    outcar = open_dataset(vasp_files / "OUTCAR_example_1")[0]
    xx, yy, zz, xy, yz, zx = -4.29429, -4.58894, -4.50342, 0.50047, -0.94049, 0.36481
    kbar = np.array([[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]])
    assert outcar.energy == pytest.approx(-68.23102426, abs=1e-8)
    np.testing.assert_allclose(outcar.stress, -kbar * KBAR, rtol=1e-6)
    assert outcar.forces.shape == (len(outcar), 3)


VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="version" type="string">6.4.2</i></generator>
 <incar></incar>
 <kpoints><varray name="kpointlist"><v>0 0 0</v></varray></kpoints>
 <atominfo><atoms>2</atoms><types>2</types>
  <array name="atoms"><set><rc><c>Na</c><c>1</c></rc><rc><c>Cl</c><c>2</c></rc></set></array>
 </atominfo>
 {structure}
 <calculation>
  <scstep>{energy}</scstep>
  {structure}
  <varray name="forces"><v>0 0 0.1</v><v>0 0 -0.1</v></varray>
  <varray name="stress"><v>10 1 2</v><v>1 20 3</v><v>2 3 -30</v></varray>
  {energy}
 </calculation>
</modeling>
"""
VASP_STRUCTURE = """<structure name="initialpos"><crystal>
 <varray name="basis"><v>4 0 0</v><v>0 5 0</v><v>0 0 6</v></varray></crystal>
 <varray name="positions"><v>0 0 0</v><v>0.5 0.5 0.5</v></varray></structure>"""
VASP_ENERGY = """<energy><i name="e_fr_energy">-10.5</i><i name="e_wo_entrp">-9.5</i>
 <i name="e_0_energy">-10.0</i></energy>"""


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_folder_of_a_vasp_run(tmp_path: Path, ending: str) -> None:
    text = VASPRUN.format(structure=VASP_STRUCTURE, energy=VASP_ENERGY).encode()
    path = tmp_path / f"vasprun.xml{ending}"
    path.write_bytes(gzip.compress(text) if ending else text)
    (tmp_path / "INCAR").write_text("ISMEAR = 0")
    s = open_dataset(tmp_path)[0]
    assert s.energy == -10.0
    assert s.numbers.tolist() == [11, 17]
    assert s.positions[1].tolist() == [2, 2.5, 3]
    assert s.forces.tolist() == [[0, 0, 0.1], [0, 0, -0.1]]
    expected = -KBAR * np.array([[10, 1, 2], [1, 20, 3], [2, 3, -30]])
    np.testing.assert_allclose(s.stress, expected, rtol=1e-7)
    assert open_dataset(tmp_path, keys=LabelKeys(energy="free_energy"))[0].energy == -10.5


ROW = 'Properties=species:S:1:pos:R:3:forces:R:3 energy={energy} pbc="F F F"'


def frame(
    energy: object = -1.0, rows: int = 2, says: int | None = None, force: str = "0 0 1"
) -> str:
    lines = [str(says if says is not None else rows), ROW.format(energy=energy)]
    return "\n".join([*lines, *(f"H 0 0 {i} {force}" for i in range(rows))]) + "\n"


BAD_FRAMES = {
    "nan energy": (frame("nan"), "energy.* is nan"),
    "nan force": (frame(force="0 nan 0"), "forces.* is nan"),
    "inf position": (frame().replace("H 0 0 1", "H 0 0 inf"), "positions.* is inf"),
    "two force columns": (frame().replace("forces:R:3", "forces:R:2"), r"forces.*shape \(2, 2\)"),
    "short row": (frame(force="0 1"), "cannot be parsed"),
    "letters": (frame(force="a b c"), "cannot be parsed.*could not convert"),
    "unknown element": (frame().replace("H 0 0 1", "Qq 0 0 1"), "cannot be parsed.*Qq"),
    "placeholder": (frame().replace("H 0 0 1", "X 0 0 1"), "atomic number 0"),
    "no atoms": (frame(rows=0), "no atoms"),
    "row missing": (frame(rows=2, says=3), "2 atoms, expected 3"),
    "row too many": (frame(rows=5, says=2), "expected the number of atoms, found 'H 0 0 2"),
    "flat cell": (
        frame().replace('pbc="F F F"', 'Lattice="5 0 0 0 5 0 0 0 0" pbc="T T T"'),
        "no volume but is periodic",
    ),
    "conflict": (frame().replace("pbc", "REF_energy=-9 pbc"), "conflicting energy"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_bad_frame_costs_only_itself(tmp_path: Path, case: str) -> None:
    text, message = BAD_FRAMES[case]
    path = tmp_path / "a.extxyz"
    path.write_text(frame(-1) + text + frame(-2) + frame(-3))
    entries = list(iterate_file(path))
    assert [e.structure.energy for e in entries if e.structure] in ([-1, -2, -3], [-1, -1, -2, -3])
    problems = [e for e in entries if e.problem]
    assert len(problems) == 1
    with pytest.raises(DataError, match=message):
        raise DataError(problems[0].problem)
    with pytest.raises(DataError, match=rf"a.extxyz frame {problems[0].frame}: .*mlip convert"):
        open_dataset(path)


def test_file_cut_inside_a_frame_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    path.write_text(frame(-1) + frame(-2) + frame(-3, rows=9)[:-50])
    entries = list(iterate_file(path))
    assert [e.structure.energy for e in entries[:2]] == [-1, -2]
    assert "frame 2: line 9: the file ends inside the frame" in entries[2].problem
    assert len(entries) == 3


def test_reading_can_start_anywhere(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    for name in ("a.extxyz", "a.traj", "a.db", "a.cfg"):
        path = tmp_path / name
        ase.io.write(path, emt_frames[:1] if name == "a.cfg" else emt_frames)
        whole = [(e.frame, e.structure.positions.tolist()) for e in iterate_file(path)]
        for start in range(1, len(whole) + 1):
            rest = [
                (e.frame, e.structure.positions.tolist()) for e in iterate_file(path, None, start)
            ]
            assert rest == whole[start:], (name, start)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, emt_frames: list[Atoms]) -> None:
    ase.io.write(tmp_path / "whole.traj", emt_frames)
    (tmp_path / "cut.traj").write_bytes((tmp_path / "whole.traj").read_bytes()[:300])
    ase.io.write(tmp_path / "whole.json", emt_frames)
    (tmp_path / "cut.json").write_text((tmp_path / "whole.json").read_text()[:300])
    (tmp_path / "empty.extxyz").touch()
    (tmp_path / "blank.extxyz").write_text("\n\n")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "sub").mkdir()
    (tmp_path / "binary.extxyz").write_bytes(b"2\n\xff\xfe\xff\n")
    for name, message in {
        "missing.extxyz": "no such file",
        "empty.extxyz": "the file is empty",
        "blank.extxyz": "no structures",
        "cut.traj": "cannot be read",
        "cut.json": "cannot be read",
        "noise.bin": "not a known format; known are .*mlip store",
        "binary.extxyz": "ends inside the frame",
        "*.nothing": "no file matches",
        "sub": "no data files in this folder; it is empty",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(tmp_path / name)
        assert str(tmp_path) in str(caught.value), name


def test_keys_reach_the_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    path.write_text(frame(-1).replace("pbc", "mine=-7 pbc"))
    assert open_dataset(path, keys=LabelKeys(energy="mine"))[0].energy == -7


def test_shared_samples_match_their_published_sums(shared: Path) -> None:
    samples = shared / "samples"
    for name, count, atoms, energy, squares in [
        ("oxides.extxyz", 60, 576, -4037.744291, 0.26777641),
        ("oxides.db", 60, 576, -4037.744291, 0.26777641),
        ("oxides.json", 60, 576, -4037.744291, 0.26777641),
        ("oxides.traj", 10, 60, -422.207369, 0.02111415),
        ("mptrj.extxyz", 60, 1841, -10928.896888, 959.00336560),
        ("oc20_raw/0.extxyz.xz", 40, 703, 807.829473, 909879.73077019),
        ("oc20_raw/1.extxyz", 41, 737, 909.457898, 1692078.08791939),
    ]:
        data = open_dataset(samples / name)
        assert (len(data), data.n_atoms().sum()) == (count, atoms), name
        assert sum(s.energy for s in data) == pytest.approx(energy, abs=1e-6), name
        total = sum((s.forces**2).sum() for s in data)
        assert total == pytest.approx(squares, rel=1e-9, abs=1e-8), name


@pytest.mark.parametrize(
    ("element", "train", "test"),
    [
        ("Si", 214, 25),
        ("Ge", 228, 25),
        ("Li", 241, 29),
        ("Mo", 194, 23),
        ("Cu", 262, 31),
        ("Ni", 263, 31),
    ],
)
def test_mlearn_counts(shared: Path, element: str, train: int, test: int) -> None:
    folder = shared / "data" / f"mlearn_{element}"
    for name, count in (("train", train), ("test", test)):
        entries = list(iterate_file(folder / f"{name}.extxyz.xz"))
        assert len(entries) == count
        assert all(e.structure.stress is not None for e in entries)
