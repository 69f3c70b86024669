"""Download and convert OMat24: inorganic crystals far from equilibrium, PBE and PBE+U (VASP).

    python scripts/download/omat24.py val/rattled-300-subsampled --out data-sets
    python scripts/download/omat24.py train/rattled-relax train/aimd-from-PBE-1000-npt

Never run here (these servers could not be reached): addresses and sizes are those of the fairchem
documentation (docs/core/datasets/omat24.md). No checksum is published. About 101 million
structures in all; the documentation lists the counts of the validation sets under "train", so no
count of a training part is given here.

Energies are total and agree with neither the Materials Project's nor OC20's: other
pseudopotentials. Do not train on them together without references of their own. Of the validation
sets, take those below (20 December 2024): the first release had duplicates (fairchem issue 942).

Licence: CC-BY-4.0. Cite Barroso-Luque et al., Open Materials 2024 (OMat24) Inorganic Materials
Dataset and Models, arXiv:2410.12771 (2024).
"""

from __future__ import annotations

from fetch import DISK, META, Archive, Conversion, parser, run_recipe

# GB of the compressed training and validation part.
SIZES = {
    "rattled-1000": (21, 0.218),
    "rattled-1000-subsampled": (7.1, 0.077),
    "rattled-500": (13, 0.135),
    "rattled-500-subsampled": (7.3, 0.079),
    "rattled-300": (12, 0.122),
    "rattled-300-subsampled": (6.4, 0.069),
    "aimd-from-PBE-1000-npt": (26, 0.261),
    "aimd-from-PBE-1000-nvt": (24, 0.251),
    "aimd-from-PBE-3000-npt": (25, 0.282),
    "aimd-from-PBE-3000-nvt": (32, 0.364),
    "rattled-relax": (12, 0.118),
}


def sets() -> dict[str, Archive]:
    """Give every part by name, ``train/…`` and ``val/…``."""
    folders = {"train": f"{META}/omat/241018/omat/train", "val": f"{META}/omat/241220/omat/val"}
    return {
        f"{split}/{part}": Archive(f"{folders[split]}/{part}.tar.gz", size, DISK * size)
        for part, both in SIZES.items()
        for split, size in zip(folders, both, strict=True)
    }


def main() -> None:
    """Parse the command line and follow the recipe for each part."""
    known = sets()
    arguments = parser(__doc__ or "", known).parse_args()
    for name in arguments.sets:
        split, part = name.split("/")
        folder = arguments.out / "omat24" / split
        pattern = str(folder / part / "*.aselmdb")
        run_recipe(known[name], folder, Conversion(pattern, folder / f"{part}.lmdb"), arguments)


if __name__ == "__main__":
    main()
