"""Parameters held, penalties, shrinkage and profiles, against dense algebra; packed parameters."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pandas as pd
import pytest
from oracle import (
    Bar,
    Component,
    covariance,
    deviance,
    difference,
    evaluate,
    joint_criterion,
    second_difference,
)
from scipy.optimize import minimize

import dmixed
from dmixed import DataError, MixedLMParams

GROUPS, SIZE = 16, 6
both = pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])


@functools.cache
def table():
    """Groups g with levels h inside; slopes of x and z vary over g."""
    rng = np.random.default_rng(9)
    n = GROUPS * SIZE
    g, h = np.arange(n) // SIZE, np.arange(n) // 2 % 3
    x, z = rng.normal(0.5, 1, n), rng.normal(0, 1, n)
    b = rng.standard_normal((GROUPS, 3)) @ np.array([[1, 0.2, 0.1], [0, 0.8, 0.1], [0, 0, 1.6]])
    y = 1 + 2 * x - z + b[g, 0] + b[g, 1] * x + b[g, 2] * z
    y += 0.9 * rng.standard_normal(3 * GROUPS)[3 * g + h] + 0.6 * rng.standard_normal(n)
    return pd.DataFrame({"y": y, "x": x, "z": z, "g": g, "h": h})


RE = {0: None, 1: "~1", 2: "~x", 3: "~x + z"}


@functools.cache
def model(k_re, vc=False, use_sqrt=True):
    parts = {"v": "0 + C(h)"} if vc else None
    return dmixed.MixedLM.from_formula(
        "y ~ x + z", table(), RE[k_re], parts, groups="g", use_sqrt=use_sqrt
    )


@functools.cache
def design():
    d = table()
    V = (d.g.to_numpy()[:, None] * 3 + d.h.to_numpy()[:, None]) == np.arange(3 * GROUPS)
    return d.y.to_numpy(), np.column_stack([np.ones(len(d)), d.x, d.z]), V.astype(float)


def terms(cov_re, vcomp):
    """The oracle's terms at covariances, relative or not."""
    _, X, V = design()
    found = [Bar(X[:, : len(cov_re)], table().g.to_numpy(), cov_re)] if len(cov_re) else []
    return found + [Component(V, v) for v in vcomp]


def dense(params, reml, beta=None):
    y, X, _ = design()
    H = covariance(terms(params.cov_re, params.vcomp), len(y))
    return deviance(y, X, H, reml, beta)


def params(fe, cov, vcomp=()):
    return MixedLMParams.from_components(
        np.array(fe, float), np.array(cov, float).reshape(len(cov), len(cov)), vcomp=vcomp
    )


def entries(cov, vcomp):
    return np.concatenate([cov[np.tril_indices(len(cov))], vcomp])


def from_entries(v, k_re):
    return MixedLMParams.from_packed(v, 0, k_re, False, False)


def assert_same_fit(a, b, tol=1e-6):
    assert a.llf == pytest.approx(b.llf, abs=1e-9 * abs(b.llf))
    se = np.nan_to_num(np.asarray(b.bse_fe), nan=0.0)  # held
    assert np.allclose(a.fe_params, b.fe_params, rtol=0, atol=tol * se)
    assert a.scale == pytest.approx(b.scale, rel=tol)
    size = np.sqrt(np.diag(b.cov_re))
    assert np.all(np.abs(np.subtract(a.cov_re, b.cov_re)) <= tol * np.outer(size, size))
    assert np.allclose(a.vcomp, b.vcomp, rtol=tol, atol=0)


# Masks


