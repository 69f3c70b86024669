"""The structure record: what it refuses, and exact ways to the store, to ASE and to graphs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlip.datasets.encoding import decode, encode
from mlip.datasets.structure import Structure, structure_to_graph
from mlip.errors import DataError

anything = st.floats(allow_nan=False, allow_infinity=False, width=64)
moderate = st.floats(-1e6, 1e6, allow_subnormal=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | anything | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
LABEL_WORDS = ("energy", "force", "stress", "virial")


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    n = draw(st.integers(1, 6))

    def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
        return st.none() | strategy

    cell = np.diag(draw(arrays(float, 3, elements=st.floats(1, 100))))
    cell[1, 0], cell[2, 0], cell[2, 1] = draw(arrays(float, 3, elements=moderate)) * 1e-4
    info = st.dictionaries(st.text(max_size=6), json_values, max_size=3)
    return Structure(
        numbers=draw(arrays(int, n, elements=st.integers(1, 118))),
        positions=draw(arrays(float, (n, 3), elements=anything)),
        cell=cell,
        pbc=draw(arrays(bool, 3)),
        energy=draw(maybe(anything)),
        forces=draw(maybe(arrays(float, (n, 3), elements=anything))),
        stress=draw(maybe(arrays(float, 6, elements=moderate))),
        tags=draw(maybe(arrays(int, n, elements=st.integers(-(2**31), 2**31)))),
        fixed=draw(maybe(arrays(bool, n))),
        charge=draw(maybe(moderate)),
        spin=draw(maybe(moderate)),
        info=draw(info.filter(lambda d: not {"charge", "spin"} & d.keys())),
    )


@given(structures())
@settings(deadline=None, max_examples=150)
def test_store_entry_keeps_every_bit(structure: Structure) -> None:
    read = decode(encode(structure))
    for name in Structure.__dataclass_fields__:
        a, b = getattr(structure, name), getattr(read, name)
        if a is None or isinstance(a, dict):
            assert a == b, name
        else:
            assert np.asarray(a).dtype == np.asarray(b).dtype, name
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@given(structures())
@settings(deadline=None, max_examples=80)
def test_ase_atoms_keep_everything(structure: Structure) -> None:
    words = [k for k in structure.info if any(word in k for word in LABEL_WORDS)]
    for word in words:
        del structure.info[word]
    read = Structure.from_atoms(structure.to_atoms())
    for name in Structure.__dataclass_fields__:
        a, b = getattr(structure, name), getattr(read, name)
        if name == "fixed" and a is not None and not a.any():
            assert b is None
        elif name == "tags" and a is not None and not a.any():
            assert b is None or not b.any()
        elif a is None or isinstance(a, dict):
            assert a == b, name
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_labels_are_read_by_ase_itself() -> None:
    forces = np.arange(6.0).reshape(2, 3)
    structure = Structure(
        [1, 8], [[0, 0, 0], [0, 0, 1]], np.eye(3) * 5, [1, 1, 1], energy=-3.5, forces=forces,
        stress=[1, 2, 3, 4, 5, 6], fixed=[True, False], tags=[2, 0], charge=1, spin=2,
        info={"config_type": "x"},
    )  # fmt: skip
    atoms = structure.to_atoms()
    assert atoms.get_potential_energy() == -3.5
    np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), forces)
    np.testing.assert_array_equal(atoms.get_forces()[0], 0)
    np.testing.assert_array_equal(atoms.get_stress(), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(atoms.get_tags(), [2, 0])
    assert atoms.info == {"config_type": "x", "charge": 1.0, "spin": 2.0}
    assert atoms.constraints[0].get_indices().tolist() == [0]


@pytest.mark.parametrize("shape", [(6,), (9,), (3, 3)])
def test_stress_layouts_agree_with_ase(shape: tuple[int, ...]) -> None:
    from ase.stress import voigt_6_to_full_3x3_stress

    voigt = np.array([1.0, 2, 3, 4, 5, 6])
    full = voigt_6_to_full_3x3_stress(voigt)
    given_as = voigt if shape == (6,) else full.reshape(shape)
    structure = Structure([1], np.zeros((1, 3)), stress=given_as)
    np.testing.assert_array_equal(structure.stress, full)


H2 = {"numbers": [1, 1], "positions": [[0, 0, 0], [0, 0, 0.7]]}
NAN = float("nan")
BAD = {
    "no atoms": ({"numbers": [], "positions": np.zeros((0, 3))}, "no atoms"),
    "element 0": ({"numbers": [1, 0]}, "atomic number 0"),
    "element 119": ({"numbers": [1, 119]}, "atomic number 119"),
    "half an element": ({"numbers": [1, 1.5]}, "numbers holds"),
    "nan position": ({"positions": [[0, 0, 0], [0, NAN, 0]]}, r"positions\[1, 1\] is nan"),
    "inf position": ({"positions": [[0, 0, 0], [0, np.inf, 0]]}, "positions.* is inf"),
    "positions shape": ({"positions": [[0, 0, 0]]}, r"positions has shape \(1, 3\)"),
    "ragged": ({"positions": [[0, 0, 0], [0, 1]]}, "positions does not hold"),
    "nan energy": ({"energy": NAN}, "energy is nan"),
    "two energies": ({"energy": [1.0, 2.0]}, "energy has shape"),
    "text energy": ({"energy": "low"}, "energy is 'low'"),
    "forces rows": ({"forces": np.zeros((1, 3))}, r"forces has shape \(1, 3\), expected \(2, 3\)"),
    "forces transposed": ({"forces": np.zeros((3, 2))}, r"forces has shape \(3, 2\)"),
    "inf force": ({"forces": [[0, 0, 0], [0, 0, -np.inf]]}, r"forces\[1, 2\] is -inf"),
    "stress shape": ({"stress": np.zeros(5)}, r"stress has shape \(5,\)"),
    "stress order": ({"stress": np.arange(9.0)}, "stress is not symmetric"),
    "nan stress": ({"stress": [NAN] * 6}, "stress.* is nan"),
    "flat cell": ({"pbc": [1, 1, 1], "cell": np.diag([5, 5, 0])}, "no volume but is periodic"),
    "dependent cell": ({"pbc": [1, 1, 0], "cell": [[1, 2, 3], [2, 4, 6], [0, 0, 1]]}, "no volume"),
    "nan cell": ({"cell": np.full((3, 3), NAN)}, "cell.* is nan"),
    "tags shape": ({"tags": [1]}, "tags has shape"),
    "fixed values": ({"fixed": [0, 2]}, "fixed holds"),
    "info object": ({"info": {"x": object()}}, "info .* x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_refused_by_name(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(DataError, match=message):
        Structure(**{**H2, **fields})


@pytest.mark.parametrize(
    ("pbc", "cell"),
    [
        ([0, 0, 0], np.zeros((3, 3))),
        ([1, 1, 0], np.diag([3.0, 3, 0])),
        ([1, 1, 1], -np.eye(3)),
        ([0, 0, 1], np.diag([0, 0, 1e-3])),
    ],
)
def test_partly_periodic_and_left_handed_cells_are_fine(pbc: list[int], cell: np.ndarray) -> None:
    assert len(Structure(**H2, pbc=pbc, cell=cell)) == 2


def test_record_cannot_be_changed() -> None:
    positions = np.zeros((1, 3))
    structure = Structure([1], positions)
    positions[0, 0] = 7.0
    assert structure.positions[0, 0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        structure.positions[0, 0] = 1.0


def test_graph_carries_labels_and_nan_for_missing_ones() -> None:
    voigt = np.array([1.0, 2, 3, 4, 5, 6])
    full = Structure(
        **H2, cell=np.eye(3) * 4, pbc=[1, 1, 1], energy=-1.0, forces=[[1, 2, 3], [4, 5, 6]],
        stress=voigt, tags=[0, 2], fixed=[True, False], charge=-1, spin=3,
    )  # fmt: skip
    graph = structure_to_graph(full, 1.0, index=5)
    assert graph.edge_index.tolist() == [[1, 0], [0, 1]]
    assert (graph.energy.item(), graph.charge.item(), graph.spin.item()) == (-1.0, -1.0, 3.0)
    assert graph.forces.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert graph.stress[0].tolist() == [[1, 6, 5], [6, 2, 4], [5, 4, 3]]
    assert graph.tags.tolist() == [0, 2]
    assert graph.fixed.tolist() == [True, False]
    assert graph.index.tolist() == [5]
    bare = structure_to_graph(Structure(**H2), 1.0)
    for name in ("energy", "forces", "stress", "charge", "spin"):
        assert bool(bare[name].isnan().all()), name
    slab = structure_to_graph(Structure(**H2, cell=np.eye(3) * 4, pbc=[1, 1, 0], stress=voigt), 1.0)
    assert bool(slab.stress.isnan().all())
