"""One zero of energy for all data sets of a run: reference energies, and shifts towards them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ase.data import chemical_symbols

from mlip.datasets.feed.mixture import shift_of
from mlip.errors import DataError, InputError
from mlip.training.config import SetConfig
from mlip.training.data import Part
from mlip.training.references import (
    MAX_RESIDUAL,
    EnergyStatistics,
    References,
    fit_references,
    given_references,
    isolated_references,
    residual,
    residual_rmse,
    summarise,
)
from mlip.training.sets import Splits
from mlip.training.survey import join

Choice = Mapping[str, float] | str | None


@dataclass(frozen=True)
class Zero:
    """The common zero of energy.

    Attributes:
        references: reference energies of the potential.
        convention: ``"total"`` or ``"adsorption"``: what the potential predicts; None if it
            learns no energies.
        own: reference energies of the sets that have their own, by name.
        rmse: residual of each training set, eV/atom.
    """

    references: References
    convention: str | None
    own: dict[str, References]
    rmse: dict[str, float]

    def own_by_symbol(self, name: str) -> dict[str, float] | None:
        """Give the references of a set that has its own."""
        if name not in self.own:
            return None
        return {chemical_symbols[z]: energy for z, energy in self.own[name].energies.items()}

    def lines(self) -> list[str]:
        """Report the references, and the residual of each set if there are several."""
        text = self.references.lines()
        if len(self.rmse) > 1:
            for name, rmse in self.rmse.items():
                how = f", own zero ({self.own[name].source})" if name in self.own else ""
                text.append(f"  set {name}: {residual(rmse)}{how}")
        return text


def settle_zero(choice: Choice, sets: tuple[SetConfig, ...], splits: Splits) -> Zero:
    """Find the reference energies, and shift sets with references of their own to them.

    A set with own references μ' gets Σ n_z (μ_z − μ'_z) added to its energies, also its
    validation and test part (the sets of the same name).

    Args:
        choice: ``reference_energies`` of the run.
        sets: settings of the training sets.
        splits: all sets; their energies are shifted in place.

    Raises:
        InputError: a reference energy is missing, or sets of different energy conventions share
            one zero.
        DataError: the references leave more than 20 eV/atom.
    """
    train = {part.name: part for part in splits.train.parts}
    own = {
        str(each.name): _own(each.reference_energies, str(each.name), splits)
        for each in sets
        if each.reference_energies is not None
    }
    shared = [part for name, part in train.items() if name not in own]
    convention = _common_convention(splits, own)
    main = _main(choice, shared, own, splits)
    table = dict(main.energies)
    for references in own.values():
        for z, energy in references.energies.items():
            table.setdefault(z, energy)
    for name, references in own.items():
        shift = {z: table[z] - energy for z, energy in references.energies.items()}
        for part in _same_name(splits, name) if any(shift.values()) else ():
            part.shift_energies(shift)
    for _, graphs in splits.all():
        graphs.refresh()
    table = {z: table[z] for z in splits.train.survey.elements}
    for part in train.values():
        _check_residual(part, table, main.source)
    references = summarise(table, splits.train.survey.energy, main.source)
    rmse = {name: residual_rmse(part.survey.energy, table) for name, part in train.items()}
    return Zero(references, convention, own, rmse)


def _same_name(splits: Splits, name: str) -> list[Part]:
    return [part for _, graphs in splits.all() for part in graphs.parts if part.name == name]


def _own(choice: Choice, name: str, splits: Splits) -> References:
    """Find the references of one set, for all elements of its parts."""
    parts = _same_name(splits, name)  # the first is the training part
    everything = join([part.survey for part in parts])
    return _references(
        choice, parts[0].survey.energy, everything.isolated, everything.elements, f"set {name}: "
    )


def _main(
    choice: Choice, shared: list[Part], own: dict[str, References], splits: Splits
) -> References:
    """Find the references of the sets without their own, else those given, else the first own."""
    if not shared and (choice is None or isinstance(choice, str)):
        return next(iter(own.values()))
    parts = shared or splits.train.parts
    everything = join([p.survey for part in parts for p in _same_name(splits, part.name)])
    training = join([part.survey for part in parts])
    found = _references(choice, training.energy, everything.isolated, training.elements)
    if choice is not None and not isinstance(choice, str):
        present = splits.train.survey.elements
        more = {z: choice[s] for z in present if (s := chemical_symbols[z]) in choice}
        found.energies.update({z: float(energy) for z, energy in more.items()})
    return found


def _references(
    choice: Choice,
    energies: EnergyStatistics,
    isolated: Mapping[int, float],
    elements: Sequence[int],
    where: str = "",
) -> References:
    where = f"{where}reference_energies"
    if choice is None or choice == "fit":
        table, source = fit_references(energies, elements), "fitted"
    elif choice == "isolated":
        table, source = isolated_references(isolated, elements, where), "isolated atoms"
    else:
        assert not isinstance(choice, str)
        table, source = given_references(choice, elements, where), "given"
    return References(table, residual_rmse(energies, table), {}, source)


def _common_convention(splits: Splits, own: Mapping[str, References]) -> str | None:
    """Give the energy convention of all sets that share the zero of the potential.

    Raises:
        InputError: they have different ones.
    """
    found: dict[str, str] = {}
    for (split, name), convention in splits.conventions.items():
        if convention != "none" and name not in own:
            found.setdefault(convention, f"{name} (data.{split})")
    if not any(part.name not in own for part in splits.train.parts):
        first = splits.train.parts[0].name
        found.setdefault(splits.conventions["train", first], f"{first} (data.train)")
    if len(found) > 1:
        said = ", ".join(f"{kind} in {name}" for kind, name in found.items())
        raise InputError(
            f"sets of different energy conventions share one zero of energy: {said}. Give one of "
            "them its own (reference_energies: fit), or leave its energies out (labels: [forces])"
        )
    return next(iter(found), None)


def _check_residual(part: Part, table: Mapping[int, float], source: str) -> None:
    """Refuse energies that are far from the references.

    Raises:
        DataError: names the structure that is furthest off.
    """
    total = residual_rmse(part.survey.energy, table)
    if not total > MAX_RESIDUAL:
        return
    worst, name = 0.0, ""
    for i in range(len(part.dataset)):
        structure = part.dataset[i]
        if structure.energy is not None:
            off = (structure.energy - shift_of(structure.numbers, table)) / len(structure)
            if abs(off) > abs(worst):
                worst, name = off, part.dataset.name(i)
    raise DataError(
        f"set {part.name}: energies differ from the reference energies ({source}) by {total:.1f} "
        f"eV/atom (RMSE; at most {MAX_RESIDUAL:g} expected), worst in {name}: {worst:.1f} eV/atom. "
        "Check units and level of theory of the labels"
        + ("" if source == "fitted" else ", or leave reference_energies out to have them fitted")
    )