FULL = [[1.5, 0.3], [0.3, 0.9]]
MASKS = {
    # number of coefficients, component, free, start
    "nothing held": (2, True, params([1, 1, 1], np.ones((2, 2)), [1]), None),
    "covariances at zero": (2, True, params([1, 1, 1], np.eye(2), [1]), None),
    "covariance held": (2, True, params([1, 1, 1], np.eye(2), [1]), params([], FULL, [0.8])),
    "variance held": (
        2, True, params([1, 1, 1], [[0, 1], [1, 1]], [1]), params([], FULL, [0.8])
    ),
    "second variance held": (
        2, True, params([1, 1, 1], [[1, 1], [1, 0]], [1]), params([], FULL, [0.8])
    ),
    "covariance matrix held": (
        2, True, params([1, 1, 1], np.zeros((2, 2)), [1]), params([], FULL, [0.8])
    ),
    "component held": (2, True, params([1, 1, 1], np.ones((2, 2)), [0]), params([], FULL, [0.4])),
    "component alone": (0, True, params([1, 1, 1], [], [1]), None),
    "component alone, effect held": (
        0, True, params([1, 1, 0], [], [1]), params([0, 0, -0.5], [], [1])
    ),
    "only variance held": (1, False, params([1, 1, 1], [[0]]), params([], [[2.0]])),
    "pieces of three": (
        3, False, params([1, 1, 1], [[1, 1, 0], [1, 1, 0], [0, 0, 1.6]]), None
    ),
    "chain of three": (
        3, False, params([1, 1, 1], [[1, 1, 0], [1, 1, 1], [0, 1, 1]]), None
    ),
    "corner of three held": (
        3, False, params([1, 1, 1], [[0, 0, 1], [0, 0, 1], [1, 1, 1]]),
        params([], [[2.0, 0.3, 0.1], [0.3, 1.0, 0.1], [0.1, 0.1, 1.0]]),
    ),
    "effect held": (
        2, True, params([1, 0, 1], np.ones((2, 2)), [1]), params([1, 1.7, -1], FULL, [0.8])
    ),
    "effects held at zero": (2, False, params([0, 1, 0], np.ones((2, 2))), None),
    "all effects held": (
        1, True, params([0, 0, 0], [[1]], [1]), params([1.2, 1.9, -0.8], [[1.0]], [1.0])
    ),
    "effect and entry held": (
        2, False, params([1, 1, 0], [[1, 1], [1, 0]]), params([1, 2, -0.6], FULL)
    ),
}  # fmt: skip


@functools.cache
def constrained(name, reml):
    k_re, vc, free, start = MASKS[name]
    return model(k_re, vc).fit(start, reml=reml, free=free)


@both
@pytest.mark.parametrize("name", MASKS)
def test_held_parameters_stay_and_the_rest_is_an_optimum(name, reml):
    """The oracle's criterion, held entries fixed, has a minimum at the estimates."""
    k_re, _, free, start = MASKS[name]
    result = constrained(name, reml)
    assert result.converged
    found = result.params_object
    held_beta = free.fe_params == 0
    beta = np.zeros(3) if start is None or not len(start.fe_params) else start.fe_params
    assert np.array_equal(found.fe_params[held_beta], beta[held_beta])
    moves = entries(free.cov_re, free.vcomp) != 0
    at = entries(found.cov_re, found.vcomp)
    where = entries(start.cov_re, start.vcomp) if start else entries(np.eye(k_re), free.vcomp)
    assert np.allclose(at[~moves], where[~moves], rtol=1e-12, atol=1e-13)

    def criterion(v: np.ndarray) -> float:
        own = at.copy()
        own[moves] = v[: moves.sum()]
        full = found.fe_params.copy()
        full[~held_beta] = v[moves.sum() :]
        return dense(from_entries(own, k_re), reml, full)

    v = np.append(at[moves], found.fe_params[~held_beta])
    size = np.append(np.full(moves.sum(), 0.1), np.full(len(v) - moves.sum(), 0.3))
    assert criterion(v) == pytest.approx(-2 * result.llf, abs=1e-9)
    gradient = difference(criterion, v, size)
    hessian = second_difference(criterion, v, size)
    assert np.linalg.eigvalsh(hessian)[0] > 0
    assert gradient @ np.linalg.solve(hessian, gradient) <= 1e-9
    # relative parameters and effects: the inverse of half the Hessian, the scale profiled out
    bse, names = np.asarray(result.bse), np.append(held_beta, ~moves)
    assert np.isnan(bse[names]).all()
    joint = np.sqrt(np.diag(np.linalg.inv(hessian / 2)))[: moves.sum()]
    assert np.allclose(bse[3:][moves], joint, rtol=2e-5, atol=0)


METHODS = [
    "bfgs", "lbfgs", "cg", "ncg", "newton", "basinhopping", ["lbfgs", None], "nm", "powell",
    ["powell", "bfgs"],
]  # fmt: skip
MANY = 3
"""The last of them take hundreds of evaluations, more with effects as coordinates."""


@pytest.mark.parametrize(
    ("name", "reml", "method"),
    [
        (name, reml, method)
        for name, reml, methods in (
            ("nothing held", True, METHODS[:-MANY]),
            ("covariances at zero", False, METHODS),
            ("covariance held", True, METHODS),
            ("variance held", False, METHODS),
            ("component held", True, METHODS),
            ("effect held", True, METHODS[:-MANY]),
            ("effects held at zero", False, METHODS),
        )
        for method in methods
    ],
    ids=str,
)
def test_every_method_finds_the_same_optimum(name, reml, method):
    k_re, vc, free, start = MASKS[name]
    settings = {"tol": 1e-13} if method == "basinhopping" else {}  # scipy's own stops early
    result = model(k_re, vc).fit(start, reml=reml, free=free, method=method, **settings)
    assert result.converged
    assert_same_fit(result, constrained(name, reml), 1e-5)


