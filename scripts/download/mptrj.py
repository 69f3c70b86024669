"""Download and convert MPtrj: relaxations of the Materials Project, PBE and PBE+U (VASP).

    python scripts/download/mptrj.py full --out data-sets

Never run here (this server could not be reached): 1,580,395 frames of 145,923 materials in one JSON
document of 12,188,168,685 bytes; address, size and MD5 sum are figshare's (article 23713842,
version 2, file 41619375) as others report them.

The energy that is stored is `uncorrected_total_energy`, what VASP gave: the corrected one (MP2020)
jumps where a correction sets in, and the two must not be mixed. Stress is turned from kB in VASP's
sign into eV/Å³, tension positive. Split by material (`mp_id` in info; docs/datasets.md shows how),
not by frame: frames of one relaxation are near copies.

Licence: figshare's page is reported to say MIT; the data of the Materials Project is CC-BY-4.0.
Look at the page before you publish. Cite Deng et al., CHGNet, Nat. Mach. Intell. 5, 1031 (2023),
doi:10.1038/s42256-023-00716-3.
"""

from __future__ import annotations

from fetch import Archive, Conversion, parser, run_recipe

FILE = "MPtrj_2022.9_full.json"
ARCHIVE = Archive(
    "https://ndownloader.figshare.com/files/41619375",
    size=12.2,
    disk=18,
    md5="50ead5f27f9a4f6beb7564c4188f1e9f",
    file=FILE,
)


def main() -> None:
    """Parse the command line and follow the recipe."""
    arguments = parser(__doc__ or "", ["full"]).parse_args()
    folder = arguments.out / "mptrj"
    conversion = Conversion(str(folder / FILE), folder / "mptrj.lmdb")
    run_recipe(ARCHIVE, folder, conversion, arguments)


if __name__ == "__main__":
    main()
