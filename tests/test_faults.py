"""What statsmodels' MixedLM gets wrong, each shown to be wrong there and right here.

Every check is a function of a namespace that holds ``MixedLM``, ``MixedLMParams`` and ``VCSpec``.
It must pass on dmixed, and on statsmodels it must fail with the exception that is named beside
it: an `AssertionError` where the answer is silently wrong. The truth comes from dense algebra, or
from the definition of what was asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from oracle import second_difference
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import norm

import dmixed

Namespace = ModuleType
Check = Callable[[Any], None]
Raised = type[Exception] | tuple[type[Exception], ...]


@dataclass(frozen=True)
class Fault:
    """A check, and how statsmodels fails it."""

    number: str
    check: Check
    raises: Raised

    def __str__(self) -> str:
        return f"{self.number}-{self.check.__name__}"


FAULTS: list[Fault] = []


def fault(number: str, raises: Raised = AssertionError) -> Callable[[Check], Check]:
    """Register a check; ``raises`` is what statsmodels raises in it."""

    def register(check: Check) -> Check:
        FAULTS.append(Fault(number, check, raises))
        return check

    return register


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_right_here(fault):
    fault.check(dmixed)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_wrong_there(fault):
    pytest.importorskip("statsmodels")
    if not version("statsmodels").startswith("0.15."):
        pytest.skip(f"the list is of statsmodels 0.15, here is {version('statsmodels')}")
    if fault.raises is KeyError and pd.__version__ < "3":
        pytest.skip(f"a fault with pandas 3, here is {pd.__version__}")
    from statsmodels.regression import mixed_linear_model as namespace

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        with pytest.raises(fault.raises):
            fault.check(namespace)


def refused(call: Callable[[], Any]) -> str:
    """Message of the ValueError that a call must end in."""
    try:
        found = call()
    except ValueError as error:
        return str(error)
    raise AssertionError(f"accepted: {found}")


# ------------------------------------------------------------------------------------ data, dense


@dataclass(frozen=True)
class Data:
    """Rows in some groups: random intercepts, and a component of one slope per group."""

    y: np.ndarray
    X: np.ndarray
    z: np.ndarray
    groups: np.ndarray

    @property
    def same(self) -> np.ndarray:
        """(n, n): 1 where two rows are of one group."""
        return (self.groups[:, None] == self.groups[None]).astype(float)

    @property
    def frame(self) -> pd.DataFrame:
        """The same as a table: y, x, z, g, and three kinds in h."""
        columns = {"y": self.y, "x": self.X[:, 1], "z": self.z, "g": self.groups}
        return pd.DataFrame(columns).assign(h=np.array(list("abc"))[np.arange(len(self.y)) % 3])

    @property
    def matrices(self) -> list[np.ndarray]:
        """Column z of each group."""
        return [self.z[self.groups == g][:, None] for g in np.unique(self.groups)]


def simulated(n_groups: int = 15, size: int = 5, slope: float = 0.0) -> Data:
    """Groups of a size, intercepts of standard deviation 1.5, slopes of ``slope``, noise of 1."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(n_groups), size)
    n = len(groups)
    X, z = np.column_stack([np.ones(n), rng.normal(size=n)]), rng.normal(size=n)
    effects = rng.normal(size=(2, n_groups))[:, groups]
    y = X @ [1.0, 0.5] + 1.5 * effects[0] + slope * effects[1] * z + rng.normal(size=n)
    return Data(y, X, z, groups)


def dense(data: Data, V: np.ndarray, beta: Any = None, reml: bool = False) -> float:
    """Log-likelihood at Var(y) = V (n, n), at the fixed effects ``beta`` or at their best."""
    X, n, p = data.X, *data.X.shape
    root = np.linalg.cholesky(V)
    Xw, yw = np.linalg.solve(root, X), np.linalg.solve(root, data.y)
    if beta is None:
        beta = np.linalg.lstsq(Xw, yw)[0]
    r = yw - Xw @ beta
    value = 2.0 * np.log(np.diag(root)).sum() + r @ r + (n - reml * p) * np.log(2.0 * np.pi)
    return -0.5 * float(value + reml * np.linalg.slogdet(Xw.T @ Xw)[1])


