"""Names and settings of optimisers: scipy's, and statsmodels' short ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dmixed.optimizer import SCIPY_METHODS

_SHORT = {
    "bfgs": "BFGS",
    "lbfgs": "L-BFGS-B",
    "cg": "CG",
    "nm": "Nelder-Mead",
    "powell": "Powell",
    "ncg": "Newton-CG",
    "basinhopping": "basinhopping",
    "minimize": "BFGS",
    "newton": None,
}
"""statsmodels' names; ``newton`` is the exact trust-region Newton."""

_KNOWN = ("gtol", "maxiter", "eps", "maxcor", "ftol", "tol", "disp", "maxls")

_OPTIONS = {
    "Nelder-Mead": {"maxiter": "maxiter", "ftol": "fatol"},
    "Powell": {"maxiter": "maxiter", "ftol": "ftol"},
    "CG": {"maxiter": "maxiter", "gtol": "gtol"},
    "BFGS": {"maxiter": "maxiter", "gtol": "gtol"},
    "Newton-CG": {"maxiter": "maxiter"},
    "L-BFGS-B": {
        "maxiter": "maxiter", "gtol": "gtol", "ftol": "ftol", "maxcor": "maxcor", "maxls": "maxls",
    },
    "TNC": {"gtol": "gtol", "ftol": "ftol"},
    "COBYLA": {"maxiter": "maxiter"},
    "COBYQA": {"maxiter": "maxiter"},
    "SLSQP": {"maxiter": "maxiter", "ftol": "ftol"},
    "trust-constr": {"maxiter": "maxiter", "gtol": "gtol"},
    "dogleg": {"maxiter": "maxiter", "gtol": "gtol"},
    "trust-ncg": {"maxiter": "maxiter", "gtol": "gtol"},
    "trust-exact": {"maxiter": "maxiter", "gtol": "gtol"},
    "trust-krylov": {"gtol": "gtol"},
    "basinhopping": {},
}  # fmt: skip
"""Which of statsmodels' settings a method of scipy takes, and under which name."""


def search_methods(method: str | Sequence[str] | None) -> list[str | None]:
    """Methods by scipy's names, None for Newton.

    Raises
    ------
    ValueError
        a name is not known
    """
    names = [method] if method is None or isinstance(method, str) else list(method)
    by_lower = {name.lower(): name for name in SCIPY_METHODS}
    found: list[str | None] = []
    for name in names:
        lower = name.lower() if isinstance(name, str) else name
        if lower is None:
            found.append(None)
        elif lower in _SHORT:
            found.append(_SHORT[lower])
        elif lower in by_lower:
            found.append(by_lower[lower])
        else:
            raise ValueError(
                f"method={name!r} is not known: use None (Newton), one of statsmodels' names "
                f"({', '.join(_SHORT)}) or one of scipy's ({', '.join(SCIPY_METHODS)})"
            )
    if not found:
        raise ValueError("method=[]: name at least one, or None")
    return found


def settings_of(given: Mapping[str, Any], stacklevel: int) -> dict[str, dict[str, Any]]:
    """Settings for every method of scipy; unknown ones are warned of, as statsmodels does."""
    for name in given:
        if name not in _KNOWN:
            warnings.warn(
                f"Argument {name} is not used by MixedLM.fit and will become an error",
                FutureWarning,
                stacklevel=stacklevel + 1,
            )
    tol = {"tol": given["tol"]} if given.get("tol") is not None else {}
    return {
        method: {**tol, **{own: given[name] for name, own in taken.items() if name in given}}
        for method, taken in _OPTIONS.items()
    }
