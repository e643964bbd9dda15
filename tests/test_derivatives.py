"""The likelihood functions of a model: values against the dense oracle, derivatives by differences.

Every combination of criterion, number of random coefficients, number of variance components,
profiled or given fixed effects, and parameterisation.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from oracle import (
    Bar,
    Component,
    covariance,
    deviance,
    difference,
    evaluate,
    second_difference,
)
from scipy import sparse

import dmixed
from dmixed import MixedLMParams, VCSpec

GROUPS = 8
FIXED, RANDOM = ("1", "x", "z"), ("1", "x", "u")
KINDS = ("leaves", "weighted", "dense")

COMBINATIONS = [(q, d) for q in range(4) for d in range(4) if q + d]
every_size = pytest.mark.parametrize(
    ("k_re", "k_vc"), COMBINATIONS, ids=[f"re{q}-vc{d}" for q, d in COMBINATIONS]
)
every_criterion = pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
profiled_or_not = pytest.mark.parametrize("profile_fe", [True, False], ids=["profile", "full"])
root_or_not = pytest.mark.parametrize("use_sqrt", [True, False], ids=["root", "plain"])


# Data


@functools.cache
def table():
    """Rows of the groups, in any order: labels, columns, and the rows of each group."""
    rng = np.random.default_rng(11)
    sizes = rng.integers(7, 13, GROUPS)
    codes = rng.permutation(np.repeat(np.arange(GROUPS), sizes))
    n = len(codes)
    assert 60 <= n <= 100
    columns = {
        "1": np.ones(n), "x": rng.normal(3, 2, n), "z": rng.normal(0, 1, n),
        "u": rng.normal(-1, 0.7, n),
    }  # fmt: skip
    slope = (1 + 0.5 * rng.standard_normal(GROUPS))[codes]
    y = 7 + slope * columns["x"] - columns["z"] + rng.standard_normal(n)
    return columns, codes, y + rng.standard_normal(GROUPS)[codes] + 0.7 * rng.standard_normal(n)


def indicator(rng, n, m):
    """(n, m) of zeros and ones, one in each row, no column without."""
    levels = np.concatenate([np.arange(m), rng.integers(0, m, n)])[:n]
    return (rng.permutation(levels)[:, None] == np.arange(m)).astype(float)


@functools.cache
def matrices(kind):
    """Columns of a component in each group; their number differs from group to group."""
    rng = np.random.default_rng(KINDS.index(kind))
    _, codes, _ = table()
    found = []
    for g in range(GROUPS):
        n = np.count_nonzero(codes == g)
        if kind == "leaves":
            found.append(indicator(rng, n, 5 + g % 2))
        elif kind == "weighted":
            levels, weight = indicator(rng, n, (5, 5, 6, 5)[g % 4]), rng.uniform(0.3, 2, n)
            most = np.flatnonzero(levels[:, levels.sum(axis=0).argmax()])
            weight[most[1:]] = 0.0  # rows without any effect
            found.append(levels * weight[:, None])
        else:
            found.append(rng.normal(0.4, 1, (n, 1 + g % 3)))
    return found


def dense(kind):
    """The columns of all groups side by side, (n, M)."""
    _, codes, _ = table()
    blocks = matrices(kind)
    V = np.zeros((len(codes), sum(b.shape[1] for b in blocks)))
    at = 0
    for g, block in enumerate(blocks):
        V[codes == g, at : at + block.shape[1]] = block
        at += block.shape[1]
    return V


def kinds_of(k_re, k_vc):
    """Which components: each kind alone, and each pair, with some number of coefficients."""
    return [KINDS[(k_re + 1 + j) % 3] for j in range(k_vc)]


@functools.cache
def model_of(k_re, k_vc, use_sqrt):
    columns, codes, y = table()
    X = np.column_stack([columns[c] for c in FIXED])
    Z = np.column_stack([columns[c] for c in RANDOM[:k_re]]) if k_re else None
    spec = None
    if k_vc:
        kinds = kinds_of(k_re, k_vc)
        mats = [
            [sparse.csr_array(m) if kind == "weighted" else m for m in matrices(kind)]
            for kind in kinds
        ]
        names = [[[f"{j}" for j in range(m.shape[1])] for m in matrices(kind)] for kind in kinds]
        spec = VCSpec([f"{j} {kind}" for j, kind in enumerate(kinds)], names, mats)
    return dmixed.MixedLM(y, X, codes, Z, spec, use_sqrt)


def terms_of(k_re, k_vc, params):
    """The oracle's terms at relative parameters."""
    columns, codes, _ = table()
    found = []
    if k_re:
        Z = np.column_stack([columns[c] for c in RANDOM[:k_re]])
        found.append(Bar(Z, codes, params.cov_re))
    kinds = kinds_of(k_re, k_vc)
    return found + [Component(dense(kind), v) for kind, v in zip(kinds, params.vcomp, strict=True)]