def variance(data: Data, psi: float, tau: float, s2: float) -> np.ndarray:
    """Var(y) of an intercept of variance psi and a component z of variance tau; noise s2."""
    return data.same * (psi + tau * np.outer(data.z, data.z)) + s2 * np.eye(len(data.y))


def number(value: Any) -> float:
    """The one entry of an array or table."""
    return float(np.squeeze(value))


def masked(ns: Namespace, fe: Any, cov_re: Any, vcomp: Any = ()) -> Any:
    return ns.MixedLMParams.from_components(
        np.array(fe, float), cov_re=np.array(cov_re, float), vcomp=np.array(vcomp, float)
    )


class Ridge:
    """``weight / 2`` times the sum of squares of the fixed effects."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def func(self, params: Any) -> float:
        return 0.5 * self.weight * float(np.sum(params**2))

    def deriv(self, params: Any) -> Any:
        return self.weight * np.asarray(params)


class TraceOfInverse:
    """Trace of the inverse of the covariance of the random effects, one column."""

    def func(self, mat: Any, mat_inv: Any) -> float:
        return float(np.trace(mat_inv))

    def deriv(self, mat: Any, mat_inv: Any) -> Any:
        return -(np.asarray(mat_inv)[np.tril_indices(len(mat))] ** 2)


# --------------------------------------------------------------- F1: zero variance, zero effects


def without_group_variance(seed: int = 0) -> Data:
    """Rows whose group means lie on the regression line, so that the variance is zero."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(15), 6)
    n = len(groups)
    X = np.column_stack([np.ones(n), rng.normal(size=15)[groups], rng.normal(size=n)])
    noise = rng.normal(size=n)
    noise -= np.array([noise[groups == g].mean() for g in groups])
    return Data(X @ [3.0, 1.5, 1.0] + noise, X, X[:, 2], groups)


@fault("F1", (AssertionError, np.linalg.LinAlgError))
def least_squares_where_the_variance_is_zero(ns):
    for seed in range(5):  # whether the search ends at zero or close to it is chance
        data = without_group_variance(seed)
        found = ns.MixedLM(data.y, data.X, data.groups).fit(reml=False, method="lbfgs")
        ols = np.linalg.lstsq(data.X, data.y)[0]
        np.testing.assert_allclose(found.cov_re, 0.0, atol=1e-3)
        np.testing.assert_allclose(found.fe_params, ols, rtol=0.05)


@fault("F1")
def fixed_effects_at_zero_variance(ns):
    data = without_group_variance()
    ols = np.linalg.lstsq(data.X, data.y)[0]
    found, singular = ns.MixedLM(data.y, data.X, data.groups).get_fe_params(
        np.zeros((1, 1)), np.zeros(0)
    )
    assert singular
    np.testing.assert_allclose(found, ols, rtol=1e-8)


# --------------------------------------------------------------- F2: standard errors of variances


@fault("F2")
def standard_error_of_a_variance(ns):
    data = simulated()
    found = ns.MixedLM(data.y, data.X, data.groups).fit(reml=False)
    at = np.array([*found.fe_params, number(found.cov_re), found.scale])

    def joint(x):
        return -dense(data, variance(data, x[2], 0.0, x[3]), x[:2])

    information = second_difference(joint, at)
    se = np.sqrt(np.diag(np.linalg.inv(information)))
    np.testing.assert_allclose(np.asarray(found.bse_re), se[2:3], rtol=1e-3)


@fault("F2")
def standard_error_of_a_variance_balanced(ns):
    # Intercept alone, m rows in each of G groups: s2 and s2 + m psi are mean squares, independent,
    # with G (m - 1) and G degrees of freedom.
    data = simulated()
    groups, size = 15, 5
    found = ns.MixedLM(data.y, np.ones(len(data.y)), data.groups).fit(reml=False)
    s2, psi = found.scale, number(found.cov_re)
    within, between = 2 * s2**2 / (groups * (size - 1)), 2 * (s2 + size * psi) ** 2 / groups
    expected = np.sqrt(within + between) / size
    np.testing.assert_allclose(number(found.bse_re), expected, rtol=1e-3)


