"""Random damage to JSON rows: whatever is in them, the answer is a structure or one clear error."""

from __future__ import annotations

import copy
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ase.io.jsonio import encode

from mlip.datasets.formats.ase_row import extract_row, load_json
from mlip.datasets.formats.mptrj import extract_frame
from mlip.datasets.labels import Extracted, LabelKeys
from mlip.datasets.options import ReadOptions
from mlip.errors import DataError

ROW = json.loads(
    encode(
        {
            "numbers": np.array([1, 8]),
            "positions": np.zeros((2, 3)),
            "cell": np.eye(3) * 4,
            "pbc": np.array([True] * 3),
            "tags": np.array([0, 1]),
            "constraints": [
                {"name": "FixAtoms", "kwargs": {"indices": [0]}},
                {"name": "FixAtoms", "kwargs": {"mask": [True, False]}},
            ],
            "energy": 1.0,
            "forces": np.zeros((2, 3)),
            "stress": np.zeros(6),
            "data": {"charge": 1, "energy": 1.0, "complex": 1 + 2j, "array": np.zeros((2, 2))},
            "key_value_pairs": {"k": 1},
        }
    )
)
FRAME: dict[str, Any] = {
    "structure": {
        "lattice": {"matrix": [[4, 0, 0], [0, 4, 0], [0, 0, 4]], "pbc": [True] * 3},
        "charge": 1.0,
        "sites": [{"species": [{"element": "Na", "occu": 1}], "xyz": [0] * 3, "abc": [0] * 3}],
    },
    "uncorrected_total_energy": 1.0,
    "force": [[0, 0, 0]],
    "stress": [[0, 0, 0]] * 3,
    "mp_id": "x",
}
VALUES: list[Any] = [
    None, True, 0, -1, 2, 1e308, -1e308, 2**63, 2**64 - 1, "", "x", "__ndarray__", [], [[]],
    [None], ["a"], [1], [1, 2], [[1, 2], [3]], [[[1]]], {}, {"__ndarray__": 5},
    {"__ndarray__": [[2], "int64", [1, 2]]}, {"__ndarray__": [[2, 2], "complex128", [1, 2]]},
    {"__ndarray__": [[-1], "x", [1]]}, {"__ndarray__": [[10**30], "x", []]},
    {"__ndarray__": [[2], "x", [[1, 2], 3]]}, {"__complex__": 1}, {"array": 5},
    {"array": {"__ndarray__": [[3, 3], "f", [0] * 9]}}, {"name": [1]}, {"kwargs": 5},
]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    inner = value if isinstance(value, dict | list) else ()
    for key, item in inner.items() if isinstance(inner, dict) else enumerate(inner):
        yield from places(item, (*place, key))


def damaged(value: Any, dice: random.Random) -> Any:
    """Replace, remove or add up to three values anywhere."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 3)):
        *outer, key = dice.choice(list(places(value)) or [(None,)])
        inner = value
        for step in outer:
            inner = inner[step]
        if key is None:
            break
        choice = dice.random()
        if choice < 0.2:
            del inner[key]
        elif choice < 0.3 and isinstance(inner, list):
            inner.append(copy.deepcopy(dice.choice(VALUES)))
        else:
            inner[key] = copy.deepcopy(dice.choice(VALUES))
    return value


READ: dict[str, tuple[Any, Callable[[Any], Extracted]]] = {
    "row": (ROW, lambda row: extract_row(row, LabelKeys())),
    "frame": (FRAME, lambda frame: extract_frame("id", frame, ReadOptions())),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", READ)
def test_any_values(kind: str) -> None:
    content, read = READ[kind]
    assert read(content).structure.energy == 1.0
    dice, good, bad, longest = random.Random(1), 0, 0, 0
    for _ in range(4000):
        case = damaged(content, dice)
        try:
            structure = read(case).structure
        except DataError as error:
            bad += 1
            longest = max(longest, len(str(error)))
        else:
            good += 1
            assert np.isfinite(structure.positions).all()
            json.dumps(structure.info)
    assert longest < 400
    assert good > 100
    assert bad > 1000


def test_any_bytes() -> None:
    """Damage of the compressed bytes, and of the text within."""
    dice, text = random.Random(2), json.dumps(ROW).encode()
    for case in range(4000):
        data = bytearray(text if case % 2 else zlib.compress(text))
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            extract_row(load_json(zlib.compress(data) if case % 2 else bytes(data)), LabelKeys())
        except DataError:
            continue
