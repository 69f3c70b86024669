"""The summary of a demo as tables, for the console and for `summary.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text


class Table(NamedTuple):
    """A table that can be printed or written."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Group:
        """Lay the table out for a terminal, below its title."""
        table = RichTable(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for k, name in enumerate(self.header):
            broken = name.replace(" (", "\n(")
            table.add_column(broken, justify="left" if k == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return Group(Text(f"\n{self.title}", style="bold"), table)

    def markdown(self) -> str:
        """Write the table as Markdown."""
        lines = [self.header, ["---", *["--:"] * (len(self.header) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{body}\n"


def tables(values: Mapping[str, Any]) -> list[Table]:
    """Make the tables of a summary."""
    made = [_relaxations(values["relaxations"]), _crystals(values["crystals"])]
    if values["dynamics"] is not None:
        made.append(_dynamics(values["dynamics"]))
    return [*made, _learning(values["learning"])]


def markdown(values: Mapping[str, Any]) -> str:
    """Write the whole summary as Markdown."""
    seconds = sum(values["seconds"].values())
    times = ", ".join(f"{name} {value:.0f} s" for name, value in values["seconds"].items())
    problems = "".join(f"- **problem**: {text}\n" for text in values["problems"])
    files = "\n".join(f"- `{name}`" for name in values["files"])
    return (
        f"# mlip demo\n\nPotential: {values['potential']}. mlip {values['version']}. "
        f"{seconds:.0f} s in all ({times}).\n\n{problems}\n"
        + "\n".join(table.markdown() for table in tables(values))
        + f"\n## Files\n\n{files}\n"
    )


def _relaxations(rows: Sequence[Mapping[str, Any]]) -> Table:
    header = (
        "structure", "atoms", "cell", "status", "steps", "ΔE (meV/atom)", "force (eV/Å)",
        "volume (Å³/atom)",
    )  # fmt: skip
    body = [
        (
            row["name"],
            str(row["atoms"]),
            row["cell"],
            row["status"],
            str(row["steps"]),
            f"{1000 * (row['energy'] - row['energy_start']):.1f}",
            f"{row['max_force']:.4f}",
            f"{row['volume']:.3f}",
        )
        for row in rows
    ]
    return Table("Relaxed structures", header, body)


def _crystals(crystals: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ("crystal", "", "a (Å)", "B (GPa)", "C11 (GPa)", "C12 (GPa)", "C44 (GPa)")
    body = []
    for symbol, row in crystals.items():
        name = f"{symbol} {row['lattice']}"
        if "potential" in row:
            body.append((name, "potential", *_constants(row["potential"])))
        else:
            body.append((name, "failed", *["–"] * 5))
        body.append(("", "DFT", *_constants(row["dft"])))
    return Table("Lattice and elastic constants (clamped ions)", header, body)


def _constants(values: Mapping[str, float]) -> list[str]:
    return [f"{values['a']:.4f}", *[f"{values[name]:.1f}" for name in ("B", "C11", "C12", "C44")]]


def _dynamics(values: Mapping[str, Any]) -> Table:
    header = ("run", "atoms", "time (ps)", "status", "temperature (K)", "drift (meV/atom/ps)")
    body = []
    for name in ("nvt", "nve"):
        if name in values:
            run = values[name]
            drift = run.get("drift_meV_per_atom_per_ps")
            body.append(
                (
                    name.upper(),
                    values["formula"],
                    f"{run['time_ps']:g}",
                    run["status"],
                    f"{run['temperature_K']:.0f} ± {run['temperature_std_K']:.0f}",
                    "–" if drift is None else f"{drift:.4f}",
                )
            )
    return Table(f"Dynamics, time step {values['timestep_fs']:g} fs", header, body)


def _learning(values: Mapping[str, Any]) -> Table:
    units = {
        "energy": ("energy (meV/atom)", 1000),
        "forces": ("forces (meV/Å)", 1000),
        "stress": ("stress (GPa)", 1),
    }
    header = ("quantity", "MAE", "RMSE", "values")
    body = []
    for name, (label, scale) in units.items():
        errors = values["test"][name]
        if errors["count"]:
            numbers = [f"{scale * errors[kind]:.3g}" for kind in ("mae", "rmse")]
            body.append((label, *numbers, str(errors["count"])))
    title = f"Trained here on {values['frames']} EMT frames, {values['epochs']} epochs: test errors"
    return Table(title, header, body)