@fault("F2")
def standard_error_of_a_variance_in_other_units(ns):
    data = simulated()
    one, ten = (ns.MixedLM(c * data.y, data.X, data.groups).fit(gtol=1e-9) for c in (1.0, 10.0))
    np.testing.assert_allclose(ten.cov_re, 100.0 * np.asarray(one.cov_re), rtol=1e-3)
    np.testing.assert_allclose(ten.bse_re, 100.0 * np.asarray(one.bse_re), rtol=1e-3)


# --------------------------------------------------------------- F3: fits leave state behind


@fault("F3")
def a_result_outlives_the_next_fit(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)
    first = model.fit(reml=True)
    model.fit(reml=False)
    psi, s2 = number(first.cov_re), first.scale
    expected = dense(data, variance(data, psi, 0.0, s2), reml=True)
    assert first.method == "REML"
    np.testing.assert_allclose(first.llf, expected, rtol=1e-7)


@fault("F3")
def a_criterion_does_not_depend_on_the_last_fit(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)
    reml = model.fit(reml=True)
    before = (
        model.loglike(reml.params_object),
        model.get_scale(reml.fe_params, reml.cov_re_unscaled, np.zeros(0)),
    )
    model.fit(reml=False)
    after = (
        model.loglike(reml.params_object),
        model.get_scale(reml.fe_params, reml.cov_re_unscaled, np.zeros(0)),
    )
    np.testing.assert_allclose(after, before, rtol=1e-12)


@fault("F3")
def a_penalty_does_not_stay(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)
    first = model.fit(reml=False)
    model.fit(reml=False, cov_pen=TraceOfInverse())
    psi, s2 = number(first.cov_re), first.scale
    np.testing.assert_allclose(first.llf, dense(data, variance(data, psi, 0.0, s2)), rtol=1e-7)


@fault("F3")
def a_mask_does_not_stay(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)
    start = masked(ns, [1.0, 0.5], [[0.3]])
    before = number(ns.MixedLM(data.y, data.X, data.groups).fit().model.score(start))
    model.fit(free=masked(ns, [1, 1], [[0]]), start_params=start)
    np.testing.assert_allclose(number(model.score(start)), before, rtol=1e-8)


@fault("F3")
def arguments_are_left_as_they_were(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)
    model.fit()
    given = masked(ns, [7.0, 7.0], [[0.3]])
    model.score(given)
    np.testing.assert_array_equal(given.fe_params, [7.0, 7.0])


# --------------------------------------------------------------- F4: free


@fault("F4")
def a_fixed_effect_is_held(ns):
    data = simulated()
    found = ns.MixedLM(data.y, data.X, data.groups).fit(
        reml=False, free=masked(ns, [1, 0], [[1]]), start_params=masked(ns, [0.0, 0.2], [[1.0]])
    )
    assert found.fe_params[1] == 0.2

    def negative(x):
        return -dense(data, variance(data, x[1], 0.0, x[2]), [x[0], 0.2])

    at = np.array([found.fe_params[0], number(found.cov_re), found.scale])
    best = minimize(negative, at, method="Nelder-Mead")
    np.testing.assert_allclose(found.llf, -best.fun, atol=1e-6)
    np.testing.assert_allclose(at, best.x, rtol=1e-3)
    information = second_difference(negative, at)
    se = np.sqrt(np.diag(np.linalg.inv(information)))
    np.testing.assert_allclose(number(found.bse_re), se[1], rtol=1e-4)


def _held_by(method: str) -> Check:
    def check(ns):
        data = simulated()
        Z = np.column_stack([np.ones(len(data.y)), data.z])
        found = ns.MixedLM(data.y, data.X, data.groups, Z).fit(
            method=method,
            free=masked(ns, [1, 1], [[1, 0], [0, 0]]),
            start_params=masked(ns, [1.0, 0.5], [[1.0, 0.0], [0.0, 0.25]]),
        )
        ratio = np.asarray(found.cov_re_unscaled)
        np.testing.assert_allclose(ratio[1], [0.0, 0.25], atol=1e-8)
        assert abs(ratio[0, 0] - 1.0) > 1e-3

    check.__name__ = f"covariances_are_held_by_{method}"
    return check


for _method in ("nm", "powell"):
    fault("F4")(_held_by(_method))