def oracle(k_re, k_vc, params, reml, profile_fe):
    columns, _, y = table()
    X = np.column_stack([columns[c] for c in FIXED])
    H = covariance(terms_of(k_re, k_vc, params), len(y))
    return -0.5 * deviance(y, X, H, reml, None if profile_fe else params.fe_params)


def point(k_re, k_vc, rank="full", scale=1.0, seed=3):
    """Parameters somewhere: a covariance of full rank, singular, or zero."""
    rng = np.random.default_rng([seed, k_re, k_vc])
    L = np.tril(rng.normal(0, 0.6, (k_re, k_re)) + np.eye(k_re)) * scale
    vcomp = rng.uniform(0.2, 1.5, k_vc) * scale**2
    if rank == "singular":
        L[:, -1:] = 0.0
        vcomp[-1:] = 0.0
    elif rank == "zero":
        L[:], vcomp[:] = 0.0, 0.0
    fe = np.array([7.5, 0.8, -1.1]) + rng.normal(0, 0.1, 3)
    return MixedLMParams.from_components(fe, L @ L.T if k_re else None, vcomp=vcomp)


# Values


def test_a_component_of_indicators_is_a_bar():
    columns, codes, y = table()
    X = np.column_stack([columns["1"], columns["x"]])
    V = (codes[:, None] == np.arange(GROUPS)) * columns["z"][:, None]
    a = evaluate(y, X, [Component(V, 0.7)])
    b = evaluate(y, X, [Bar(columns["z"][:, None], codes, np.array([[0.7]]))])
    assert a.criterion == pytest.approx(b.criterion, abs=1e-11)
    for name in ("beta", "vcov", "blups", "condcov", "fitted"):
        assert np.allclose(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-12)


@profiled_or_not
@every_criterion
@every_size
def test_loglike_against_the_dense_oracle(k_re, k_vc, reml, profile_fe):
    """To 1e-9 in the deviance, that is 5e-10 in the log-likelihood."""
    for rank, scale in (("full", 0.05), ("full", 1.0), ("full", 5.0), ("singular", 1), ("zero", 1)):
        at = point(k_re, k_vc, rank, scale)
        want = oracle(k_re, k_vc, at, reml, profile_fe)
        for use_sqrt in (True, False):
            model = model_of(k_re, k_vc, use_sqrt)
            packed = at.get_packed(use_sqrt, has_fe=not profile_fe)
            got = model.loglike(packed, profile_fe, reml=reml)
            assert got == pytest.approx(want, abs=5e-10, rel=0)
        got = model.loglike(at, profile_fe, reml=reml)
        assert got == pytest.approx(want, abs=5e-10, rel=0)


@every_size
def test_fixed_effects_and_scale_against_the_dense_oracle(k_re, k_vc):
    columns, _, y = table()
    X = np.column_stack([columns[c] for c in FIXED])
    model = model_of(k_re, k_vc, True)
    for rank in ("full", "singular", "zero"):
        at = point(k_re, k_vc, rank)
        terms = terms_of(k_re, k_vc, at)
        want = evaluate(y, X, terms, False)
        beta, singular = model.get_fe_params(at.cov_re, at.vcomp)
        assert np.allclose(beta, want.beta, rtol=0, atol=1e-9 * want.se)
        assert singular == (k_re > 0 and rank != "full")
        H = covariance(terms, len(y))
        for fe in (want.beta, at.fe_params):
            r = y - X @ fe
            rss = float(r @ np.linalg.solve(H, r))
            for reml, df in ((True, len(y) - 3), (False, len(y))):
                got = model.get_scale(fe, at.cov_re, at.vcomp, reml=reml)
                assert got == pytest.approx(rss / df, rel=1e-10)


# Derivatives


def assert_close(got, want, tol=1e-6):
    """Each entry to ``tol`` of itself, or of a hundredth of the largest of its kind."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    size = np.abs(want)
    if want.ndim == 2:
        diagonal = np.sqrt(np.diag(size))
        size = np.maximum(size, 1e-2 * np.outer(diagonal, diagonal))
    else:
        size = np.maximum(size, 1e-2 * size.max())
    assert np.all(np.abs(got - want) <= tol * size)


def steps(packed):
    """Scales on which the likelihood varies: a coordinate itself, or 0.3 near zero."""
    return np.maximum(np.abs(packed), 0.3)


@functools.cache
def slope_of(k_re, k_vc, reml, profile_fe, use_sqrt):
    """Differences of a model's ``loglike`` at ``point(k_re, k_vc)``."""
    model = model_of(k_re, k_vc, use_sqrt)
    v = point(k_re, k_vc).get_packed(use_sqrt, has_fe=not profile_fe)
    return difference(lambda v: model.loglike(v, profile_fe, reml=reml), v, steps(v))


