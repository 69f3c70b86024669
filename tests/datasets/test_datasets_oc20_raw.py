"""Raw OC20 text: frames and text belong together or are refused; damage costs its frame."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from mlip.datasets.collection import open_dataset
from mlip.datasets.read import find_reader, iterate_file
from mlip.errors import DataError

HEADER = (
    'Lattice="9 0 0 0 9 0 0 0 20" Properties=species:S:1:pos:R:3:move_mask:L:1:tags:I:1:forces:R:3 '
    'energy={energy} free_energy=-99.0 pbc="T T T"'
)


def frame(energy: float, atoms: int = 3) -> str:
    rows = [f"Cu 0.0 0.0 {i}.0 {'FT'[i > 0]} {i % 3} 0.0 0.0 0.{i}" for i in range(atoms)]
    return "\n".join([str(atoms), HEADER.format(energy=energy), *rows]) + "\n"


def line(i: int) -> str:
    return f"random{1000 + i},frame{7 * i},{0.25 * i:.8f}\n"


def write(folder: Path, n: int = 4, lines: list[str] | None = None, name: str = "0") -> Path:
    path = folder / f"{name}.extxyz"
    path.write_text("".join(frame(-10.0 - i) for i in range(n)))
    (folder / f"{name}.txt").write_text("".join(map(line, range(n)) if lines is None else lines))
    return path


def pack(path: Path) -> Path:
    packed = path.with_name(path.name + ".xz")
    packed.write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    return packed


@pytest.mark.parametrize("packed", [False, True])
def test_frames_with_their_references(tmp_path: Path, packed: bool) -> None:
    path = write(tmp_path)
    if packed:
        path = pack(path)
        pack(tmp_path / "0.txt")
    assert "raw OC20" in find_reader(path).name
    data = open_dataset(path)
    assert data.facts.energy_convention == "total"
    assert [s.energy for s in data] == [-10, -11, -12, -13]
    assert data[2].info == {"sid": 1002, "fid": 14, "reference_energy": 0.5}
    assert data[0].fixed.tolist() == [True, False, False]
    assert data[0].tags.tolist() == [0, 1, 2]
    referred = open_dataset(path, energy_convention="adsorption")
    assert referred.facts.energy_convention == "adsorption"
    assert [s.energy for s in referred] == [-10, -11.25, -12.5, -13.75]
    assert [e.frame for e in iterate_file(path, None, 2)] == [2, 3]
    assert [e.structure.info["sid"] for e in iterate_file(path, None, 2)] == [1002, 1003]


@pytest.mark.parametrize("n", [0, 3, 5])
def test_wrong_number_of_lines(tmp_path: Path, n: int) -> None:
    """Nothing at all is given: a line that is missing may be any."""
    path = write(tmp_path, 4, [line(i) for i in range(n)])
    given = []
    with pytest.raises(DataError, match=rf"0\.txt: {n} lines for the 4 frames of 0\.extxyz"):
        given.extend(iterate_file(path))
    assert given == []


@pytest.mark.parametrize(
    "text", ["random1,frame2\n", "random1,2,0.5\n", "random1,frame2,nan\n", "\n", "a,frame1,1,2\n"]
)
def test_malformed_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, 3, [line(0), text, line(2)])
    with pytest.raises(DataError, match=r"0\.txt: line 2 is '.*expected random<sid>,frame<fid>"):
        open_dataset(path)


def test_damaged_sidecar(tmp_path: Path) -> None:
    path = write(tmp_path)
    packed = pack(tmp_path / "0.txt")
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"0\.txt\.xz: the file is damaged"):
        open_dataset(path)


def test_other_text_beside_a_plain_file(tmp_path: Path) -> None:
    path = write(tmp_path, 2, ["notes on this run\n"], name="run")
    assert "raw OC20" not in find_reader(path).name
    data = open_dataset(path)
    assert data.facts.energy_convention is None
    assert "sid" not in data[0].info


def test_trajectories_with_a_common_table(tmp_path: Path) -> None:
    for number in (7, 8):
        path = write(tmp_path, 2, name=f"random{number}")
        (tmp_path / f"random{number}.txt").unlink()
    (tmp_path / "system.txt").write_text("random7,1.5\nrandom9,3\n")
    data = open_dataset(tmp_path / "random7.extxyz", energy_convention="adsorption")
    assert [s.energy for s in data] == [-11.5, -12.5]
    assert [(s.info["sid"], s.info["fid"]) for s in data] == [(7, 0), (7, 1)]
    with pytest.raises(DataError, match=r"system\.txt: there is no line for random8"):
        open_dataset(path)


def test_bad_frame_keeps_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    path.write_text(path.read_text().replace("energy=-11.0", "energy=nan"))
    entries = list(iterate_file(path))
    assert "frame 1: energy (calculator) is nan" in entries[1].problem
    assert [e.structure.info["sid"] for e in entries if e.structure] == [1000, 1002, 1003]


@pytest.mark.parametrize("cut", [2, 30, 60])
def test_text_cut_inside_a_frame(tmp_path: Path, cut: int) -> None:
    """Also where the last number lost only its last digit."""
    path = write(tmp_path, 4)
    path.write_text(path.read_text()[:-cut])
    entries = list(iterate_file(path))
    assert [e.structure.energy for e in entries[:3]] == [-10, -11, -12]
    assert "0.extxyz frame 3: line 16: the file ends inside the frame" in entries[3].problem
    with pytest.raises(DataError, match=r"0\.extxyz frame 3"):
        open_dataset(path)


@pytest.mark.parametrize("raw", [True, False])
def test_compressed_file_that_ends_early_gives_the_frames_before(tmp_path: Path, raw: bool) -> None:
    path = write(tmp_path, 400)
    if not raw:
        (tmp_path / "0.txt").unlink()
    packed = pack(path)
    packed.write_bytes(packed.read_bytes()[:-200])
    entries = list(iterate_file(packed))
    good = [e.structure for e in entries[:-1]]
    assert 1 < len(good) < 400
    assert [s.energy for s in good] == [-10.0 - i for i in range(len(good))]
    assert f"0.extxyz.xz frame {len(good)}: the file ends early" in entries[-1].problem
    assert next(iterate_file(packed, None, len(good))).problem == entries[-1].problem
    with pytest.warns(UserWarning, match=rf"1 of {len(entries)} entries were dropped"):
        assert len(open_dataset(packed, policy="skip")) == len(good)


def test_line_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    path.write_bytes(path.read_bytes().replace(b"energy=-11.0", b"energy=-11.0 note=\xff\xfe"))
    problems = [e.problem for e in iterate_file(path)]
    assert [p is None for p in problems] == [True, False, True]
    assert "no UTF-8" in problems[1]


@pytest.mark.parametrize("name", ["0", "1"])
@pytest.mark.parametrize("ending", ["", ".xz"])
def test_samples(shared: Path, name: str, ending: str) -> None:
    samples = shared / "samples"
    expected = json.loads((samples / "expected.json").read_text())[f"oc20_raw/{name}.extxyz"]
    path = samples / "oc20_raw" / f"{name}.extxyz{ending}"
    data = list(open_dataset(path))
    assert len(data) == expected["structures"] == expected["txt_lines"]
    assert sum(len(s) for s in data) == expected["natoms_total"]
    assert data[0].energy == expected["first_energy"]
    assert sum(s.energy for s in data) == pytest.approx(expected["energy_sum"], abs=1e-9)
    assert data[0].forces[0].tolist() == expected["first_force"]
    assert sum(int(s.tags.sum()) for s in data) == expected["tags_sum"]
    assert sum(int(s.fixed.sum()) for s in data) == expected["fixed_sum"]
    info = data[0].info
    first = f"random{info['sid']},frame{info['fid']},{info['reference_energy']:.8f}"
    assert first == expected["txt_first"]
    referred = open_dataset(path, energy_convention="adsorption")
    assert referred[0].energy == data[0].energy - info["reference_energy"]


def test_bad_samples(shared: Path) -> None:
    bad = shared / "samples" / "bad"
    with pytest.raises(DataError, match=r"1\.txt: 38 lines for the 41 frames"):
        open_dataset(bad / "txt_short")
    entries = list(iterate_file(bad / "xyz_truncated" / "0.extxyz"))
    assert [e.problem is None for e in entries] == [True] * 20 + [False]
    assert "0.extxyz frame 20" in entries[-1].problem
    molecule = open_dataset(bad / "xyz_9atoms")[0]
    assert molecule.info["mulliken_charges"] == pytest.approx([0.1 * i for i in range(1, 10)])
    assert (molecule.charge, molecule.spin) == (1, 2)