# --------------------------------------------------------------- F5: penalties on fixed effects


@fault("F5")
def a_penalty_shrinks_the_fixed_effects(ns):
    data = simulated()
    penalty = Ridge(100.0)
    found = ns.MixedLM(data.y, data.X, data.groups).fit(reml=False, fe_pen=penalty)

    def negative(x):
        return -dense(data, variance(data, x[2], 0.0, x[3]), x[:2]) + penalty.func(x[:2])

    best = minimize(negative, [0.0, 0.0, 1.0, 1.0], method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(found.fe_params, best.x[:2], atol=1e-4)
    np.testing.assert_allclose(number(found.cov_re), best.x[2], rtol=1e-3)
    information = second_difference(negative, [*found.fe_params, *best.x[2:]])
    se = np.sqrt(np.diag(np.linalg.inv(information)))
    np.testing.assert_allclose(found.bse_fe, se[:2], rtol=1e-3)
    np.testing.assert_allclose(number(found.bse_re), se[2], rtol=1e-3)


# --------------------------------------------------------------- F6: fit_regularized


@fault("F6", KeyError)
def regularized_with_a_formula(ns):
    data = simulated()
    model = ns.MixedLM.from_formula("y ~ x", data.frame, groups="g")
    found = model.fit_regularized(alpha=5.0)
    assert list(found.fe_params.index) == ["Intercept", "x"]


@fault("F6")
def regularized_standard_errors(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)
    plain, found = model.fit(), model.fit_regularized(alpha=0.0)
    np.testing.assert_allclose(found.fe_params, plain.fe_params, rtol=1e-4)
    np.testing.assert_allclose(found.bse, plain.bse, rtol=1e-3)
    np.testing.assert_allclose(found.bse_re, plain.bse_re, rtol=1e-3)


@fault("F6")
def regularized_likelihood(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)
    ratio, found = number(model.fit().cov_re_unscaled), model.fit_regularized(alpha=20.0)

    def negative(t):
        V = variance(data, ratio * np.exp(t), 0.0, np.exp(t))
        return -dense(data, V, found.fe_params, reml=True)

    np.testing.assert_allclose(found.llf, -minimize_scalar(negative).fun, rtol=1e-6)


@fault("F6")
def regularized_relative_covariance(ns):
    data = simulated()
    found = ns.MixedLM(data.y, data.X, data.groups).fit_regularized(alpha=20.0)
    plain = ns.MixedLM(data.y, data.X, data.groups).fit()
    relative = found.params_object.cov_re
    np.testing.assert_allclose(relative, plain.params_object.cov_re, rtol=1e-3)


@fault("F6", AttributeError)
def regularized_is_a_whole_result(ns):
    data = simulated()
    found = ns.MixedLM(data.y, data.X, data.groups).fit_regularized(alpha=1.0)
    assert found.reml
    assert np.isnan([found.aic, found.bic]).all()
    assert np.isfinite(found.llf)


# --------------------------------------------------------------- F7 to F9: variance components


def with_component(ns, **kwargs):
    frame = simulated(slope=1.0).frame
    return ns.MixedLM.from_formula(
        "y ~ x", frame, groups="g", re_formula="1", vc_formula={"z": "0 + z"}, **kwargs
    )


@fault("F7", ValueError)
def standard_errors_with_a_component(ns):
    data = simulated(slope=1.0)
    found = with_component(ns).fit(reml=False)
    values = [*found.fe_params, number(found.cov_re), found.vcomp[0], found.scale]

    def joint(x):
        return -dense(data, variance(data, *x[2:]), x[:2])

    se = np.sqrt(np.diag(np.linalg.inv(second_difference(joint, values))))
    assert list(found.bse_re.index) == ["g Var", "z Var"]
    np.testing.assert_allclose(found.bse_re, se[2:4], rtol=1e-3)


@fault("F8", TypeError)
def responses_of_components_alone(ns):
    data = simulated(n_groups=200)
    spec = ns.VCSpec(["z"], [[["z"]] * 200], [data.matrices])
    model = ns.MixedLM(data.y, data.X, data.groups, exog_vc=spec)
    distribution = model.get_distribution(np.array([1.0, 0.5, 4.0]), 0.25, None)
    residual = distribution.rvs(0, rng=np.random.RandomState(1)) - data.X @ [1.0, 0.5]
    zz, zr = (np.bincount(data.groups, data.z * v) for v in (data.z, residual))
    # Slopes of the groups have variance 0.25 (4 + 1 / z'z): that of 200 is known to 10 %.
    ratio = np.mean((zr / zz) ** 2 / (0.25 * (4.0 + 1.0 / zz)))
    np.testing.assert_allclose(ratio, 1.0, atol=0.3)


@fault("F9", ValueError)
def fitted_values_of_sparse_components(ns):
    plain, sparse = with_component(ns).fit(), with_component(ns, use_sparse=True).fit()
    np.testing.assert_allclose(sparse.fittedvalues, plain.fittedvalues, rtol=1e-8)


@fault("F9", ValueError)
def covariances_of_sparse_components(ns):
    plain, sparse = with_component(ns).fit(), with_component(ns, use_sparse=True).fit()
    found = sparse.random_effects_cov[3], plain.random_effects_cov[3]
    np.testing.assert_allclose(*found, rtol=1e-8)
    data = simulated(slope=1.0)
    rows = data.groups == 3
    Z = np.column_stack([np.ones(5), data.z[rows]])
    Psi = np.diag([number(plain.cov_re), plain.vcomp[0]])
    V = Z @ Psi @ Z.T + plain.scale * np.eye(5)
    np.testing.assert_allclose(found[0], Psi - Psi @ Z.T @ np.linalg.solve(V, Z @ Psi), rtol=1e-6)


# --------------------------------------------------------------- F10: silent


@fault("F10")
def a_subset_is_taken(ns):
    frame = simulated().frame
    model = ns.MixedLM.from_formula("y ~ x", frame, groups="g", subset=frame["g"] < 8)
    found, alone = model.fit(), ns.MixedLM.from_formula("y ~ x", frame[:40], groups="g").fit()
    assert found.nobs == 40
    np.testing.assert_allclose(found.params, alone.params, rtol=1e-4)


@fault("F10")
def short_groups_are_refused(ns):
    data = simulated()
    message = refused(lambda: ns.MixedLM(data.y, data.X, data.groups[:50]).fit())
    assert "groups" in message


@fault("F10")
def bars_are_refused(ns):
    frame = simulated().frame.assign(x=lambda d: (d["x"] > 0).astype(int))
    message = refused(lambda: ns.MixedLM.from_formula("y ~ x + (1|g)", frame, groups="g").fit())
    assert "|" in message


def _with_nan(column: str) -> Check:
    def check(ns):
        data = simulated()
        given = {"endog": data.y.copy(), "exog_re": data.z.copy()}
        given[column][3] = np.nan
        message = refused(lambda: ns.MixedLM(exog=data.X, groups=data.groups, **given).fit())
        assert "missing" in message

    check.__name__ = f"nan_in_{column}_is_refused"
    return check


for _column in ("endog", "exog_re"):
    fault("F10")(_with_nan(_column))


@fault("F10")
def groups_of_one_row_are_refused(ns):
    data = simulated()
    n = len(data.y)
    message = refused(lambda: ns.MixedLM(data.y, data.X, np.arange(n)).fit())
    assert "row" in message


@fault("F10")
def a_single_group_is_refused(ns):
    data = simulated()
    message = refused(lambda: ns.MixedLM(data.y, data.X, np.zeros(len(data.y))).fit())
    assert "group" in message


# --------------------------------------------------------------- F11: documented, not working


@fault("F11", UnboundLocalError)
def no_search(ns):
    data = simulated()
    start = masked(ns, [0.0, 0.0], [[0.7]])
    found = ns.MixedLM(data.y, data.X, data.groups).fit(start_params=start, do_cg=False)
    np.testing.assert_allclose(number(found.cov_re_unscaled), 0.7, rtol=1e-12)


@fault("F11", AttributeError)
def saved_without_data(ns):
    data = simulated()
    found = ns.MixedLM(data.y, data.X, data.groups).fit()
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "result.pickle"))
        found.save(path, remove_data=True)
        loaded = type(found).load(path)
    np.testing.assert_array_equal(loaded.params, found.params)
    assert "x1" in str(loaded.summary())


