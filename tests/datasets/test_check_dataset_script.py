"""The script that compares readers with expectations, on a set of samples made here.

The set has names, cases and a folder of legal variants of its own; some records are wrong on
purpose and must be found out.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ase.io
import lmdb
import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from ase.calculators.singlepoint import SinglePointCalculator

from mlip.validation import data_cases
from mlip.validation.data_cases import Case, Run, find_cases, judge

Fields = dict[str, Any]


def slab(seed: int) -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=6, periodic=True)
    atoms.rattle(0.05, seed=seed)
    forces = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0 - seed, forces=forces)
    atoms.info["sid"] = f"slab-{seed}"
    return atoms


def fields(seed: int) -> Fields:
    """Give an OC20 entry as its first writers stored it."""
    import torch

    atoms = slab(seed)
    tensors = {
        "pos": atoms.positions,
        "cell": atoms.cell.array[None],
        "force": atoms.calc.results["forces"],
    }
    return {
        **{name: torch.tensor(value, dtype=torch.float32) for name, value in tensors.items()},
        "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32),
        "tags": torch.ones(len(atoms), dtype=torch.long),
        "fixed": torch.zeros(len(atoms)),
        "natoms": len(atoms),
        "y": atoms.calc.results["energy"],
        "sid": 40 + seed,
        "fid": seed,
    }


def write_oc20(path: Path, entries: list[Fields | bytes], protocol: int = 4) -> None:
    from torch_geometric.data import Data

    path.parent.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), subdir=False, map_size=2**24, lock=False)
    with environment.begin(write=True) as transaction:
        for i, entry in enumerate(entries):
            data = entry if isinstance(entry, bytes) else pickle.dumps(Data(**entry), protocol)
            transaction.put(b"%d" % i, data)
        transaction.put(b"length", pickle.dumps(len(entries), protocol))
    environment.close()


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch other_pwned_file",)


def unusual(seed: int) -> Fields:
    """Give the same entry with tensors that are views, not contiguous and of other types."""
    import torch

    entry = fields(seed)
    n = entry["natoms"]
    both = torch.cat([entry["pos"], entry["force"]])
    wide = torch.zeros(n, 6)
    wide[:, 1:4] = entry["force"]
    return {
        **entry,
        "pos": both[:n],  # a view into a bigger storage
        "force": wide[:, 1:4],  # not contiguous
        "cell": entry["cell"].double().transpose(1, 2).contiguous().transpose(1, 2),
        "atomic_numbers": entry["atomic_numbers"].to(torch.uint8),
        "nested": [[[[seed]]]],
    }


def record(seeds: range, **more: Any) -> dict[str, Any]:
    """Compute the expectations of OC20 entries from what was put in, without any reader."""
    atoms = [slab(seed) for seed in seeds]
    forces = [a.calc.results["forces"].astype(np.float32).astype(float) for a in atoms]
    return {
        "structures": len(atoms),
        "natoms_total": sum(map(len, atoms)),
        "numbers_sum": int(sum(a.numbers.sum() for a in atoms)),
        "first_energy": atoms[0].calc.results["energy"],
        "energy_sum": sum(a.calc.results["energy"] for a in atoms),
        "energies": len(atoms),
        "force_sumsq": float(sum((f**2).sum() for f in forces)),
        "first_force": forces[0][0].tolist(),
        "tags_sum": sum(map(len, atoms)),
        "fixed_sum": 0,
        "first_sid": 40 + seeds[0],
        "first_fid": seeds[0],
        **more,
    }


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a set: two samples, bad cases, variants, and what is expected of them."""
    root = tmp_path_factory.mktemp("set")
    good = [fields(seed) for seed in range(4)]
    write_oc20(root / "slabs" / "data.0000.lmdb", good[:2])
    write_oc20(root / "slabs" / "data.0001.lmdb", good[2:])
    ase.io.write(root / "texts.extxyz", [slab(seed) for seed in range(3)])
    text = (root / "texts.extxyz").read_bytes()
    expected = {
        "slabs": record(range(4), fields={
            "pos": "float32[8, 3]", "cell": "float32[1, 3, 3]", "force": "float32[8, 3]",
            "atomic_numbers": "float32[8]", "tags": "int64[8]", "fixed": "float32[8]",
            "natoms": "int", "y": "float", "sid": "int", "fid": "int"}),
        "texts.extxyz": {"structures": 3, "energy_sum": -12.0, "first_sid": "slab-0",
                         "files": {"texts.extxyz": hashlib.sha256(text).hexdigest()[:16]}},
    }  # fmt: skip
    (root / "expected.json").write_text(json.dumps(expected))
    hostile = [good[0], good[1], pickle.dumps(_Payload())]
    write_oc20(root / "bad" / "surprise" / "data.0000.lmdb", hostile)
    (root / "bad" / "cut").mkdir()
    whole = (root / "slabs" / "data.0000.lmdb").read_bytes()
    (root / "bad" / "cut" / "data.0000.lmdb").write_bytes(whole[: len(whole) // 2])
    nan = fields(1)
    nan["force"][2, 1] = float("nan")
    write_oc20(root / "bad" / "nan_somewhere" / "data.0000.lmdb", [good[0], nan, good[2]])
    cases = [
        {"case": "surprise", "expect": "must refuse", "bad_index": 2, "n": 3,
         "marker": "other_pwned_file"},
        {"case": "cut", "expect": "refuse to open with an error; must not crash the process"},
        {"case": "nan_somewhere", "expect": "entry 1 rejected", "bad_index": 1, "n": 3},
    ]  # fmt: skip
    (root / "bad" / "CASES.json").write_text(json.dumps(cases))
    write_oc20(root / "variants" / "views" / "data.0000.lmdb", [unusual(s) for s in range(3)])
    write_oc20(root / "variants" / "old_protocol" / "data.0000.lmdb", good[:3], protocol=2)
    told = [{"case": "views", "expect": "3 structures, same as good", **record(range(3))}]
    (root / "variants" / "CASES.json").write_text(json.dumps(told))
    return root


@pytest.fixture
def run_script(
    load_script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Run the script in this process; gives its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        module = load_script("check_dataset")
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *map(str, arguments)])
        return module.main(), capsys.readouterr().out

    return run


def test_other_set_passes(
    samples: Path, run_script: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, text = run_script(samples, "--json", tmp_path / "r.json")
    assert status == 0, text
    assert "all as expected" in text
    result = json.loads((tmp_path / "r.json").read_text())
    names = [verdict["case"] for verdict in result["cases"]]
    assert names == ["cut", "nan_somewhere", "surprise", "old_protocol", "views"]
    assert all(verdict["ok"] for verdict in result["cases"])
    checked = {row["field"] for row in result["samples"]["slabs"]}
    assert {"first_fid", "field pos", "force_sumsq", "index of sizes"} <= checked


def test_deliberate_mismatches_are_found(
    samples: Path, run_script: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    expected = json.loads((samples / "expected.json").read_text())
    slabs = expected["slabs"]
    slabs["energy_sum"] *= 1 + 1e-9
    slabs["first_force"][2] = float(np.nextafter(slabs["first_force"][2], 9))
    slabs["fields"]["pos"] = "float64[8, 3]"
    slabs["fields"]["charge"] = "int"
    slabs["first_sid"] = "40"
    slabs["weather"] = "fine"
    expected["texts.extxyz"]["files"]["texts.extxyz"] = "0" * 16
    expected["absent"] = {"structures": 1}
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    for name in ("slabs", "texts.extxyz"):
        (lonely / name).symlink_to(samples / name)
    (tmp_path / "wrong.json").write_text(json.dumps(expected))
    status, text = run_script(lonely, "--expected", tmp_path / "wrong.json")
    assert status == 1
    found = [line.partition("not so: ")[2] for line in text.splitlines() if "not so: " in line]
    assert found == [
        "slabs: energy_sum", "slabs: first_force", "slabs: first_sid", "slabs: field pos",
        "slabs: field charge", "slabs: weather", "texts.extxyz: file texts.extxyz", "absent: read",
    ]  # fmt: skip
    assert "UNKNOWN KEY: NOT CHECKED" in text
    assert run_script(tmp_path / "nowhere")[0] == 2


def verdict_of(case: Case, entries: list[dict[str, Any]], **more: Any) -> data_cases.Verdict:
    answer = {
        "error": None, "entries": entries, "problems": [], "skipping": None,
        "check": {"error": None, "findings": []},
    } | more.pop("answer", {})  # fmt: skip
    return judge(case, Run(answer, more.pop("ended", None), more.pop("stray", [])), {})


def entry(error: str | None = None, kind: str = "DataError") -> dict[str, Any]:
    return {"error": {"kind": kind, "text": error}} if error else {"values": {"lists": {}}}


@pytest.fixture
def one_bad(tmp_path: Path) -> Case:
    (tmp_path / "data.lmdb").touch()
    return Case("x", tmp_path, False, {"expect": "must refuse", "bad_index": 1, "n": 2})


def test_judge_accepts_only_the_named_entry(one_bad: Case) -> None:
    right = entry("data.lmdb: entry 1: no")
    assert verdict_of(one_bad, [entry(), right]).ok
    assert not verdict_of(one_bad, [entry(), entry()]).ok
    assert not verdict_of(one_bad, [right, entry()]).ok
    assert not verdict_of(one_bad, [entry("data.lmdb: entry 0"), right]).ok
    assert not verdict_of(one_bad, [entry(), right, entry()]).ok
    assert not verdict_of(one_bad, [entry(), entry("data.lmdb: something")]).ok
    assert not verdict_of(one_bad, [entry(), entry("entry 1: no")]).ok
    assert not verdict_of(one_bad, [entry(), entry("data.lmdb: entry 1", "KeyError")]).ok


def test_judge_sees_crashes_and_markers(one_bad: Case) -> None:
    good = [entry(), entry("data.lmdb: entry 1: no")]
    assert not verdict_of(one_bad, good, ended="killed by SIGBUS").ok
    marked = verdict_of(one_bad, good, stray=["thing_pwned"])
    assert "EXECUTED" in marked.faults[0]
    assert not verdict_of(one_bad, good, stray=["data.lmdb-lock"]).ok


@pytest.mark.parametrize(
    ("keys", "entries", "problems", "ok"),
    [
        ({"expect": "4 rows, id 2 deleted", "n": 5}, 4, [], True),
        ({"expect": "4 rows, id 2 deleted", "n": 5}, 5, [], False),
        ({"expect": "length says 9: report mismatch", "n_entries": 6, "length": 9}, 6, [], False),
        ({"expect": "length says 9: report mismatch", "n_entries": 6, "length": 9}, 6,
         ["data.lmdb: 9 promised, 6 there"], True),
        ({"expect": "6 structures, same as good", "n": 6}, 6, [], True),
        ({"expect": "refuse to open with a clear error"}, 3, [], False),
        ({"expect": "reads fine, no error", "n": 2}, 2, [], True),
        ({"expect": "reads fine", "n": 2, "colour": 1}, 2, [], False),
        (None, 2, [], True),
    ],
)  # fmt: skip
def test_judge_takes_demands_from_keys_and_words(
    tmp_path: Path, keys: dict[str, Any] | None, entries: int, problems: list[str], ok: bool
) -> None:
    case = Case("x", tmp_path, False, keys)
    answer = {"problems": problems}
    assert verdict_of(case, [entry()] * entries, answer=answer).ok is ok


def test_values_of_a_case_are_checked(samples: Path) -> None:
    folder = samples / "variants" / "views"
    for factor, ok in ((1.0, True), (1.001, False)):
        keys = {"expect": "same as good", "energy_sum": -12.0 * factor}
        case = Case("views", folder, True, keys)
        verdict = judge(case, data_cases.run_case(case), {})
        assert verdict.ok is ok, verdict


def test_the_same_entry_elsewhere_is_compared(tmp_path: Path) -> None:
    (tmp_path / "data.lmdb").touch()
    case = Case("x", tmp_path, True, {"expect": "2 structures, same as good"})
    values = {"energy": -3.0, "forces": 2.0}
    run = Run({"error": None, "entries": [{"values": values}] * 2, "problems": [],
               "skipping": None, "check": {"error": None, "findings": []}}, None, [])  # fmt: skip
    key = data_cases.entry_key(case, 1)
    assert judge(case, run, {key: {"energy": -3.0 + 1e-9, "forces": 2.0}}).ok
    wrong = judge(case, run, {key: {"energy": -3.1, "forces": 2.0}})
    assert wrong.faults == ["entry 1: energy differs from the same entry elsewhere"]


def test_unlisted_variants_must_be_read_and_listed_cases_must_exist(tmp_path: Path) -> None:
    (tmp_path / "variants" / "odd").mkdir(parents=True)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "CASES.json").write_text('[{"case": "gone", "expect": "refuse"}]')
    odd, gone = find_cases(tmp_path)
    assert (odd.name, odd.legal, gone.name) == ("odd", True, "gone")
    assert not verdict_of(odd, [entry("x")]).ok
    assert "missing" in judge(gone, Run(None, None, []), {}).faults[0]


def test_crashes_and_endless_readers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=os.abort)
    process.start()
    process.join()
    assert data_cases._end(process, tmp_path / "log") == "killed by SIGABRT"
    monkeypatch.setattr(data_cases, "TIME_LIMIT", 0.0)
    (tmp_path / "a.extxyz").write_text("1\nenergy=1\nH 0 0 0\n")
    assert data_cases.run_case(Case("x", tmp_path, True)).ended == "no end after 0 s"


def test_all_samples_are_as_expected(
    shared: Path, run_script: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, text = run_script(shared / "samples", "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert (status, result["fields_different"], result["cases_failed"]) == (0, [], []), text
    assert result["fields"] > 400
    assert result["cases_run"] == 45