def test_of_several_methods_the_first_that_converges():
    k_re, vc, free, start = MASKS["covariance held"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model(k_re, vc).fit(start, free=free, method=["cg", "bfgs"], maxiter=1_000)
        assert found.optimizer_summary.method == "CG"
        second = model(k_re, vc).fit(start, free=free, method=["cg", "newton"], maxiter=1)
    assert second.converged
    assert_same_fit(second, found, 1e-5)
    with pytest.warns(dmixed.ConvergenceWarning):
        last = model(k_re, vc).fit(start, free=free, method=["cg", "bfgs"], maxiter=1)
    assert not last.converged


@pytest.mark.parametrize("method", ["lbfgs", "bfgs", "cg", "ncg", "tnc"])
@pytest.mark.parametrize("name", ["covariance held", "variance held", "chain of three"])
def test_steps_that_leave_the_covariances_are_taken_back(name, method):
    """From starts that are far off, line searches meet matrices that are no covariances."""
    k_re, vc, free, _ = MASKS[name]
    base = constrained(name, True)
    far = params([], [[4.0, 0.3], [0.3, 0.1]], [0.05]) if k_re == 2 else params([], 5.0 * np.eye(3))
    if name == "variance held":
        far = params([], [[1.5, 0.3], [0.3, 0.062]], [5.0])
    own = {"tol": 1e-13} if method == "tnc" else {}
    found = model(k_re, vc).fit(far, free=free, method=method, **own)
    assert_same_fit(found, base, 1e-4)


@both
def test_an_optimum_with_a_correlation_of_one(reml):
    """A variance held far below its estimate: the best covariance is singular."""
    free, start = params([1, 1, 1], [[0, 1], [1, 1]], [1]), params([], np.diag([0.01, 0.5]), [0.2])

    def f(v: np.ndarray) -> float:
        L = np.array([[0.1, 0.0], [v[0], v[1]]])
        return dense(params([], L @ L.T, [v[2] ** 2]), reml)

    result = model(2, True).fit(start, reml=reml, free=free)
    assert -2 * result.llf == pytest.approx(best(f, [0.5, 0.1, 0.8]), abs=1e-6)
    assert result.converged


@both
def test_what_is_held_at_zero_is_not_in_the_model(reml):
    start, free = params([], np.diag([1.0, 0.0])), params([1, 1, 1], np.diag([1, 0]))
    result, other = model(2).fit(start, reml=reml, free=free), model(1).fit(reml=reml)
    assert result.llf == pytest.approx(other.llf, rel=1e-11)
    assert np.allclose(result.fe_params, other.fe_params, rtol=0, atol=1e-8)
    assert result.cov_re.iloc[0, 0] == pytest.approx(other.cov_re.iloc[0, 0], rel=1e-7)
    assert np.isnan(result.bse_re.iloc[1:]).all()
    assert result.bse_re.iloc[0] == pytest.approx(other.bse_re.iloc[0], rel=1e-6)
    assert np.array_equal(result.ranef().iloc[:, 1], np.zeros(GROUPS))
    assert np.allclose(result.ranef().iloc[:, 0], other.ranef().iloc[:, 0], rtol=0, atol=1e-7)
    assert not result.singular
    assert result.aic == pytest.approx(other.aic, nan_ok=True)


@both
def test_independent_coefficients_are_bars_of_their_own(reml):
    result = constrained("covariances at zero", reml)
    bars = "(1 | g) + (0 + x | g)"
    both_ = dmixed.lmer(f"y ~ x + z + {bars} + (1 | g:h)", table(), reml=reml)
    varcorr = both_.varcorr()
    assert result.llf == pytest.approx(both_.llf, rel=1e-11)
    assert np.allclose(result.fe_params, both_.fe_params, rtol=0, atol=1e-8)
    assert np.allclose(result.bse_fe, both_.bse_fe, rtol=1e-7)
    want = [varcorr[k].iloc[0, 0] for k in ("g", "g.1", "g:h")]
    got = [result.cov_re.iloc[0, 0], result.cov_re.iloc[1, 1], result.vcomp[0]]
    assert np.allclose(got, want, rtol=1e-7)
    assert result.cov_re.iloc[0, 1] == 0.0
    assert np.isnan(result.bse_re["g x x Cov"])
    order = [0, 2, 3]  # of the bars: g:h has more levels and comes first
    assert np.allclose(
        np.asarray(result.bse_re)[order], np.asarray(both_.bse_re)[[1, 2, 0]], rtol=1e-6
    )
    assert np.allclose(result.fittedvalues, both_.fittedvalues, rtol=0, atol=1e-7)
    assert result.aic == pytest.approx(both_.aic, nan_ok=True)
    assert result.bic == pytest.approx(both_.bic, nan_ok=True)


@pytest.mark.parametrize("vc", [False, True])
def test_a_held_effect_is_an_offset(vc):
    """Under ML: all estimates and their standard errors."""
    value = 1.7
    free = params([1, 0, 1], np.ones((2, 2)), [1] * vc)
    start = params([0, value, 0], np.eye(2), [1.0] * vc)
    result = model(2, vc).fit(start, reml=False, free=free)
    parts = {"v": "0 + C(h)"} if vc else None
    other = dmixed.MixedLM.from_formula(
        "y ~ z", table(), "~x", parts, groups="g", offset=value * table().x
    ).fit(reml=False)
    keep = ["Intercept", "z"]
    assert result.llf == pytest.approx(other.llf, rel=1e-11)
    assert result.fe_params["x"] == value
    assert np.isnan(result.bse_fe["x"])
    assert np.allclose(result.fe_params[keep], other.fe_params, rtol=0, atol=1e-6 * other.bse_fe)
    assert np.allclose(result.bse_fe[keep], other.bse_fe, rtol=1e-6)
    assert np.allclose(result.cov_re, other.cov_re, rtol=1e-5)
    assert result.scale == pytest.approx(other.scale, rel=1e-6)
    assert np.allclose(result.bse_re, other.bse_re, rtol=1e-5)
    assert result.bse_scale == pytest.approx(other.bse_scale, rel=1e-5)
    assert np.allclose(result.fittedvalues, other.fittedvalues, rtol=0, atol=1e-6)
    assert result.aic == pytest.approx(other.aic, rel=1e-10)


def test_start_params_in_every_form():
    start = params([1, 2, -1], FULL, [0.4])
    free = params([1, 1, 1], np.ones((2, 2)), [0])
    base = model(2, True).fit(start, free=free)
    assert base.params_object.vcomp == pytest.approx([0.4], rel=1e-12)
    for use_sqrt in (True, False):
        own = model(2, True, use_sqrt)
        for has_fe in (True, False):
            packed = start.get_packed(use_sqrt, has_fe)
            assert_same_fit(own.fit(packed, free=free), base)
            found = own.fit(packed, do_cg=False)
            assert found.llf == pytest.approx(own.loglike(start), rel=1e-12)
    assert_same_fit(model(2, True).fit(start), model(2, True).fit())
    for wrong in (np.ones(3), params([1, 1], FULL, [1]), params([], [[1.0]], [1])):
        with pytest.raises(DataError, match="invalid start_params"):
            model(2, True).fit(wrong)
    with pytest.raises(DataError, match="not positive semi-definite"):
        model(2, True).fit(params([], [[1, 2], [2, 1]], [1]), free=free)
    with pytest.raises(DataError, match="2 random effects and 1 variance components"):
        model(2).fit(free=free)
    with pytest.raises(ValueError, match="method='nonsense' is not known"):
        model(2).fit(method="nonsense")


@both
@pytest.mark.parametrize("vc", [False, True])
def test_without_a_search(reml, vc):
    """``do_cg=False``: generalised least squares at the start."""
    y, X, _ = design()
    start = params([], FULL, [0.7] * vc)
    result = model(2, vc).fit(start, reml=reml, do_cg=False)
    want = evaluate(y, X, terms(start.cov_re, start.vcomp), reml)
    assert -2 * result.llf == pytest.approx(want.criterion, abs=1e-9)
    assert np.allclose(result.fe_params, want.beta, rtol=0, atol=1e-9)
    assert np.allclose(result.bse_fe, want.se, rtol=1e-9)
    assert np.allclose(result.cov_re_unscaled, FULL, rtol=1e-12)
    assert result.scale == pytest.approx(want.sigma2, rel=1e-10)
    assert np.isnan(result.bse_re).all()
    assert np.allclose(result.fittedvalues, want.fitted, rtol=0, atol=1e-8)


# Penalties


class Ridge:
    """``sum(weights * b^2)``."""

    def __init__(self, *weights):
        self.weights = np.array(weights, float)

    def func(self, b):
        return float(np.sum(self.weights * b**2))

    def deriv(self, b):
        return 2 * self.weights * b


class LogDet:
    """``-c log det Psi``: keeps a covariance away from singular ones."""

    def __init__(self, c):
        self.c = c

    def func(self, mat, mat_inv):
        return -self.c * np.linalg.slogdet(mat)[1]

    def deriv(self, mat, mat_inv):
        slope = 2 * mat_inv - np.diag(np.diag(mat_inv))  # an entry off the diagonal counts twice
        return -self.c * slope[np.tril_indices(len(mat))]


def assert_stationary(criterion, result, k_re):
    """The criterion of effects and entries of the covariance has its minimum at a fit."""
    found = result.params_object
    at = entries(found.cov_re, found.vcomp)
    v = np.append(at, found.fe_params)

    def f(v: np.ndarray) -> float:
        return criterion(v[len(at) :], from_entries(v[: len(at)], k_re))

    size = np.append(np.full(len(at), 0.1), np.full(3, 0.3))
    gradient, hessian = difference(f, v, size), second_difference(f, v, size)
    assert np.linalg.eigvalsh(hessian)[0] > 0
    assert gradient @ np.linalg.solve(hessian, gradient) <= 1e-9
    return hessian


@both
@pytest.mark.parametrize("vc", [False, True])
def test_a_ridge_is_least_squares_of_augmented_data(reml, vc):
    pen = Ridge(0.0, 3.0, 10.0)
    result = model(2, vc).fit(reml=reml, fe_pen=pen)
    assert result.converged
    y, X, _ = design()
    found = result.params_object
    root = np.linalg.cholesky(covariance(terms(found.cov_re, found.vcomp), len(y)) * result.scale)
    more = np.diag(np.sqrt(2 * pen.weights))
    Xa = np.vstack([np.linalg.solve(root, X), more])
    ya = np.append(np.linalg.solve(root, y), np.zeros(3))
    beta = np.linalg.lstsq(Xa, ya)[0]
    assert np.allclose(result.fe_params, beta, rtol=0, atol=1e-6 * np.asarray(result.bse_fe))
    r = np.linalg.solve(root, y - X @ np.asarray(result.fe_params))
    assert float(r @ r) == pytest.approx(len(y) - 3 if reml else len(y), rel=1e-9)
    hessian = assert_stationary(lambda b, own: dense(own, reml, b) + 2 * pen.func(b), result, 2)
    want = np.sqrt(np.diag(np.linalg.inv(hessian / 2)))
    assert np.allclose(result.bse, np.append(want[-3:], want[:-3]), rtol=2e-5)
    assert -2 * result.llf == pytest.approx(dense(found, reml, beta), abs=1e-6)  # no penalty in it


def test_a_penalty_object_of_fit_regularized():
    class WithAlpha(Ridge):
        alpha = 0.0

        def func(self, b):
            return self.alpha * super().func(b)

        def deriv(self, b):
            return self.alpha * super().deriv(b)

    a = model(2).fit_regularized(method=WithAlpha(0, 1, 1), alpha=4.0)
    b = model(2).fit(fe_pen=Ridge(0, 4, 4))
    assert_same_fit(a, b)


def test_penalties_of_statsmodels():
    penalties = pytest.importorskip("statsmodels.base._penalties")
    a = model(2).fit(fe_pen=penalties.L2(weights=np.array([0.0, 2.0, 2.0])))
    assert_same_fit(a, model(2).fit(fe_pen=Ridge(0, 2, 2)))
    b = model(2).fit(cov_pen=penalties.PSD(0.7))
    assert_same_fit(b, model(2).fit(cov_pen=LogDet(0.7)))


@both
@pytest.mark.parametrize(("k_re", "vc"), [(1, False), (2, False), (2, True)])
def test_a_penalty_of_the_covariance(reml, k_re, vc):
    pen = LogDet(0.8)
    result = model(k_re, vc).fit(reml=reml, cov_pen=pen)
    assert result.converged

    def criterion(b: np.ndarray, own: MixedLMParams) -> float:
        mat = own.cov_re
        return dense(own, reml, b) + 2 * pen.func(mat, np.linalg.inv(mat))

    assert_stationary(criterion, result, k_re)
    found = result.params_object
    assert -2 * result.llf == pytest.approx(dense(found, reml), abs=1e-9)
    both_ = model(k_re, vc).fit(reml=reml, cov_pen=pen, fe_pen=Ridge(0, 1, 1))
    assert_stationary(lambda b, own: criterion(b, own) + 2 * Ridge(0, 1, 1).func(b), both_, k_re)


def test_a_penalised_fit_with_parameters_held():
    pen, free = Ridge(0, 3, 3), params([1, 1, 1], np.eye(2))
    result = model(2).fit(reml=False, fe_pen=pen, free=free)
    found = result.params_object
    assert found.cov_re[0, 1] == 0.0

    def f(v: np.ndarray) -> float:
        return dense(params([], np.diag(v[:2])), False, v[2:]) + 2 * pen.func(v[2:])

    v = np.append(np.diag(found.cov_re), found.fe_params)
    gradient, hessian = difference(f, v, 0.2), second_difference(f, v, 0.2)
    assert gradient @ np.linalg.solve(hessian, gradient) <= 1e-9
    held = model(2).fit(
        params([0, 2, 0], np.eye(2)), fe_pen=Ridge(1, 1, 1), free=params([1, 0, 1], np.ones((2, 2)))
    )
    assert held.fe_params["x"] == 2.0


# Shrinkage


@both
@pytest.mark.parametrize(
    ("method", "alpha", "l1_ratio", "zeros"),
    [("l1", 4.0, 1.0, 0), ("l1", [0.0, 60.0, 20.0], 1.0, 1), ("l1", 1e6, 1.0, 3),
     ("elastic_net", 10.0, 0.5, 0), ("elastic_net", [5.0, 40.0, 400.0], 0.6, 1),
     ("elastic_net", 1e3, 0.0, 0), ("l1", 0.0, 1.0, 0)],
)  # fmt: skip
def test_shrinkage_meets_its_optimality_conditions(method, alpha, l1_ratio, zeros, reml):
    """For each effect, ``2 x'V^-1 (y - X b) = alpha (r sign(b) + (1 - r) b)``, or is not more."""
    y, X, _ = design()
    free = model(2, True).fit(reml=reml)
    result = model(2, True).fit_regularized(
        method=method, alpha=alpha, l1_ratio=l1_ratio, ptol=1e-12, maxit=20_000, reml=reml
    )
    b, weights = np.asarray(result.fe_params), np.broadcast_to(np.asarray(alpha, float), 3)
    H = covariance(terms(np.asarray(free.cov_re_unscaled), free.vcomp / free.scale), len(y))
    slope = 2 * X.T @ np.linalg.solve(H * free.scale, y - X @ b)
    size = np.sqrt(np.diag(X.T @ np.linalg.solve(H * free.scale, X)))
    pull = weights * (l1_ratio * np.sign(b) + (1 - l1_ratio) * b)
    active = b != 0
    assert np.all(np.abs(slope - pull)[active] <= 1e-6 * size[active])
    assert np.all(np.abs(slope[~active]) <= (weights * l1_ratio)[~active] + 1e-6)
    assert np.count_nonzero(~active) == zeros
    # the active columns alone, at the same V up to its scale
    df = len(y) - 3 if reml else len(y)
    r = y - X @ b
    scale = float(r @ np.linalg.solve(H, r)) / df
    assert result.scale == pytest.approx(scale, rel=1e-9)
    Xa = X[:, active]
    cov = scale * np.linalg.inv(Xa.T @ np.linalg.solve(H, Xa)) if active.any() else np.zeros((0, 0))
    assert np.allclose(np.asarray(result.bse_fe)[active], np.sqrt(np.diag(cov)), rtol=1e-8)
    assert np.isnan(np.asarray(result.bse_fe)[~active]).all()
    assert -2 * result.llf == pytest.approx(deviance(y, X, H, reml, b), abs=1e-8)
    assert np.isfinite(result.llf)
    assert np.isnan(result.aic) if reml else np.isfinite(result.aic)
    assert np.allclose(result.predict(), X @ b, rtol=0, atol=1e-9)
    assert np.isfinite(result.fittedvalues).all()
    if np.all(weights == 0):
        assert_same_fit(result, free)


def test_shrinkage_of_nothing_sensible_is_refused():
    for alpha in (-1.0, [1.0, 2.0], [1.0, -1.0, 0.0]):
        with pytest.raises(DataError, match="alpha must be one weight, or 3"):
            model(1).fit_regularized(alpha=alpha)
    with pytest.raises(DataError, match="l1_ratio"):
        model(1).fit_regularized(method="elastic_net", alpha=1.0, l1_ratio=1.5)
    with pytest.raises(DataError, match="maxit=1"):
        model(1).fit_regularized(alpha=10.0, ptol=1e-14, maxit=1)
    with pytest.raises(ValueError, match="must be 'l1', 'elastic_net'"):
        model(1).fit_regularized(method="l2", alpha=1.0)


# Profiles


def best(f, x0):
    """Minimum of f by brute force."""
    found = minimize(f, x0, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    return minimize(f, found.x, method="BFGS", options={"gtol": 1e-7}).fun


def user_units(k_re, at, value):
    """Entries of Phi with one variance held, from the others of a root and log variances."""

    def made(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        order = [at, *(c for c in range(k_re) if c != at)] if at < k_re else list(range(k_re))
        L, i = np.zeros((k_re, k_re)), 0
        for a in range(k_re):
            for b in range(a + 1):
                if a == b == 0 and at < k_re:
                    L[0, 0] = np.sqrt(value)
                else:
                    L[a, b], i = v[i], i + 1
        Phi = np.zeros((k_re, k_re))
        Phi[np.ix_(order, order)] = L @ L.T
        vcomp = np.array([value]) if at >= k_re else np.exp(v[i:-1])
        return Phi, vcomp, float(np.exp(v[-1]))

    return made


@both
@pytest.mark.parametrize(
    ("k_re", "vc", "which"),
    [(1, False, 0), (1, True, 0), (2, False, 0), (2, True, 1), (2, True, "v"), (0, True, "v")],
)
def test_profiles_of_variances(k_re, vc, which, reml):
    """Everything else maximised, in the units of the data, the scale too."""
    y, X, _ = design()
    result = model(k_re, vc).fit(reml=reml)
    vtype = "vc" if which == "v" else "re"
    at = k_re if which == "v" else which
    user = entries(np.asarray(result.cov_re), result.vcomp)
    value = result.vcomp[0] if which == "v" else np.asarray(result.cov_re)[at, at]
    got = result.profile_re(
        which, vtype, num_low=1, dist_low=0.7 * value, num_high=2, dist_high=3 * value
    )
    assert np.allclose(got[:, 0], value * np.array([0.3, 1.0, 2.5, 4.0]), rtol=1e-9)
    assert got[1, 1] == pytest.approx(result.llf, abs=1e-8)
    for v, llf in got:
        made = user_units(k_re, at, v)

        def f(x: np.ndarray, made=made) -> float:
            Phi, vcomp, scale = made(x)
            return joint_criterion(y, X, terms(Phi, vcomp), scale, reml)

        free = k_re * (k_re + 1) // 2 - (at < k_re) + (vc and at < k_re)
        order = [at, *(c for c in range(k_re) if c != at)] if at < k_re else list(range(k_re))
        L = np.linalg.cholesky(np.asarray(result.cov_re)[np.ix_(order, order)])
        x0 = list(L[np.tril_indices(k_re)])[(at < k_re) :]
        x0 += [np.log(result.vcomp[0])] if vc and at < k_re else []
        assert len(x0) == free
        assert llf == pytest.approx(-0.5 * best(f, np.append(x0, np.log(result.scale))), abs=1e-6)
    assert len(user) == k_re * (k_re + 1) // 2 + vc
    with pytest.raises(ValueError, match="negative variance"):
        result.profile_re(which, vtype, dist_low=2 * value)


@both
@pytest.mark.parametrize(("k_re", "vc"), [(1, False), (2, True)])
def test_profiles_of_fixed_effects(k_re, vc, reml):
    y, X, _ = design()
    result = model(k_re, vc).fit(reml=reml)
    se = result.bse_fe["x"]
    got = result.profile_re("x", "fe", num_low=1, dist_low=2 * se, num_high=1, dist_high=3 * se)
    assert np.allclose(got[:, 0], result.fe_params["x"] + se * np.array([-2, 0, 3]), rtol=1e-9)
    assert got[1, 1] == pytest.approx(result.llf, abs=1e-8)
    for value, llf in got:

        def f(x: np.ndarray, value=value) -> float:
            L = np.zeros((k_re, k_re))
            L[np.tril_indices(k_re)] = x[: len(x) - vc]
            H = covariance(terms(L @ L.T, x[len(x) - vc :] ** 2), len(y))
            b = np.linalg.solve(H, X[:, [0, 2]])
            rest = np.linalg.solve(b.T @ X[:, [0, 2]], b.T @ (y - X[:, 1] * value))
            return deviance(y, X, H, reml, [rest[0], value, rest[1]])

        x0 = result.params_object.get_packed(True)
        assert llf == pytest.approx(-0.5 * best(f, x0), abs=1e-6)


def test_profiles_of_what_is_not_there_are_refused():
    result = model(2, True).fit()
    for which, vtype, words in (
        (2, "re", "must be a number, 0..1"),
        ("g", "re", "must be a number"),
        ("w", "vc", "no variance component is called 'w'"),
        ("w", "fe", "no fixed effect is called 'w'"),
        (0, "nonsense", "vtype='nonsense'"),
    ):
        with pytest.raises(ValueError, match=words):
            result.profile_re(which, vtype)


# Parameters


@pytest.mark.parametrize("k_re", range(4))
@pytest.mark.parametrize("k_vc", range(3))
@pytest.mark.parametrize("has_fe", [True, False])
def test_packing_and_unpacking(k_re, k_vc, has_fe):
    rng = np.random.default_rng(5)
    L = np.tril(rng.standard_normal((k_re, k_re)))
    L *= np.where(np.diag(L) < 0, -1.0, 1.0)  # columns with a positive diagonal
    own = MixedLMParams.from_components(
        rng.standard_normal(2), cov_re_sqrt=L if k_re else None, vcomp=rng.uniform(0.1, 2, k_vc)
    )
    assert (own.k_fe, own.k_re, own.k_vc) == (2, k_re, k_vc)
    assert own.k_re2 == k_re * (k_re + 1) // 2
    assert own.k_tot == 2 + own.k_re2 + k_vc
    assert np.allclose(own.cov_re, L @ L.T, rtol=1e-15)
    plain, root = (own.get_packed(use_sqrt, has_fe) for use_sqrt in (False, True))
    fe = own.fe_params if has_fe else []
    lower = np.tril_indices(k_re)
    assert np.array_equal(plain, np.concatenate([fe, own.cov_re[lower], own.vcomp]))
    assert np.allclose(root, np.concatenate([fe, L[lower], np.sqrt(own.vcomp)]), rtol=1e-10)
    for use_sqrt, packed in ((False, plain), (True, root)):
        back = MixedLMParams.from_packed(packed, 2, k_re, use_sqrt, has_fe)
        assert np.array_equal(back.fe_params, own.fe_params if has_fe else np.zeros(2))
        assert np.allclose(back.cov_re, own.cov_re, rtol=1e-13, atol=1e-15)
        assert np.allclose(back.vcomp, own.vcomp, rtol=1e-15)
        assert np.array_equal(back.cov_re, back.cov_re.T)
    assert own == own.copy()
    assert own != MixedLMParams(2, k_re, k_vc) or not has_fe


def test_a_singular_covariance_packs():
    L = np.array([[2.0, 0, 0], [1.0, 0, 0], [0.5, 0, 0]])
    for factor in (L, L[:, :1] * 0 + np.zeros((3, 3)), np.diag([1.0, 0.0, 3.0])):
        own = MixedLMParams.from_components(None, factor @ factor.T)
        packed = own.get_packed(True)
        back = MixedLMParams.from_packed(packed, 0, 3, True, False)
        assert np.allclose(back.cov_re, own.cov_re, rtol=0, atol=1e-14)


def test_what_is_no_covariance_is_named():
    own = params([1, 2], [[1, 2], [2, 1]], [0.5])
    with pytest.raises(DataError, match=r"cov_re is not positive semi-definite .*eigenvalue -1\)"):
        own.get_packed(True)
    assert np.array_equal(own.get_packed(False), [1, 2, 1, 0.5])
    with pytest.raises(DataError, match="vcomp has a negative variance"):
        params([], [[1.0]], [-0.5]).get_packed(True)
    with pytest.raises(DataError, match="must hold finite numbers"):
        params([], [[np.nan]]).get_packed(True)
    with pytest.raises(DataError, match="not positive semi-definite"):
        model(2).loglike(params([], [[1, 2], [2, 1]]))
    with pytest.raises(DataError, match="not positive semi-definite"):
        model(1, True).loglike(params([], [[1.0]], [-0.5]))
    with pytest.raises(DataError, match="length 2: 3 fixed effects and 1 random effects need"):
        MixedLMParams.from_packed([1, 2], 3, 1, False, True)
    with pytest.raises(DataError, match=r"a vector, not of shape \(2, 2\)"):
        MixedLMParams.from_packed(np.eye(2), 0, 1, False, False)
    with pytest.raises(DataError, match="must be vectors"):
        MixedLMParams.from_components(None, np.ones((2, 3)))


def test_copies_share_nothing():
    fe, cov, vc = np.ones(2), np.eye(2), np.ones(1)
    own = MixedLMParams.from_components(fe, cov, vcomp=vc)
    own.reml = False
    other = own.copy()
    assert other.reml is False
    for array in (fe, cov, vc, own.fe_params, own.cov_re, own.vcomp):
        array += 1
    assert np.array_equal(other.fe_params, np.ones(2))
    assert np.array_equal(other.cov_re, np.eye(2))
    assert np.array_equal(other.vcomp, np.ones(1))
    assert np.array_equal(own.cov_re, np.eye(2) + 1)  # made from the arrays, not of them
    packed = other.get_packed(False, True)
    packed += 1
    assert np.array_equal(other.fe_params, np.ones(2))
    values = np.ones(6)
    read = MixedLMParams.from_packed(values, 2, 2, False, True)
    values += 1
    assert np.array_equal(read.fe_params, np.ones(2))
    assert np.array_equal(read.vcomp, np.ones(1))
    result = model(2, True).fit()
    before = result.params.copy()
    found = result.params_object
    found.cov_re[:] = 0
    found.fe_params[:] = 0
    found.vcomp[:] = 0
    assert result.params_object.cov_re.any()
    assert np.array_equal(result.params, before)


def test_a_penalty_object_is_not_changed():
    class Ridge:
        alpha = 0.0

        def func(self, params):
            return self.alpha * float(np.sum(np.square(params)))

        def deriv(self, params):
            return 2.0 * self.alpha * np.asarray(params)

    penalty = Ridge()
    result = model(1, False).fit_regularized(method=penalty, alpha=3.0)
    assert penalty.alpha == 0.0
    assert result.fe_pen.alpha == 3.0


def test_a_profile_says_where_it_fell_short(monkeypatch):
    result = model(2, False).fit()
    monkeypatch.setattr("dmixed.profiling.STEEP", -1.0)
    with pytest.warns(dmixed.ConvergenceWarning, match="profile of 0 is too low at"):
        result.profile_re(0, "re", num_low=1, dist_low=0.01, num_high=0)
