"""Score test of a covariance: whether the likelihood of all rows contradicts a given Psi.

With P = V^-1 - V^-1 X (X'V^-1 X)^-1 X'V^-1, V = sigma2 H(Psi) and t = log sigma2, the expected
Hessian of -2 loglik is, under REML,

    I_xy = tr(P dV_x P dV_y) = -d2 (log|H| + log|X'H^-1 X|),  I_xt = tr(P dV_x),  I_tt = n - p

(the log-determinants alone have second derivatives, because V is linear in Psi), and under ML the
same without X. t is profiled out: ``I = I_xy - I_xt I_yt / I_tt``. With g the gradient of the
profiled criterion at Psi, the score is -g / 2 and its information I / 2, so that

    statistic = g' I^-1 g / 2

is chi-square (Rao 1948). The expected information is a tensor: the statistic does not depend on
coordinates, and it is there wherever the likelihood is, concave or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import chi2

from dmixed.blocks import Floats
from dmixed.covariance import Blocks, rebase
from dmixed.factors import Factors
from dmixed.likelihood import Criterion, degrees_of_freedom
from dmixed.optimizer import free_coordinates

SINGULAR = 1e-12
"""Relative eigenvalue of the information below which a direction cannot be tested."""


@dataclass(frozen=True, slots=True)
class ScoreTest:
    """Test of a covariance of the random effects.

    Attributes
    ----------
    statistic, df
        chi-square, and its degrees of freedom
    pvalue
        probability of more, if the covariance is right; NaN without degrees of freedom
    """

    statistic: float
    df: int
    pvalue: float


def expected_information(factors: Factors, at: Criterion, reml: bool) -> Floats:
    """Expected Hessian (m, m) of the profiled criterion over ``blocks.pairs``; deviance units."""
    first, second = at.terms.first, at.terms.second
    p = factors.p if reml else 0
    if p:
        inverse = cho_solve(cho_factor(at.FtHiF[:p, :p]), np.eye(p))
        scaled = inverse @ at.terms.dF[:, :p, :p]
        first = first + np.einsum("xii->x", scaled)
        second = (
            second
            + np.einsum("ij,xyji->xy", inverse, at.terms.d2F[:, :, :p, :p])
            - np.einsum("xij,yji->xy", scaled, scaled)
        )
    return -second - np.outer(first, first) / degrees_of_freedom(factors, reml)


def score_test(factors: Factors, at: Criterion, root: Floats, reml: bool) -> ScoreTest:
    """Test of the covariance at which the criterion was evaluated.

    Directions along which a variance is zero are not tested: there a score is no derivative of
    either sign.

    Parameters
    ----------
    at
        with derivatives
    root
        (q, q) of that Psi, natural coordinates
    """
    J = _tangents(factors.blocks, root)
    information = J.T @ expected_information(factors, at, reml) @ J
    gradient = J.T @ at.gradient
    size = np.sqrt(np.maximum(np.diag(information), 0.0))
    size[size == 0.0] = 1.0
    w, U = np.linalg.eigh(information / np.outer(size, size))
    known = w > SINGULAR * max(float(w.max(initial=0.0)), np.finfo(float).tiny)
    along = U[:, known].T @ (gradient / size)
    statistic, df = 0.5 * float((along**2 / w[known]).sum()), int(known.sum())
    return ScoreTest(statistic, df, float(chi2.sf(statistic, df)) if df else float("nan"))


def _tangents(blocks: Blocks, root: Floats) -> Floats:
    """Directions (m, free) in which Psi = root root' can move without change of its rank."""
    V, s = rebase(blocks, root)
    pairs, columns = blocks.pairs, []
    for x in free_coordinates(blocks, s):
        c, d = blocks.theta_pairs[x]
        D = np.outer(V[:, c], V[:, d])
        columns.append([D[a, b] + D[b, a] for a, b in pairs])
    return np.array(columns).reshape(len(columns), len(pairs)).T
