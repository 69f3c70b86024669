"""Download and convert OC20: adsorbates on surfaces, relaxations by RPBE (VASP).

    python scripts/download/oc20.py s2ef/train_200K s2ef/val_id --out data-sets
    python scripts/download/oc20.py is2re/10k --dry-run

Never run here (these servers could not be reached): addresses, sizes and MD5 sums are those of the
fairchem documentation (docs/core/datasets/oc20.md); layouts inside the archives are found by
pattern.

Energies. S2EF comes as text: energies are total, and reference energies lie beside them in .txt
files. The benchmark's adsorption energies are total minus reference: that is what this recipe
stores (--energy adsorption, the default; --energy total keeps the totals). IS2RE comes as LMDB
with adsorption energies; the relaxed frame is taken, which has an energy and no forces.

Licence: CC-BY-4.0. Cite Chanussot et al., Open Catalyst 2020 (OC20) Dataset and Community
Challenges, ACS Catal. 11, 6059 (2021), doi:10.1021/acscatal.0c04525. Use the files of February
2021 or later. A file of the 20M set (1050.extxyz) has been reported as truncated: the conversion
drops what is damaged, says so, and keeps the rest.
"""

from __future__ import annotations

from fetch import META, Archive, Conversion, parser, run_recipe

# Size of the archive, GB; size of the text in it, GB; MD5.
S2EF = {
    "train_200K": (0.344, 1.7, "f8d0909c2623a393148435dede7d3a46"),
    "train_2M": (3.4, 17, "953474cb93f0b08cdc523399f03f7c36"),
    "train_20M": (34, 165, "863bc983245ffc0285305a1850e19cf7"),
    "train_all": (225, 1100, "12a7087bfd189a06ccbec9bc7add2bcd"),
    "val_id": (1.7, 8.3, "f57f7f5c1302637940f2cc858e789410"),
    "val_ood_ads": (1.7, 8.2, "431ab0d7557a4639605ba8b67793f053"),
    "val_ood_cat": (1.7, 8.3, "532d6cd1fe541a0ddb0aa0f99962b7db"),
    "val_ood_both": (1.9, 9.5, "5731862978d80502bbf7017d68c2c729"),
    "rattled": (29, 136, "40431149b27b64ce1fb40cac4e2e064b"),
    "md": (42, 306, "9fed845aaab8fb4bf85e3a8db57796e0"),
}
IS2RE = Archive(
    f"{META}/is2res_train_val_test_lmdbs.tar.gz", 8.1, 110, "cfc04dd2f87b4102ab2f607240d25fb1"
)
IS2RE_PARTS = {
    "10k": "10k/train",
    "100k": "100k/train",
    "all": "all/train",
    **{part: f"all/{part}" for part in ("val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")},
}


def main() -> None:
    """Parse the command line and follow the recipe for each set."""
    sets = [*(f"s2ef/{part}" for part in S2EF), *(f"is2re/{part}" for part in IS2RE_PARTS)]
    options = parser(__doc__ or "", sets)
    options.add_argument("--energy", choices=["adsorption", "total"], default="adsorption")
    arguments = options.parse_args()
    for name in arguments.sets:
        task, part = name.split("/")
        folder = arguments.out / "oc20" / task
        if task == "s2ef":
            size, text, md5 = S2EF[part]
            # Files stay compressed; the store takes half of what the text does.
            archive = Archive(f"{META}/s2ef_{part}.tar", size, 2 * size + text / 2, md5)
            pattern = folder / f"s2ef_{part}" / "**" / "*.extxyz.xz"
            stated = ["--energy-convention", arguments.energy]
        else:
            archive = IS2RE
            pattern = folder / "**" / "is2re" / IS2RE_PARTS[part] / "data.lmdb"
            stated = ["--energy-convention", "adsorption", "--is2re", "relaxed"]
        conversion = Conversion(str(pattern), folder / f"{part}.lmdb", tuple(stated))
        run_recipe(archive, folder, conversion, arguments)


if __name__ == "__main__":
    main()