@functools.cache
def curvature_of(k_re, k_vc, reml, profile_fe, use_sqrt):
    """Differences of a model's ``score`` there."""
    model = model_of(k_re, k_vc, use_sqrt)
    v = point(k_re, k_vc).get_packed(use_sqrt, has_fe=not profile_fe)
    return difference(lambda v: model.score(v, profile_fe, reml=reml), v, steps(v))


@root_or_not
@profiled_or_not
@every_criterion
@every_size
def test_derivatives_against_differences(k_re, k_vc, reml, profile_fe, use_sqrt):
    model, at = model_of(k_re, k_vc, use_sqrt), point(k_re, k_vc)
    packed = at.get_packed(use_sqrt, has_fe=not profile_fe)
    slope = slope_of(k_re, k_vc, reml, profile_fe, use_sqrt)
    assert_close(model.score(packed, profile_fe, reml=reml), slope)
    assert_close(model.score(at, profile_fe, reml=reml), slope)
    if profile_fe:
        hessian = model.profile_hessian(packed, reml=reml)
        assert_close(hessian, curvature_of(k_re, k_vc, reml, True, use_sqrt))
        assert_close(hessian, hessian.T, 1e-10)
        return
    # the same function of other coordinates, whatever those of the model
    for root, function in ((False, model.score_full), (True, model.score_sqrt)):
        slope = slope_of(k_re, k_vc, reml, False, root)
        parts = function(packed, reml=reml)
        assert [len(x) for x in parts] == [3, k_re * (k_re + 1) // 2, k_vc]
        assert_close(np.concatenate(parts), slope)
        fe, re, vc = function(packed, calc_fe=False, reml=reml)
        assert np.array_equal(fe, np.zeros(3))
        assert_close(np.concatenate([re, vc]), slope[3:])
    hessian, singular = model.hessian(packed, reml=reml)
    assert_close(hessian, curvature_of(k_re, k_vc, reml, False, False))
    assert_close(hessian, hessian.T, 1e-10)
    assert not singular


@every_criterion
@pytest.mark.parametrize(("k_re", "k_vc"), [(2, 0), (0, 2), (2, 1)])
def test_hessians_against_differences_of_values_alone(k_re, k_vc, reml):
    """Two steps lose more: eps^(2/3) of the value, about 1e-8 here."""
    use_sqrt = not reml
    model, at = model_of(k_re, k_vc, use_sqrt), point(k_re, k_vc)
    packed = at.get_packed(use_sqrt)
    want = second_difference(lambda v: model.loglike(v, reml=reml), packed, steps(packed))
    assert_close(model.profile_hessian(packed, reml=reml), want, 1e-5)
    v = at.get_packed(False, has_fe=True)

    def loglike(v: np.ndarray) -> float:
        return oracle(k_re, k_vc, MixedLMParams.from_packed(v, 3, k_re, False, True), reml, False)

    want = second_difference(loglike, v, steps(v))
    assert_close(model.hessian(at, reml=reml)[0], want, 1e-5)


@every_criterion
@pytest.mark.parametrize("rank", ["singular", "zero"])
@every_size
def test_derivatives_where_the_covariance_is_singular(k_re, k_vc, rank, reml):
    """The oracle, which asks for no root, has values on both sides of the boundary."""
    model = model_of(k_re, k_vc, True)
    at = point(k_re, k_vc, rank)

    def loglike(v: np.ndarray, profile_fe: bool, root: bool) -> float:
        params = MixedLMParams.from_packed(v, 3, k_re, root, True)
        return oracle(k_re, k_vc, params, reml, profile_fe)

    v = at.get_packed(False, has_fe=True)
    scale = np.append(np.full(3, 0.3), np.full(len(v) - 3, 0.03))  # H stays positive definite
    slope = difference(lambda v: loglike(v, False, False), v, scale)
    assert_close(np.concatenate(model.score_full(at, reml=reml)), slope)
    plain = model_of(k_re, k_vc, False)
    slope = difference(lambda v: loglike(v, True, False), v, scale)
    assert_close(plain.score(at, reml=reml), slope[3:])
    assert model.hessian(at, reml=reml)[1] == (k_re > 0)
    if rank == "zero":  # a stationary point of the root, whatever the data
        _, re, vc = model.score_sqrt(at, reml=reml)
        assert np.array_equal(np.append(re, vc), np.zeros(len(v) - 3))


def test_the_model_has_the_parameters_of_the_oracle():
    model, at = model_of(2, 2, True), point(2, 2)
    assert (model.k_fe, model.k_re, model.k_vc, model.k_params) == (3, 2, 2, 8)
    assert model.data.vcomp_names == [f"{j} {kind}" for j, kind in enumerate(kinds_of(2, 2))]
    for kind in KINDS:
        assert len({m.shape[1] for m in matrices(kind)}) > 1
    for wrong in (at.get_packed(True)[:-1], np.zeros((2, 2))):
        with pytest.raises(dmixed.DataError, match="params has shape"):
            model.loglike(wrong)
