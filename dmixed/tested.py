"""Tests and profiles of the parameters of a fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmixed import contrasts, prediction
from dmixed.errors import ConvergenceWarning, DataError
from dmixed.estimated import Estimated
from dmixed.profiling import profile_fixed, profile_variance


@dataclass(frozen=True, eq=False)
class Tested(Estimated):
    """Estimates with hypothesis tests and profile likelihood. Tests are large-sample."""

    def t_test(self, r_matrix: Any, use_t: bool | None = None) -> contrasts.ContrastResults:
        """Test of each row of R beta = q, on the fixed effects.

        Parameters
        ----------
        r_matrix
            (m, k_fe) or (k_fe,) array, a string such as ``"x1 = 0, x2 - x3 = 1"``, or a tuple
            (R, q)
        use_t
            Student's t with ``df_resid`` degrees of freedom, instead of the normal distribution

        Raises
        ------
        ValueError
            an array has not k_fe columns, or a name is unknown
        """
        self._check_width(r_matrix, (self.k_fe,))
        R, q = contrasts.constraint(r_matrix, self._fixed_names)
        df = self.df_resid if use_t else None
        return contrasts.t_test(self._estimates.beta, self._estimates.cov_beta, R, q, df=df)

    def _check_width(self, r: Any, widths: Sequence[int]) -> None:
        matrix = r[0] if isinstance(r, tuple) else r
        if isinstance(matrix, str) or (
            isinstance(matrix, list) and matrix and isinstance(matrix[0], str)
        ):
            return
        shape = np.shape(matrix)
        if len(shape) not in (1, 2) or shape[-1] not in widths:
            raise ValueError(
                f"r_matrix for this test should have {' or '.join(f'{w:d}' for w in widths)} "
                f"columns, not shape {shape}"
            )

    def wald_test(
        self, r_matrix: Any, use_f: bool = False, scalar: bool = True
    ) -> contrasts.WaldResults:
        """Joint test of R b = q, chi-squared, or F with ``df_resid``.

        Parameters
        ----------
        r_matrix
            as in ``t_test``; arrays may have k_fe columns, or one for every entry of ``params``
        """
        self._check_width(r_matrix, tuple(dict.fromkeys((self.k_fe, len(self._all_names)))))
        R, q = contrasts.constraint(r_matrix, self._all_names, fixed=self.k_fe)
        names, values, cov = self._all_names, np.append(self._estimates.beta, self._pairs), None
        if not R[:, self.k_fe :].any():  # of the fixed effects alone, given the variances
            R, names, values = R[:, : self.k_fe], self._fixed_names, self._estimates.beta
            cov = self._estimates.cov_beta
        return contrasts.wald_test(
            values,
            self._cov_ratio if cov is None else cov,
            R,
            q,
            use_f=use_f,
            df_denom=self.df_resid,
            scalar=scalar,
            names=names,
        )

    def f_test(self, r_matrix: Any) -> contrasts.WaldResults:
        """``wald_test`` with the F distribution."""
        return self.wald_test(r_matrix, use_f=True)

    def _fixed_terms(self) -> dict[str, list[int]]:
        """Positions of the columns of each fixed term."""
        found: dict[str, list[int]] = {}
        owners = self._prepared.design.fixed_terms
        for position, j in enumerate(self._prepared.problem.fixed.kept):
            found.setdefault(owners[j], []).append(position)
        return found

    def wald_test_terms(self, skip_single: bool = False) -> contrasts.WaldTermsResults:
        """Joint test of the columns of each fixed term.

        Parameters
        ----------
        skip_single
            leave out terms of one column
        """
        terms = {
            name: columns
            for name, columns in self._fixed_terms().items()
            if not (skip_single and len(columns) == 1)
        }
        return contrasts.wald_terms(self._estimates.beta, self._estimates.cov_beta, terms)

    def t_test_pairwise(
        self, term_name: str, method: str = "hs", alpha: float = 0.05, factor_labels: Any = None
    ) -> contrasts.PairwiseResults:
        """Tests of all differences between the levels of a categorical fixed term.

        Parameters
        ----------
        term_name
            the term as written, ``"f"`` or ``"C(f)"``
        method
            adjustment of p-values: "hs", "holm", "bonferroni", "sidak", "fdr_bh"

        Raises
        ------
        ValueError
            the term is not one categorical factor of the fixed part
        """
        rows, labels = prediction.level_rows(self._prepared, term_name)
        return contrasts.pairwise(
            self._estimates.beta,
            self._estimates.cov_beta,
            rows,
            labels if factor_labels is None else factor_labels,
            term=term_name,
            method=method,
            alpha=alpha,
        )

    def profile_re(
        self,
        re_ix: Any,
        vtype: str,
        num_low: int = 5,
        dist_low: float = 1.0,
        num_high: int = 5,
        dist_high: float = 1.0,
        **fit_kwargs: Any,
    ) -> NDArray[np.float64]:
        """Log-likelihood maximised over everything but one parameter, on a grid of its values.

        Parameters
        ----------
        re_ix
            position of a variance of the bars (``vtype="re"``), name of a variance component
            ("vc"), name of a fixed effect ("fe")
        vtype
            "re", "vc" or "fe"
        num_low, dist_low, num_high, dist_high
            numbers of points below and above the estimate, and how far they reach, user units
        **fit_kwargs
            statsmodels' arguments for its fits; not needed here

        Returns
        -------
        (num_low + 1 + num_high, 2): value in user units, log-likelihood

        Raises
        ------
        ValueError
            an unknown vtype or parameter, or a variance below zero

        Warns
        -----
        ConvergenceWarning
            at some values the maximum over the rest was not reached
        """
        del fit_kwargs
        if not (0 <= dist_low < np.inf and 0 <= dist_high < np.inf):
            raise DataError(
                f"dist_low={dist_low}, dist_high={dist_high}: distances are not negative"
            )
        if num_low < 0 or num_high < 0:
            raise DataError(f"num_low={num_low}, num_high={num_high}: numbers of points, 0 or more")
        if vtype == "fe":
            value, profile = self._fixed_profile(re_ix)
        elif vtype in ("re", "vc"):
            value, profile = self._variance_profile(re_ix, vtype)
            if value - dist_low < 0:
                raise ValueError(
                    f"dist_low={dist_low:g} is too large: the profile would begin at the negative "
                    f"variance {value - dist_low:.4g}"
                )
        else:
            raise ValueError(f"vtype={vtype!r}: must be 're', 'vc' or 'fe'")
        left = np.linspace(value - dist_low, value, num_low + 1)
        right = np.linspace(value, value + dist_high, num_high + 1)[1:]
        grid = np.concatenate([left, right])
        points = [profile(v) for v in grid]
        short = [f"{v:.6g}" for v, point in zip(grid, points, strict=True) if not point.reached]
        if short:
            warnings.warn(
                f"the profile of {re_ix!r} is too low at {', '.join(short)}: the other parameters' "
                "optimum was not reached there; take a grid closer to the estimate",
                ConvergenceWarning,
                stacklevel=2,
            )
        return np.array([[v, point.llf] for v, point in zip(grid, points, strict=True)])

    def _fixed_profile(self, name: Any) -> tuple[float, Any]:
        names = self._fixed_names
        if name not in names:
            raise ValueError(f"no fixed effect is called {name!r}: they are {', '.join(names)}")
        j = names.index(name)
        prepared, found = self._prepared, self._estimates
        return float(found.beta[j]), lambda v: profile_fixed(prepared, found, j, float(v))

    def _variance_profile(self, re_ix: Any, vtype: str) -> tuple[float, Any]:
        labels = [bar.label for bar in self._prepared.bars if bar.component is not None]
        if vtype == "re" and not (isinstance(re_ix, int | np.integer) and 0 <= re_ix < self.k_re):
            raise ValueError(f"re_ix={re_ix!r}: must be a number, 0..{self.k_re - 1}")
        if vtype == "vc" and re_ix not in labels:
            raise ValueError(f"no variance component is called {re_ix!r}: they are {labels}")
        at = int(re_ix) if vtype == "re" else self.k_re + labels.index(re_ix)
        prepared, found = self._prepared, self._estimates
        value = float(found.variances.Psi[at, at] * found.sigma2)
        return value, lambda v: profile_variance(prepared, found, at, float(v))
