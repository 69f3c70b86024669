"""Fuzz the readers of foreign data with a coverage-guided fuzzer (atheris).

Only a result or a DataError may come out.

Two targets: ``entry`` feeds bytes to the pickle reader and on to the checks of an OC20 entry;
``file`` feeds whole LMDB files to the LMDB reader and the OC20 data set. Anything but a result or
a DataError, more than ten seconds or two gigabytes for one input, or a marker that a payload left
behind ends the run and is saved; small files of that kind belong in tests/datasets/corpus.

    python scripts/fuzz_dataset.py entry --seconds 300 --work /tmp/fuzz
"""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAYLOAD = b"\x80\x04cos\nmkdir\n(\x8c\x0bmlip_pwned_ftR."
WORDS = (
    b"torch_geometric.data.data", b"Data", b"torch_geometric.data.storage", b"GlobalStorage",
    b"torch._utils", b"_rebuild_tensor_v2", b"_rebuild_tensor_v3", b"torch.storage",
    b"_load_from_bytes", b"numpy.core.multiarray", b"scalar", b"_reconstruct", b"numpy", b"dtype",
    b"ndarray", b"collections", b"OrderedDict", b"_store", b"_mapping", b"pos", b"cell", b"natoms",
    b"atomic_numbers", b"FloatStorage", b"LongStorage", b"posix", b"system", b"builtins", b"eval",
    b"\x81}", b")R", b"\x93", b"\x94", b"\x85", b"\x86", b"\x87", b"\x8a\x08", b"\x8d", b"\x8e",
    b"\x96", b"\x95", b"\x89", b"b.", b"u.", b"Q", b"r\xff\xff\xff\x7f", b"\xff\xff\xff\xff",
)  # fmt: skip


def entries() -> list[bytes]:
    """Make the entries to begin with."""
    import numpy as np
    import torch
    from torch_geometric.data import Batch, Data

    n = 3
    frame = {
        "pos": torch.rand(n, 3), "cell": torch.eye(3)[None] * 9, "natoms": n,
        "atomic_numbers": torch.full((n,), 8.0), "tags": torch.zeros(n).long(), "sid": 7,
        "fixed": torch.zeros(n, dtype=torch.int32), "force": torch.rand(n, 3), "y": np.float64(-1),
    }  # fmt: skip
    odd = {
        "a": np.arange(4.0), "b": torch.rand(2, 3).t(), "c": torch.zeros(2, dtype=torch.uint16),
        "d": [1, {"k": 2.5}], "e": np.array(["x"]), "f": {1, 2}, "g": b"bytes", "h": 2**40,
    }  # fmt: skip
    edges = {"edge_index": torch.zeros(2, 2).long(), "cell_offsets": torch.zeros(2, 3).long()}
    relaxation = {"y": None, "y_init": 1.0, "y_relaxed": 0.5, "pos_relaxed": torch.rand(n, 3)}
    contents: list[Any] = [
        Data(**frame), Data(**{**frame, **edges, **relaxation}), Data(**odd), 7,
        Batch.from_data_list([Data(pos=torch.zeros(1, 3))]),
    ]  # fmt: skip
    return [pickle.dumps(c, protocol) for c in contents for protocol in (2, 4, 5)] + [PAYLOAD]


def files(folder: Path) -> list[bytes]:
    """Make the LMDB files to begin with."""
    import lmdb

    whole = entries()
    made: list[bytes] = []
    for count in (1, 3, 150):
        path = folder / f"{count}.lmdb"
        environment = lmdb.open(str(path), subdir=False, map_size=2**24, lock=False)
        with environment, environment.begin(write=True) as transaction:
            for i in range(count):
                transaction.put(b"%d" % i, whole[i % 6] if count < 5 else b"\x80\x04K\x01.")
            transaction.put(b"length", pickle.dumps(count))
        made.append(path.read_bytes())
    return made


def entry_target() -> Callable[[bytes], None]:
    """Give the function that one pickle goes through."""
    from mlip.datasets.formats.oc20_entry import extract_entry
    from mlip.datasets.formats.pickles import loads
    from mlip.datasets.options import ReadOptions
    from mlip.errors import DataError

    choices = [ReadOptions(is2re=frame) for frame in (None, "initial", "relaxed")]

    def run(data: bytes) -> None:
        try:
            fields = loads(data)
        except DataError:
            return
        for options in choices if isinstance(fields, dict) else ():
            try:
                extract_entry(fields, options)
            except DataError:
                OUTCOMES["refused by the checks"] += 1
            else:
                OUTCOMES["structures"] += 1

    return run


def file_target(folder: Path) -> Callable[[bytes], None]:
    """Give the function that one LMDB file goes through."""
    from mlip.datasets.formats.oc20 import is_oc20, open_oc20
    from mlip.datasets.lmdb_reader import LmdbReader
    from mlip.datasets.options import ReadOptions
    from mlip.errors import DataError

    path = folder / "case.lmdb"

    def attempt(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except DataError:
            return None

    def run(data: bytes) -> None:
        path.write_bytes(data)
        reader = attempt(lambda: LmdbReader(path))
        if reader is None:
            return
        OUTCOMES["files opened"] += 1
        for key in attempt(lambda: list(reader.keys())) or [b"0", b"length"]:
            attempt(lambda key=key: reader.get(key))
        is_oc20(path)
        dataset = attempt(lambda: open_oc20(path, ReadOptions()))
        for i in range(min(len(dataset), 10)) if dataset is not None else ():
            if attempt(lambda i=i: dataset[i]) is not None:
                OUTCOMES["structures"] += 1

    return run


OUTCOMES: collections.Counter[str] = collections.Counter()


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("target", choices=["entry", "file"])
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--work", type=Path, help="folder that keeps what was found (default: new)")
    chosen = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is needed for this: run  pip install atheris")
    work: Path = (chosen.work or Path(tempfile.mkdtemp(prefix="fuzz-"))).absolute()
    corpus, scratch = work / f"{chosen.target}-corpus", work / "scratch"
    for folder in (corpus, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(entries() if chosen.target == "entry" else files(scratch)):
        (corpus / f"seed-{i}").write_bytes(seed)
    words = work / "words"
    words.write_text("".join('"' + "".join(f"\\x{b:02x}" for b in w) + '"\n' for w in WORDS))
    with atheris.instrument_imports(include=["mlip.datasets"]):
        run = entry_target() if chosen.target == "entry" else file_target(scratch)
    os.chdir(scratch)

    def one_input(data: bytes) -> None:
        OUTCOMES["inputs"] += 1
        run(data)
        if OUTCOMES["inputs"] % 10_000 == 0:
            assert not list(scratch.glob("mlip_pwned*")), "a payload ran"
            (work / f"{chosen.target}-outcomes").write_text(f"{dict(OUTCOMES)}\n")

    longest = 20_000 if chosen.target == "entry" else 100_000
    options = [
        f"-max_total_time={chosen.seconds}", f"-max_len={longest}", "-timeout=10",
        "-rss_limit_mb=2048", f"-dict={words}", f"-artifact_prefix={work}/found-",
        "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
