"""Download and convert OMol25: molecules, electrolytes, metal complexes, ωB97M-V/def2-TZVPD (ORCA).

    python scripts/download/omol25.py neutral_val --out data-sets
    python scripts/download/omol25.py train_4M val

Never run here (these servers could not be reached): addresses and sizes are those of the data set's
page on Hugging Face (facebook/OMol25, DATASET.md). No checksum is published. The test part has no
labels and is left out.

Energies are total, of all electrons: 10⁵ eV and more for one molecule, so that they must stay in
double precision until references are subtracted (ours do). `charge` and `spin` of every molecule
are kept; spin is the multiplicity 2S + 1. `data_id` names the domain of a molecule and is a good
group to report errors by; molecules of one `source` family belong on one side of a split.

Licence: CC-BY-4.0. Cite Levine et al., The Open Molecules 2025 (OMol25) Dataset, Evaluations, and
Models, arXiv:2505.08762 (2025).
"""

from __future__ import annotations

from fetch import DISK, META, Archive, Conversion, parser, run_recipe

# GB of the archive; the number of molecules.
SIZES = {
    "train": 489,  # 101,666,280
    "train_4M": 19,  # 3,986,754
    "neutral_train": 101,  # 34,335,828
    "val": 20,  # 2,762,021
    "neutral_val": 0.119,  # 27,697
}
SETS = {
    name: Archive(f"{META}/omol/250514/{name}.tar.gz", size, DISK * size)
    for name, size in SIZES.items()
}


def main() -> None:
    """Parse the command line and follow the recipe for each part."""
    arguments = parser(__doc__ or "", SETS).parse_args()
    folder = arguments.out / "omol25"
    for name in arguments.sets:
        conversion = Conversion(str(folder / name / "*.aselmdb"), folder / f"{name}.lmdb")
        run_recipe(SETS[name], folder, conversion, arguments)


if __name__ == "__main__":
    main()
