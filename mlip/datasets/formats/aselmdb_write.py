"""Write ``.aselmdb`` files that ASE (with ase-db-backends) and fairchem read.

Rows are compressed JSON in ASE's dialect, ids run from 1 on, and the same structures give the same
rows. While the file is unfinished a reserved key holds the state of the job; it is gone in the end.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import lmdb
import orjson

from mlip.datasets.structure import Array, Structure
from mlip.datasets.writer import LmdbWriter
from mlip.errors import DataError

_STATE_KEY = b"#mlip"
_NEXT_ID = b"nextid"
_METADATA = b"metadata"
_LABELS = frozenset({"energy", "forces", "stress", "free_energy"})
_DTYPES = {"b": "bool", "i": "int64", "f": "float64"}


class AseLmdbWriter(LmdbWriter):
    """Write an ``.aselmdb`` file (see :class:`LmdbWriter` for arguments and behaviour).

    Fixed atoms become a FixAtoms constraint; charge, spin and info go into ``data``, where a
    number that is not finite becomes null.
    """

    @staticmethod
    def encode(structure: Structure) -> bytes:
        """Give the bytes of one row.

        Raises:
            DataError: the info holds a label, which other readers would take for the row's own.
        """
        row = _row(structure)
        row["unique_id"] = hashlib.blake2b(_dump(row), digest_size=16).hexdigest()
        return zlib.compress(_dump(row))

    def _restore(self, transaction: lmdb.Transaction) -> None:
        stored, next_id = transaction.get(_STATE_KEY), transaction.get(_NEXT_ID)
        if next_id is None:
            raise DataError(f"{self.partial}: no rows of an ASE database: drop it (--overwrite)")
        self._committed = int(zlib.decompress(next_id)) - 1
        if stored is None:
            self.complete = True
            return
        state = orjson.loads(stored)
        self.metadata = {**state["metadata"], **self.metadata}
        self.progress = state["progress"]

    def _put(self, transaction: lmdb.Transaction, complete: bool) -> None:
        for row_id, (data, _) in enumerate(self._pending, start=self._committed + 1):
            transaction.put(b"%d" % row_id, data)
        transaction.put(_NEXT_ID, zlib.compress(b"%d" % (len(self) + 1)))
        if complete:
            transaction.delete(_STATE_KEY)
            if self.metadata:
                transaction.put(_METADATA, zlib.compress(_dump(self.metadata)))
        else:
            state = {"metadata": self.metadata, "progress": self.progress}
            transaction.put(_STATE_KEY, json.dumps(state).encode())


def _row(s: Structure) -> dict[str, Any]:
    """Give a row in the order in which ASE writes its fields."""
    clash = sorted(_LABELS.intersection(s.info))
    if clash:
        raise DataError(
            f"info holds {', '.join(clash)}, which readers of .aselmdb take for the label: "
            "remove it or give it another name"
        )
    row: dict[str, Any] = {"numbers": _tagged(s.numbers), "positions": _tagged(s.positions)}
    if s.pbc.any():
        row["pbc"] = _tagged(s.pbc)
    if s.cell.any():
        row["cell"] = _tagged(s.cell)
    if s.tags is not None:
        row["tags"] = _tagged(s.tags)
    if s.fixed is not None and s.fixed.any():
        indices = s.fixed.nonzero()[0].tolist()
        row["constraints"] = [{"name": "FixAtoms", "kwargs": {"indices": indices}}]
    if s.labelled:
        row |= {"calculator": "unknown", "calculator_parameters": {}}
    if s.energy is not None:
        row["energy"] = s.energy
    if s.forces is not None:
        row["forces"] = _tagged(s.forces)
    if s.stress is not None:
        row["stress"] = _tagged(s.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]])
    data = dict(s.info)
    for name, value in (("charge", s.charge), ("spin", s.spin)):
        if value is not None:
            data[name] = int(value) if value == int(value) else value
    # Times are years since 2000; none is known, and ASE wants numbers.
    return row | {"ctime": 0.0, "mtime": 0.0, "user": None, "data": data}


def _tagged(array: Array) -> dict[str, Any]:
    dtype = _DTYPES[array.dtype.kind]
    return {"__ndarray__": [list(array.shape), dtype, array.ravel().tolist()]}


def _dump(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # whole numbers of more than 64 bits
        return json.dumps(value).encode()
