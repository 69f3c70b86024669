"""The table of known file formats; the first that recognises a file reads it."""

from __future__ import annotations

from mlip.datasets.formats.ase_files import (
    ase_format,
    read_database,
    read_trajectory,
    read_with_ase,
)
from mlip.datasets.formats.aselmdb import FORMAT as ASELMDB
from mlip.datasets.formats.aselmdb import is_aselmdb, open_aselmdb
from mlip.datasets.formats.extxyz import is_extxyz, read_extxyz
from mlip.datasets.formats.mptrj import FORMAT as MPTRJ
from mlip.datasets.formats.mptrj import is_mptrj, open_mptrj
from mlip.datasets.formats.native import is_lmdb, open_store
from mlip.datasets.formats.oc20 import FORMAT as OC20
from mlip.datasets.formats.oc20 import is_oc20, open_oc20
from mlip.datasets.formats.oc20_raw import FORMAT as OC20_RAW
from mlip.datasets.formats.oc20_raw import facts, is_oc20_raw, read_oc20_raw
from mlip.datasets.formats.reader import Reader, by_index

READERS: tuple[Reader, ...] = (
    Reader(ASELMDB, is_aselmdb, by_index(open_aselmdb), open_aselmdb),
    Reader(OC20, is_oc20, by_index(open_oc20), open_oc20),
    Reader("mlip store (.lmdb)", is_lmdb, by_index(open_store), open_store),
    Reader(OC20_RAW, is_oc20_raw, read_oc20_raw, facts=facts),
    Reader("extxyz (.extxyz, .xyz, also .xz .gz .bz2)", is_extxyz, read_extxyz),
    Reader(MPTRJ, is_mptrj, by_index(open_mptrj), open_mptrj),
    Reader("ASE trajectory (.traj)", lambda p: ase_format(p) == "traj", read_trajectory),
    Reader("ASE database (.db, .json)", lambda p: ase_format(p) in {"db", "json"}, read_database),
    Reader(
        "any other format that ASE reads (OUTCAR, vasprun.xml, cif, ...)",
        lambda p: ase_format(p) is not None,
        read_with_ase,
    ),
)
