"""Download and convert sAlex: Alexandria's PBE relaxations, subsampled, without those in WBM.

    python scripts/download/salex.py val --out data-sets

Never run here (these servers could not be reached): addresses and sizes are those of the fairchem
documentation (docs/core/datasets/omat24.md): 10,447,765 structures to train, 553,218 to validate.
No checksum is published by its makers (a user reports MD5 8ad69db0c2261541530ae8bc772c5b6d for
the 8,071,921,954 bytes of `train`).

Energies are total, computed with settings like those of the Materials Project (MPtrj), not those
of OMat24.

Licence: CC-BY-4.0. Cite Barroso-Luque et al., arXiv:2410.12771 (2024), and Schmidt et al.,
Adv. Mater. 35, 2210788 (2023), doi:10.1002/adma.202210788.
"""

from __future__ import annotations

from fetch import DISK, META, Archive, Conversion, parser, run_recipe

FOLDER = f"{META}/omat/241018/sAlex"
SETS = {
    "train": Archive(f"{FOLDER}/train.tar.gz", 8.1, DISK * 8.1),
    "val": Archive(f"{FOLDER}/val.tar.gz", 0.41, DISK * 0.41),
}


def main() -> None:
    """Parse the command line and follow the recipe for each part."""
    arguments = parser(__doc__ or "", SETS).parse_args()
    folder = arguments.out / "salex"
    for name in arguments.sets:
        conversion = Conversion(str(folder / name / "*.aselmdb"), folder / f"{name}.lmdb")
        run_recipe(SETS[name], folder, conversion, arguments)


if __name__ == "__main__":
    main()