def agrees(found: Any, hypothesis: Any, row: Any, value: float) -> None:
    """A hypothesis on one combination of the fixed effects agrees with the definition."""
    row, got = np.asarray(row), found.t_test(hypothesis)
    cov = np.asarray(found.cov_fe)
    z = (row @ np.asarray(found.fe_params) - value) / np.sqrt(row @ cov @ row)
    np.testing.assert_allclose(number(got.tvalue), z, rtol=1e-10)
    np.testing.assert_allclose(number(got.pvalue), 2.0 * norm.sf(abs(z)), rtol=1e-8)


@fault("F11", AttributeError)
def t_test_of_a_string(ns):
    found = ns.MixedLM.from_formula("y ~ x", simulated().frame, groups="g").fit()
    agrees(found, "x = 0.25", [0.0, 1.0], 0.25)


@fault("F11", IndexError)
def t_test_of_a_vector(ns):
    data = simulated()
    found = ns.MixedLM(data.y, data.X, data.groups).fit()
    agrees(found, np.array([1.0, -1.0]), [1.0, -1.0], 0.0)


@fault("F11", ValueError)
def t_test_of_pairs(ns):
    found = ns.MixedLM.from_formula("y ~ C(h)", simulated().frame, groups="g").fit()
    pairs = found.t_test_pairwise("C(h)").result_frame
    b = np.asarray(found.fe_params)
    np.testing.assert_allclose(pairs["coef"], [b[1], b[2], b[2] - b[1]], rtol=1e-10)
    assert list(pairs.index) == ["b-a", "c-a", "c-b"]


