"""Parameters of a mixed model as statsmodels packs them: [fixed effects, vech(cov_re), vcomp].

Everything but the fixed effects is *relative*: divided by the error variance ``scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmixed.blocks import Floats
from dmixed.errors import DataError


class VCSpec:
    """Design matrices of variance components, group by group.

    Parameters
    ----------
    names
        name of each component
    colnames
        ``colnames[k][i]``: names of the columns of component k in the i-th group
    mats
        ``mats[k][i]``: (n_i, m_ki) its columns there, dense or scipy sparse; the groups in the
        order of their sorted labels, rows in the order of the data
    """

    def __init__(
        self,
        names: Sequence[str],
        colnames: Sequence[Sequence[Sequence[str]]],
        mats: Sequence[Sequence[Any]],
    ) -> None:
        self.names = list(names)
        self.colnames = list(colnames)
        self.mats = list(mats)


class MixedLMParams:
    """Fixed effects and relative covariance parameters of a model.

    Parameters
    ----------
    k_fe, k_re, k_vc
        numbers of fixed effects, of correlated random effects, and of variance components

    Attributes
    ----------
    fe_params
        (k_fe,) units of y per unit of each column
    cov_re
        (k_re, k_re) covariance of the random effects divided by ``scale``
    vcomp
        (k_vc,) variances of the components divided by ``scale``
    reml
        criterion by which a fit estimated them, None where nobody did; the likelihood functions
        of a model take it as their default
    """

    def __init__(self, k_fe: int, k_re: int, k_vc: int) -> None:
        self.k_fe, self.k_re, self.k_vc = int(k_fe), int(k_re), int(k_vc)
        self.fe_params: Floats = np.zeros(self.k_fe)
        self.cov_re: Floats = np.zeros((self.k_re, self.k_re))
        self.vcomp: Floats = np.zeros(self.k_vc)
        self.reml: bool | None = None

    @property
    def k_re2(self) -> int:
        """Distinct entries of ``cov_re``."""
        return self.k_re * (self.k_re + 1) // 2

    @property
    def k_tot(self) -> int:
        """Parameters in all."""
        return self.k_fe + self.k_re2 + self.k_vc

    @staticmethod
    def from_packed(
        params: Any, k_fe: int, k_re: int, use_sqrt: bool, has_fe: bool
    ) -> MixedLMParams:
        """Parameters from a vector.

        Parameters
        ----------
        params
            ``[fe_params (if has_fe), lower triangle by rows, vcomp]``
        use_sqrt
            the triangle is that of a Cholesky factor, and ``vcomp`` are square roots

        Raises
        ------
        DataError
            the vector is too short
        """
        values = numbers(params, "params")
        if values.ndim != 1:
            raise DataError(f"packed parameters are a vector, not of shape {values.shape}")
        first = k_fe if has_fe else 0
        k_vc = len(values) - first - k_re * (k_re + 1) // 2
        if k_vc < 0:
            raise DataError(
                f"packed parameters have length {len(values)}: {k_fe if has_fe else 0} fixed "
                f"effects and {k_re} random effects need at least {len(values) - k_vc}"
            )
        made = MixedLMParams(k_fe, k_re, k_vc)
        if has_fe:
            made.fe_params = values[:k_fe].copy()
        triangle = np.zeros((k_re, k_re))
        triangle[np.tril_indices(k_re)] = values[first : first + made.k_re2]
        rest = values[first + made.k_re2 :].copy()
        if use_sqrt:
            made.cov_re, made.vcomp = triangle @ triangle.T, rest**2
        else:
            made.cov_re, made.vcomp = triangle + np.tril(triangle, -1).T, rest
        return made

    @staticmethod
    def from_components(
        fe_params: Any = None, cov_re: Any = None, cov_re_sqrt: Any = None, vcomp: Any = None
    ) -> MixedLMParams:
        """Parameters from their parts; what is not given is empty.

        Parameters
        ----------
        cov_re_sqrt
            a lower-triangular factor, instead of ``cov_re``
        """
        fe = np.zeros(0) if fe_params is None else numbers(fe_params, "fe_params").copy()
        if cov_re is None and cov_re_sqrt is not None:
            half = numbers(cov_re_sqrt, "cov_re_sqrt")
            cov_re = half @ half.T
        cov = np.zeros((0, 0)) if cov_re is None else numbers(cov_re, "cov_re").copy()
        vc = np.zeros(0) if vcomp is None else numbers(vcomp, "vcomp").copy()
        if fe.ndim != 1 or vc.ndim != 1 or cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
            raise DataError(
                f"fe_params {fe.shape} and vcomp {vc.shape} must be vectors, cov_re {cov.shape} "
                "a square matrix"
            )
        made = MixedLMParams(len(fe), len(cov), len(vc))
        made.fe_params, made.cov_re, made.vcomp = fe, cov, vc
        return made

    def copy(self) -> MixedLMParams:
        """Independent copy."""
        made = MixedLMParams.from_components(self.fe_params, self.cov_re, vcomp=self.vcomp)
        made.reml = self.reml
        return made

    def get_packed(self, use_sqrt: bool, has_fe: bool = False) -> Floats:
        """Vector ``[fe_params (if has_fe), lower triangle by rows, vcomp]``.

        Parameters
        ----------
        use_sqrt
            the lower Cholesky factor of ``cov_re`` and square roots of ``vcomp``

        Raises
        ------
        DataError
            ``use_sqrt`` and ``cov_re`` is not positive semi-definite, or a variance is negative
        """
        cov, vcomp = self.cov_re, self.vcomp
        if use_sqrt:
            cov = lower_root(cov)
            if (vcomp < 0).any():
                raise DataError(f"vcomp has a negative variance: {vcomp}")
            vcomp = np.sqrt(vcomp)
        parts = [self.fe_params] if has_fe else []
        parts += [cov[np.tril_indices(self.k_re)], vcomp]
        return np.concatenate(parts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MixedLMParams):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("fe_params", "cov_re", "vcomp")
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"MixedLMParams(fe_params={self.fe_params!r}, cov_re={self.cov_re!r}, "
            f"vcomp={self.vcomp!r})"
        )


def numbers(given: Any, argument: str) -> Floats:
    """What was given as an array of numbers.

    Raises
    ------
    DataError
        it is not one, naming the argument
    """
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{argument} must hold numbers, not {given!r:.60}") from None


def lower_root(cov: NDArray[np.float64]) -> Floats:
    """Lower triangular L with L L' = cov and non-negative diagonal, also of a singular matrix.

    Raises
    ------
    DataError
        cov is not positive semi-definite
    """
    cov = np.asarray(cov, dtype=np.float64)
    if not len(cov):
        return cov
    if not np.isfinite(cov).all():
        raise DataError("cov_re must hold finite numbers")
    try:
        return np.asarray(np.linalg.cholesky(cov))
    except np.linalg.LinAlgError:
        w, V = np.linalg.eigh(0.5 * (cov + cov.T))
    if w[0] < -1e-10 * max(float(w[-1]), np.finfo(float).tiny):
        raise DataError(
            f"cov_re is not positive semi-definite (smallest eigenvalue {w[0]:g}): it is no "
            "covariance matrix"
        ) from None
    upper = np.asarray(np.linalg.qr((V * np.sqrt(np.maximum(w, 0.0))).T, mode="r"))
    return np.asarray(upper.T * np.where(np.diag(upper) < 0, -1.0, 1.0) + 0.0)
