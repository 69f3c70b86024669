"""Folders of shards, their manifests, policies for bad data, and what convert refuses to guess."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mlip.datasets import chunks as chunks_module
from mlip.datasets import open_dataset
from mlip.datasets.convert import convert
from mlip.datasets.options import ReadOptions
from mlip.datasets.structure import Structure
from mlip.datasets.writer import StructureWriter
from mlip.errors import DataError, InputError


def frames(count: int) -> list[Atoms]:
    result = []
    for i in range(count):
        n = 2 + i % 4
        atoms = Atoms("Cu" * n, positions=np.arange(n)[:, None] * [2.2, 0.1, i / 100])
        atoms.info["number"] = i
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 - i / 7, forces=np.ones((n, 3)) / 3)
        result.append(atoms)
    return result


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.traj"
    ase.io.write(path, frames(23))
    return path


@pytest.mark.parametrize(("name", "suffix"), [("s", ".lmdb"), ("s.aselmdb", ".aselmdb")])
def test_folder_of_shards_is_one_data_set(
    tmp_path: Path, source: Path, name: str, suffix: str
) -> None:
    convert(source, tmp_path / name, shard_size=10)
    data = open_dataset(tmp_path / name)
    assert [s.info["number"] for s in data] == list(range(23))
    assert [s.energy for s in data] == [-1.0 - i / 7 for i in range(23)]
    manifest_path = tmp_path / name / "manifest.json"
    if suffix == ".aselmdb":
        assert not manifest_path.exists()
        manifest_path = tmp_path / f"{name}.manifest.json"
        with np.load(tmp_path / name / "metadata.npz") as sizes:
            assert sizes["natoms"].tolist() == [2 + i % 4 for i in range(23)]
    manifest = json.loads(manifest_path.read_text())
    shards = manifest["shards"]
    assert [shard["structures"] for shard in shards] == [10, 10, 3]
    assert (manifest["structures"], manifest["atoms"]) == (23, sum(2 + i % 4 for i in range(23)))
    for i, shard in enumerate(shards):
        path = tmp_path / name / f"data.{i:04d}{suffix}"
        assert shard["name"] == path.name
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["bytes"] == path.stat().st_size
        assert shard["atoms"] == sum(map(len, open_dataset(path)))
    assert manifest["sources"] == [{"name": "a.traj", "structures": 23}]


def test_only_shards_are_replaced(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "s"
    convert(source, folder, shard_size=10)
    with pytest.raises(DataError, match="exists"):
        convert(source, folder, shard_size=5)
    convert(source, folder, shard_size=20, overwrite=True)
    assert len(list(folder.glob("*.lmdb"))) == 2
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"other files than shards \(thesis.tex\)"):
        convert(source, folder, shard_size=5, overwrite=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.traj", "s"]


def test_names_that_make_no_output(tmp_path: Path, source: Path) -> None:
    for name, options, message in (
        ("o.npz", {}, r"expected NAME.lmdb \(store\), NAME.aselmdb, NAME.extxyz"),
        ("o", {}, "a folder needs --shard-size"),
        ("o.xyz", {"shard_size": 3}, "text cannot be divided"),
        ("o.lmdb", {"shard_size": 0}, "at least 1 structure"),
        ("o.lmdb", {"workers": -1}, "number of workers"),
        ("o.lmdb", {"policy": "ignore"}, "policy is 'ignore'"),
        ("o.lmdb", {"policy": "quarantine"}, "name a file for the list"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source, tmp_path / name, **options)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.traj"]


def test_the_content_hash_is_that_of_the_entries(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "o.lmdb")
    store: Any = open_dataset(tmp_path / "o.lmdb")
    chain = b""
    for structure in store:
        data = StructureWriter.encode(structure)
        chain = hashlib.blake2b(chain + data, digest_size=16).digest()
    assert store.metadata["content_hash"] == chain.hex()
    assert store.metadata["count"] == 23


def test_chunks_are_cut_by_bytes_too(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "a.lmdb")
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 1500)
    seen: list[int] = []
    convert(source, tmp_path / "b.lmdb", on_frames=lambda _, read, __: seen.append(read))
    assert len(seen) > 5
    assert seen[-1] == 23
    assert (tmp_path / "a.lmdb").read_bytes() == (tmp_path / "b.lmdb").read_bytes()


def test_text_keeps_every_digit_of_the_energy(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "o.extxyz")
    for a, b in zip(ase.io.read(tmp_path / "o.extxyz", ":"), frames(23), strict=True):
        assert a.get_potential_energy() == b.calc.results["energy"]
        np.testing.assert_allclose(a.get_forces(), b.calc.results["forces"], atol=5.1e-9)


def test_quarantine_lists_everything_that_was_left_out(tmp_path: Path) -> None:
    good = frames(6)
    good[2].calc.results["energy"] = np.nan
    good[4].positions[1] = good[4].positions[0]
    good[4].calc.atoms = good[4].copy()
    ase.io.write(tmp_path / "a.traj", good)
    (tmp_path / "b.aselmdb").write_bytes(b"no data base at all" * 1000)
    inputs = [tmp_path / "a.traj", tmp_path / "b.aselmdb"]
    report = convert(
        inputs, tmp_path / "o.lmdb", policy="quarantine", quarantine=tmp_path / "bad.tsv"
    )
    assert (report.kept, report.dropped, report.damaged) == (4, 2, 1)
    rows = [line.split("\t") for line in (tmp_path / "bad.tsv").read_text().splitlines()]
    assert rows[0] == ["file", "entry", "reason"]
    assert [(Path(row[0]).name, row[1]) for row in rows[1:]] == [
        ("a.traj", "frame 2"),
        ("a.traj", "frame 4"),
        ("b.aselmdb", "-"),
    ]
    for row, word in zip(rows[1:], ("nan", "coincide", "LMDB"), strict=True):
        assert word in row[2]
    for some, message in ((inputs, "a.traj frame 2"), (inputs[1:], "b.aselmdb")):
        with pytest.raises(DataError, match=rf"{message}.*--policy skip"):
            convert(some, tmp_path / "p.lmdb", policy="raise")


def test_labels_in_the_info_cannot_go_into_aselmdb(tmp_path: Path) -> None:
    with StructureWriter(tmp_path / "a.lmdb") as writer:
        for extra in ({"free_energy": 1.0}, {"number": 1}):
            writer.append(Structure(np.array([29]), np.zeros((1, 3)), energy=1.0, info=extra))
    report = convert(tmp_path / "a.lmdb", tmp_path / "o.aselmdb")
    assert (report.kept, report.dropped) == (1, 1)
    assert "free_energy" in report.problems[0]


@pytest.mark.parametrize("sample", ["oc20_s2ef_legacy", "oc20_s2ef_fc1"])
def test_oc20_energies_have_to_be_named(tmp_path: Path, shared: Path, sample: str) -> None:
    folder = shared / "samples" / sample
    with pytest.raises(DataError, match=r"median.*eV per atom.*--energy-convention adsorption"):
        convert(folder, tmp_path / "o.lmdb")
    assert list(tmp_path.iterdir()) == []
    report = convert(folder, tmp_path / "o.lmdb", options=ReadOptions(energy_convention="total"))
    assert report.energy_convention == "total"
    assert open_dataset(tmp_path / "o.lmdb").facts.energy_convention == "total"
    options = ReadOptions(energy_convention="adsorption")
    with pytest.raises(DataError, match="holds total energies, not adsorption ones"):
        convert(tmp_path / "o.lmdb", tmp_path / "p.lmdb", options=options)
    again = convert(tmp_path / "o.lmdb", tmp_path / "p", shard_size=50)
    assert again.energy_convention == "total"
    assert open_dataset(tmp_path / "p").facts.energy_convention == "total"
    assert (
        json.loads((tmp_path / "p" / "manifest.json").read_text())["energy_convention"] == "total"
    )


def test_is2re_frames_have_to_be_named(tmp_path: Path, shared: Path) -> None:
    folder, output = shared / "samples" / "is2re_legacy", tmp_path / "o.lmdb"
    with pytest.raises(DataError, match="--is2re initial"):
        convert(folder, output, options=ReadOptions(energy_convention="adsorption"))
    for frame in ("initial", "relaxed"):
        options = ReadOptions(energy_convention="adsorption", is2re=frame)  # type: ignore[arg-type]
        convert(folder, output, options=options, overwrite=True)
        expected = open_dataset(folder, energy_convention="adsorption", is2re=frame)  # type: ignore[arg-type]
        assert [s.energy for s in open_dataset(output)] == [s.energy for s in expected]


def test_conventions_do_not_mix(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "ads.lmdb", options=ReadOptions(energy_convention="adsorption"))
    with pytest.raises(DataError, match="cannot be mixed"):
        convert([source, tmp_path / "ads.lmdb"], tmp_path / "o.lmdb")
    options = ReadOptions(energy_convention="adsorption")
    convert([source, tmp_path / "ads.lmdb"], tmp_path / "o.lmdb", options=options)
    assert open_dataset(tmp_path / "o.lmdb").facts.energy_convention == "adsorption"


def test_level_of_theory_and_licence_are_carried_and_not_mixed(
    tmp_path: Path, source: Path
) -> None:
    facts = {"level_of_theory": "PBE", "licence": "CC-BY-4.0"}
    convert(source, tmp_path / "a.lmdb", metadata=facts)
    convert(source, tmp_path / "b.lmdb", metadata={**facts, "level_of_theory": "RPBE"})
    convert([tmp_path / "a.lmdb", source], tmp_path / "c.lmdb")
    store: Any = open_dataset(tmp_path / "c.lmdb")
    assert {name: store.metadata["user"][name] for name in facts} == facts
    with pytest.raises(DataError, match=r"level_of_theory 'PBE' and .*b.lmdb 'RPBE'"):
        convert([tmp_path / "a.lmdb", tmp_path / "b.lmdb"], tmp_path / "d.lmdb")


def test_facts_that_are_wrong_about_a_file_are_told(tmp_path: Path, shared: Path) -> None:
    folder = shared / "samples" / "bad" / "length_too_big"
    options = ReadOptions(energy_convention="total")
    report = convert(folder, tmp_path / "o.lmdb", options=options)
    assert report.kept == 6
    assert any("length" in text and "9" in text for text in report.warnings)


@pytest.mark.parametrize("case", ["ase_metadata_mismatch", "ase_metadata_edges_as_natoms"])
def test_size_tables_that_do_not_fit_are_told(tmp_path: Path, shared: Path, case: str) -> None:
    report = convert(shared / "samples" / "bad" / case, tmp_path / "o.lmdb")
    assert report.kept == 6
    assert any("metadata.npz" in text for text in report.warnings)


def test_hostile_size_table_is_refused(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"metadata.npz.*Python objects"):
        convert(shared / "samples" / "bad" / "ase_metadata_pickle", tmp_path / "o.lmdb")
    assert list(tmp_path.iterdir()) == []


def test_every_bad_sample_is_an_error_or_a_report(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bad file stops a conversion in another way, and nothing in one is executed."""
    monkeypatch.chdir(tmp_path)
    cases = json.loads((shared / "samples" / "bad" / "CASES.json").read_text())
    options = ReadOptions(energy_convention="total")
    for name in sorted(path.name for path in (shared / "samples" / "bad").iterdir()):
        folder = shared / "samples" / "bad" / name
        if not folder.is_dir():
            continue
        try:
            report = convert(folder, tmp_path / "o.lmdb", options=options, overwrite=True)
        except DataError:
            assert not (tmp_path / "o.lmdb.partial").exists()
            continue
        assert report.kept == len(open_dataset(tmp_path / "o.lmdb"))
    assert len(cases) > 40
    assert {path.name for path in tmp_path.iterdir()} == {"o.lmdb"}
