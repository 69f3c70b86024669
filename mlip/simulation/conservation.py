"""Tell users of forces that are no derivatives of an energy what this means for their run.

A calculator says so by ``conservative = False``; one without this attribute is taken at its word.
"""

from __future__ import annotations

import warnings
from typing import Any

from mlip.errors import InputError, NonConservativeWarning

FACT = "the forces of this potential are predicted directly, not derivatives of its energy"
REMEDY = "use a potential in gradient mode"

IN_GENERAL = (
    "the energy drifts in NVE dynamics, a relaxation ends where the forces vanish and not in a "
    "minimum of the energy, and the Hessian of phonons is not symmetric; for these, " + REMEDY
)
IN_RELAXATION = (
    "the relaxation ends where they vanish, which is no minimum of the energy, and the energy may "
    "rise on the way; for energies of relaxed structures and for phonons, " + REMEDY
)
IN_ELASTICITY = (
    "the matrix of elastic constants from stresses is not symmetric, and its mean with the "
    "transpose is no second derivative of the energy; " + REMEDY
)
_THERMOSTAT = (
    "what keeps the temperature also takes up the energy that they create or destroy, and averages "
    "are not those of a Boltzmann distribution; to trust these, " + REMEDY
)
IN_DYNAMICS = {
    "nve": "THE TOTAL ENERGY IS NOT CONSERVED in this NVE run, temperature and energy drift with "
    f"any time step; {REMEDY}, or a thermostat (nvt-langevin, nvt-bussi)",
    "nvt-langevin": _THERMOSTAT,
    "nvt-bussi": _THERMOSTAT,
    "npt": _THERMOSTAT,
}


def is_conservative(calculator: Any) -> bool:
    """Tell whether forces and stress of an ASE calculator are derivatives of its energy."""
    return bool(getattr(calculator, "conservative", True))


def warn_of_direct_forces(calculator: Any, consequence: str, stacklevel: int = 3) -> None:
    """Warn that forces are not derivatives; the calculator itself then keeps quiet.

    Args:
        calculator: any ASE calculator; nothing happens if it is conservative.
        consequence: what follows from it here, and what to do; one of the texts above.
        stacklevel: of the caller whom the warning is for; 3 is who called the calling function.
    """
    if is_conservative(calculator):
        return
    if hasattr(calculator, "announced"):
        calculator.announced = True
    warnings.warn(f"{FACT}: {consequence}", NonConservativeWarning, stacklevel=stacklevel)


def require_stress(calculator: Any, purpose: str) -> None:
    """Refuse a potential without stress for what needs one.

    Raises:
        InputError: the calculator says ``has_stress = False``.
    """
    if not getattr(calculator, "has_stress", True):
        raise InputError(
            f"{purpose} needs a stress, and this potential predicts none (direct forces without "
            "a stress head): keep the cell fixed, or choose another potential"
        )
