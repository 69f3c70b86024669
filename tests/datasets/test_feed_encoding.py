"""Entries of the native store: exact, short where that loses nothing, damage noticed."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from mlip.datasets.encoding import decode, encode
from mlip.datasets.structure import Structure
from mlip.errors import DataError

Make = Callable[[int], Structure]


def in_float32(structure: Structure) -> Structure:
    short = structure.positions.astype(np.float32)
    assert structure.forces is not None
    return Structure.trusted(
        **{
            **vars(structure),
            "positions": short.astype(np.float64),
            "forces": structure.forces.astype(np.float32).astype(np.float64),
        }
    )


def old_encoding(s: Structure) -> bytes:
    """An entry as the first version wrote it: by safetensors itself, reals always float64."""
    arrays = {"numbers": s.numbers.astype(np.uint8), "positions": s.positions, "cell": s.cell}
    arrays |= {"pbc": s.pbc, "forces": s.forces, "stress": s.stress, "energy": np.array(s.energy)}
    arrays["info"] = np.frombuffer(json.dumps(s.info).encode(), dtype=np.uint8)
    return save(arrays)


def test_round_trip_keeps_every_bit(random_structure: Make, assert_identical) -> None:
    for number in range(50):
        structure = random_structure(number)
        for each in (structure, in_float32(structure)):
            found = decode(encode(each))
            assert_identical(found, each)
            assert not found.positions.flags.writeable
            assert not found.numbers.flags.writeable


def test_special_values_survive() -> None:
    structure = Structure(
        numbers=[1, 118],
        positions=[[-0.0, 1e300, 5e-324], [0.1, 2.0**-149, 1e-46]],
        forces=[[-0.0, 0.5, 2.0**-149], [0, 0, 0]],
        tags=[-(2**62), 2**62],
        fixed=[True, False],
        charge=-1,
        spin=2,
        info={"sid": 2**70, "not a number": float("nan"), "text": "Å"},
    )
    found = decode(encode(structure))
    for name in ("positions", "forces", "tags", "fixed"):
        assert getattr(found, name).tobytes() == getattr(structure, name).tobytes()
    assert (found.charge, found.spin, found.info["sid"]) == (-1.0, 2.0, 2**70)
    assert load(encode(structure))["positions"].dtype == np.float64
    assert load(encode(structure))["forces"].dtype == np.float32


def test_float32_data_take_half_the_room(random_structure: Make) -> None:
    structure = random_structure(3)
    saved = len(encode(structure)) - len(encode(in_float32(structure)))
    assert abs(saved - 24 * len(structure)) <= 16


def test_entries_are_safetensors_and_aligned(random_structure: Make) -> None:
    data = encode(random_structure(1))
    fields = load(data)
    assert np.array_equal(fields["positions"], random_structure(1).positions)
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_entries_of_the_first_version_are_read(random_structure: Make, assert_identical) -> None:
    for number in range(10):
        structure = random_structure(number)
        assert_identical(decode(old_encoding(structure)), structure)


def changed_header(data: bytes, change: Callable[[dict], object]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["positions"].update(shape=[10**9, 3]), "positions has shape"),
        (lambda h: h["numbers"].update(shape=[10**15]), "shape|bytes"),
        (lambda h: h["numbers"].update(shape=[True]), "shape|bytes"),
        (lambda h: h["positions"].update(dtype="F16"), "positions is of type 'F16'"),
        (lambda h: h["forces"].update(data_offsets=[-8, 10**6]), "forces lies at"),
        (lambda h: h["forces"].update(data_offsets=[0.0, 1.0]), "forces lies at"),
        (lambda h: h["info"].update(data_offsets=[10**9, 10**9 + 13], shape=[13]), "bytes|lies"),
        (lambda h: h.pop("cell"), "no cell"),
        (lambda h: h.pop("numbers"), "header"),
        (lambda h: h.update(what={"dtype": "U8", "shape": [], "data_offsets": [0, 1]}), "'what'"),
        (lambda h: h.update(cell=[1, 2]), "header"),
        (lambda h: h["cell"].pop("shape"), "header"),
    ],
)
def test_headers_that_lie_are_refused(random_structure: Make, change, words: str) -> None:
    with pytest.raises(DataError, match=words):
        decode(changed_header(encode(random_structure(2)), change))


def test_info_that_is_no_object_is_refused(random_structure: Make) -> None:
    data = encode(random_structure(2))
    text = json.dumps(random_structure(2).info).encode()
    assert data.endswith(text)
    for wrong in (b"[" + b" " * (len(text) - 2) + b"]", b"{" * len(text)):
        with pytest.raises(DataError, match="info"):
            decode(data[: -len(text)] + wrong)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_does_worse_than_a_data_error(data) -> None:
    entry = bytearray(encode(EXAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        entry[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    entry = entry[: data.draw(st.integers(0, len(entry)))] if data.draw(st.booleans()) else entry
    try:
        found = decode(bytes(entry))
    except DataError:
        return
    assert found.positions.shape == (len(found.numbers), 3)


EXAMPLE = Structure(
    numbers=np.arange(1, 21), positions=np.arange(60.0).reshape(20, 3), energy=1.0,
    forces=np.ones((20, 3)) / 3, tags=np.zeros(20), info={"a": 1},
)  # fmt: skip