@fault("F11", AttributeError)
def likelihood_before_a_fit(ns):
    data = simulated()
    model = ns.MixedLM(data.y, data.X, data.groups)

    def negative(t):
        return -dense(data, variance(data, 0.7 * np.exp(t), 0.0, np.exp(t)), reml=True)

    at = masked(ns, [0.0, 0.0], [[0.7]])
    np.testing.assert_allclose(model.loglike(at), -minimize_scalar(negative).fun, rtol=1e-9)
    assert np.shape(model.score(at)) == (1,)


# --------------------------------------------------------------- F12, F13


@fault("F12")
def a_profile_holds_the_variance_itself(ns):
    data = simulated()
    found = ns.MixedLM(data.y, data.X, data.groups).fit(reml=False)
    psi = number(found.cov_re)
    got = found.profile_re(0, "re", num_low=2, dist_low=0.8 * psi, num_high=2, dist_high=2.0 * psi)
    grid = psi * np.array([0.2, 0.6, 1.0, 2.0, 3.0])
    best = [
        -minimize_scalar(lambda t, v=v: -dense(data, variance(data, v, 0.0, np.exp(t)))).fun
        for v in grid
    ]
    np.testing.assert_allclose(got[:, 0], grid, rtol=1e-4)
    np.testing.assert_allclose(got[:, 1], best, atol=1e-6)


@fault("F12")
def a_profile_of_a_component_holds_its_variance(ns):
    data = simulated(slope=1.0)
    found = with_component(ns).fit(reml=False)
    tau = float(found.vcomp[0])
    got = found.profile_re("z", "vc", num_low=1, dist_low=0.5 * tau, num_high=1, dist_high=tau)

    def best(v):
        x = np.log([number(found.cov_re), found.scale])
        return -minimize(
            lambda x: -dense(data, variance(data, np.exp(x[0]), v, np.exp(x[1]))), x
        ).fun

    grid = tau * np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(got[:, 0], grid, rtol=1e-4)
    np.testing.assert_allclose(got[:, 1], [best(v) for v in grid], atol=1e-6)


@fault("F13")
def warnings_do_not_depend_on_units(ns):
    data = simulated()
    seen = []
    for unit in (1e-3, 1.0, 1e3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ns.MixedLM(unit * data.y, data.X, data.groups).fit()
        seen.append({str(w.message) for w in caught})
    assert seen[0] == seen[1] == seen[2]


def test_every_fault_of_the_list_is_here():
    assert {fault.number for fault in FAULTS} == {f"F{i}" for i in range(1, 14)}
