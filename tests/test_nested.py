"""Several random factors, nested and crossed, and variance components, against the dense oracle."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from models import model_of
from oracle import (
    Bar,
    Component,
    covariance,
    deviance,
    difference,
    evaluate,
    joint_condcov,
    joint_criterion,
    second_difference,
    unpack,
)

import dmixed
from dmixed import levels
from dmixed.errors import DataError, FormulaError, NotSupportedError

# Data


@functools.cache
def nested() -> pd.DataFrame:
    """Schools g, classes h within them, pupils k within these; 1 to 14 classes in a school."""
    rng = np.random.default_rng(21)
    rows = []
    for g, classes in enumerate((1, 5, 6, 5, 14, 1, 6, 5)):
        for h in range(classes):
            for k in range(1 + (g + h) % 3):
                rows += [(f"g{g}", f"h{h}", f"k{k}")] * int(rng.integers(1, 4))
    d = pd.DataFrame(rows, columns=["g", "h", "k"])
    d["gh"] = d.g + d.h
    return with_numbers(d, rng)


@functools.cache
def crossed() -> pd.DataFrame:
    """Three factors, each row with any level of each."""
    rng = np.random.default_rng(22)
    n = 120
    d = pd.DataFrame({
        "a": rng.integers(0, 9, n), "b": rng.integers(100, 107, n), "c": rng.integers(-5, 0, n)
    })  # fmt: skip
    return with_numbers(d, rng)


@functools.cache
def islands() -> pd.DataFrame:
    """Two factors crossed within islands of very different size; one level of each in some."""
    rng = np.random.default_rng(23)
    sizes = (1, 1, 2, 2, 7)
    island = np.repeat(np.arange(len(sizes)), [3, 4, 12, 12, 70])
    own = np.array(sizes)[island]
    d = pd.DataFrame({
        "a": island * 100 + rng.integers(0, 99, len(island)) % own,
        "b": island * 100 + rng.integers(0, 99, len(island)) % (own + 1),
    })  # fmt: skip
    return with_numbers(d, rng)


def with_numbers(d, rng):
    """Covariates, weights and an offset; rows in any order."""
    n = len(d)
    d["x"], d["z"] = rng.normal(1, 1, n), rng.normal(0, 1, n)
    d["w"], d["o"] = rng.uniform(0.4, 3, n), rng.normal(2, 1, n)
    return d.sample(frac=1, random_state=1, ignore_index=True)


def ones(d):
    return np.ones(len(d))


def column(d, name):
    return ones(d) if name == "1" else d[name].to_numpy()


# Models


@dataclass(frozen=True)
class Part:
    """A block of Psi: its label, and its columns in the dense oracle.

    ``names`` are the random columns of a bar, with the keys of its levels in ``keys``; a component
    has a function that gives its columns, and per column its group and its name.
    """

    label: str
    names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    component: Callable[[pd.DataFrame], tuple[np.ndarray, list[tuple[Any, str]]]] | None = None

    def codes(self, d):
        return d.groupby(list(self.keys), sort=True).ngroup().to_numpy()

    def columns(self, d):
        """Dense columns: V (n,m), or Z (n,q)."""
        if self.component is not None:
            return self.component(d)[0]
        return np.column_stack([column(d, name) for name in self.names])

    @property
    def size(self):
        return 1 if self.component is not None else len(self.names)


@dataclass(frozen=True)
class Case:
    """A model by formula, its parts in the order of Psi: lme4's, most levels first."""

    data: Callable[[], pd.DataFrame]
    random: str | Mapping[str, str]
    parts: tuple[Part, ...]
    fixed: tuple[str, ...] = ("1", "x", "z")
    groups: str = ""
    re_formula: str | None = None
    weights: str | None = None
    offset: str | None = None

    @property
    def formula(self):
        words = [("" if "1" in self.fixed else "0"), *(c for c in self.fixed if c != "1")]
        return "y ~ " + (" + ".join(w for w in words if w) or "1")

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """The data with a response that has all the effects of the model, of sizes about 1."""
        d = self.data().copy()
        rng = np.random.default_rng(31)
        y = 3 + d.x - 0.5 * d.z + 0.5 * rng.standard_normal(len(d)) / np.sqrt(d.w)
        for part in self.parts:
            C = part.columns(d)
            if part.component is not None:
                y += C @ rng.standard_normal(C.shape[1])
            else:
                codes = part.codes(d)
                b = rng.standard_normal((codes.max() + 1, part.size))
                y += (C * (b @ (np.eye(part.size) + 0.3))[codes]).sum(axis=1)
        return d.assign(y=y + (d.o if self.offset else 0.0))

    def model(self, data=None):
        d = self.table if data is None else data
        if isinstance(self.random, str):
            return model_of(f"{self.formula} + {self.random}", d, self.weights, self.offset)
        return dmixed.MixedLM.from_formula(
            self.formula, d, self.re_formula, self.random, groups=self.groups,
            weights=self.weights, offset=self.offset,
        )  # fmt: skip

    @functools.cached_property
    def _columns(self):
        d = self.table
        return [(p.columns(d), p.codes(d) if p.component is None else None) for p in self.parts]

    def terms(self, matrices):
        """The oracle's terms at the parts' relative covariances."""
        return [
            Component(C, float(Psi[0, 0])) if codes is None else Bar(C, codes, Psi)
            for (C, codes), Psi in zip(self._columns, matrices, strict=True)
        ]

    @property
    def sizes(self):
        return [part.size for part in self.parts]

    def of_theta(self, theta):
        return self.terms([L @ L.T for L in unpack(theta, self.sizes)])

    @functools.cached_property
    def given(self):
        """Response without the offset, X, weights and offset."""
        d = self.table
        parts = [column(d, c) for c in self.fixed]
        X = np.column_stack(parts) if parts else np.empty((len(d), 0))
        offset = d[self.offset].to_numpy() if self.offset else np.zeros(len(d))
        return d.y.to_numpy() - offset, X, self.weights and d[self.weights].to_numpy(), offset

    def deviance(self, theta, reml):
        y, X, weights, _ = self.given
        return deviance(y, X, covariance(self.of_theta(theta), len(y), weights), reml)

    def evaluate(self, theta, reml):
        y, X, weights, offset = self.given
        return evaluate(y + offset, X, self.of_theta(theta), reml, weights, offset)


def bar(label, names, *keys):
    return Part(label, tuple(names.split()), keys)


def indicators(*factors, group="g", by="1", name="{}", first=True):
    """Columns of a component: levels of factors within a group, times a number."""

    def made(d):
        V, found = [], []
        for g in sorted(d[group].unique()):
            inside = d[d[group] == g]
            pairs = sorted(set(zip(*(inside[f] for f in factors), strict=True)))
            for level in pairs[0 if first else 1 :]:
                on = (d[group] == g) & (d[list(factors)] == list(level)).all(axis=1)
                V.append(on.to_numpy() * column(d, by))
                found.append((g, name.format(*level)))
        return np.column_stack(V), found

    return made


def columns_of(*names, group="g"):
    """Columns of a component: some numbers, group by group."""

    def made(d):
        V, found = [], []
        for g in sorted(d[group].unique()):
            for name in names:
                V.append((d[group] == g).to_numpy() * column(d, name))
                found.append((g, "Intercept" if name == "1" else name))
        return np.column_stack(V), found

    return made


def together(*made):
    """Several functions as one, the columns of a group side by side."""

    def joined(d):
        found = [f(d) for f in made]
        names = [x for _, own in found for x in own]
        order = sorted(range(len(names)), key=lambda i: names[i][0])
        return np.hstack([V for V, _ in found])[:, order], [names[i] for i in order]

    return joined


h_of_g = indicators("h", name="C(h)[{}]")
CASES = {
    "two levels": Case(
        nested, "(1 | g) + (1 | g:h)", (bar("g:h", "1", "g", "h"), bar("g", "1", "g"))
    ),
    "three levels": Case(
        nested,
        "(1 | g/h/k)",
        (bar("k:h:g", "1", "g", "h", "k"), bar("h:g", "1", "g", "h"), bar("g", "1", "g")),
    ),
    "slopes of two levels": Case(
        nested, "(1 + x | g) + (0 + x | g:h)", (bar("g:h", "x", "g", "h"), bar("g", "1 x", "g"))
    ),
    "slopes of the smaller unit": Case(
        nested, "(x | g:h) + (1 | g)", (bar("g:h", "1 x", "g", "h"), bar("g", "1", "g"))
    ),
    "crossed with a slope": Case(
        crossed, "(x | a) + (1 | b)", (bar("a", "1 x", "a"), bar("b", "1", "b"))
    ),
    "nested by the data": Case(
        nested, "(1 | g) + (1 | gh)", (bar("gh", "1", "gh"), bar("g", "1", "g"))
    ),
    "three crossed": Case(
        crossed,
        "(1 | c) + (1 | a) + (1 | b)",
        (bar("a", "1", "a"), bar("b", "1", "b"), bar("c", "1", "c")),
    ),
    "bars of one factor": Case(
        crossed,
        "(1 | a) + (0 + x | a) + (0 + z | b)",
        (bar("a", "1", "a"), bar("a.1", "x", "a"), bar("b", "z", "b")),
    ),
    "islands": Case(islands, "(1 | a) + (1 | b)", (bar("b", "1", "b"), bar("a", "1", "a"))),
    "islands with slopes": Case(
        islands, "(x | a) + (0 + x | b)", (bar("b", "x", "b"), bar("a", "1 x", "a"))
    ),
    "no fixed effects": Case(
        nested,
        "(1 | g) + (1 | g:h)",
        (bar("g:h", "1", "g", "h"), bar("g", "1", "g")),
        fixed=(),
    ),
    "nested, weights and offset": Case(
        nested,
        "(x | g) + (1 | g:h)",
        (bar("g:h", "1", "g", "h"), bar("g", "1 x", "g")),
        weights="w",
        offset="o",
    ),
    "crossed, weights and offset": Case(
        crossed,
        "(x | a) + (1 | b) + (0 + z | c)",
        (bar("a", "1 x", "a"), bar("b", "1", "b"), bar("c", "z", "c")),
        weights="w",
        offset="o",
    ),
    "component of indicators": Case(
        nested,
        {"v": "0 + C(h)"},
        (bar("g", "1", "g"), Part("v", component=h_of_g)),
        groups="g",
        re_formula="1",
    ),
    "component alone": Case(nested, {"v": "0 + C(h)"}, (Part("v", component=h_of_g),), groups="g"),
    "two columns, one variance": Case(
        nested,
        {"v": "0 + x + z"},
        (bar("gh", "1", "gh"), Part("v", component=columns_of("x", "z", group="gh"))),
        groups="gh",
        re_formula="1",
    ),
    "treatment contrasts": Case(
        nested,
        {"c": "1 + C(h)"},
        (
            Part(
                "c",
                component=together(
                    columns_of("1"), indicators("h", name="C(h)[T.{}]", first=False)
                ),
            ),
        ),
        groups="g",
    ),
    "contrasts beside a slope": Case(
        nested,
        {"c": "1 + C(h)", "s": "0 + C(h):x"},
        (
            bar("g", "x", "g"),
            Part(
                "c",
                component=together(
                    columns_of("1"), indicators("h", name="C(h)[T.{}]", first=False)
                ),
            ),
            Part("s", component=indicators("h", by="x", name="C(h)[{}]:x")),
        ),
        groups="g",
        re_formula="0 + x",
    ),
    "components of two levels": Case(
        nested,
        {"h": "0 + C(h)", "k": "0 + C(h):C(k)"},
        (
            bar("g", "1", "g"),
            Part("h", component=h_of_g),
            Part("k", component=indicators("h", "k", name="C(h)[{}]:C(k)[{}]")),
        ),
        groups="g",
        re_formula="1",
        weights="w",
        offset="o",
    ),
    "components of one level": Case(
        nested,
        {"1": "1", "x": "0 + x", "h": "0 + C(h)"},
        (
            Part("1", component=columns_of("1")),
            Part("h", component=h_of_g),
            Part("x", component=columns_of("x")),
        ),
        groups="g",
    ),
}

every_case = pytest.mark.parametrize("name", CASES)
every_criterion = pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])


@functools.cache
def model(name):
    return CASES[name].model()


@functools.cache
def fitted(name, reml):
    return model(name).fit(reml=reml)


def points(sizes, seed=7):
    """Theta of a full, a singular and no covariance, small and large."""
    rng = np.random.default_rng(seed)
    found = [np.zeros(sum(q * (q + 1) // 2 for q in sizes))]
    for scale, rank in ((0.1, "full"), (1.0, "full"), (5.0, "full"), (1.0, "singular")):
        blocks = []
        for q in sizes:
            L = np.tril(rng.standard_normal((q, q)))
            if rank == "singular":
                L[:, -1] = 0
            blocks += [L[j:, j] for j in range(q)]
        found.append(scale * np.concatenate(blocks))
    return found


# The criterion


@every_criterion
@every_case
def test_criterion(name, reml):
    case, own = CASES[name], model(name)
    assert [b.label for b in own._prepared.bars] == [part.label for part in case.parts]
    for theta in points(case.sizes):
        want = case.deviance(theta, reml)
        assert own.criterion(theta, reml)[0] == pytest.approx(want, abs=1e-9, rel=0)


@every_criterion
@every_case
def test_derivatives_of_the_criterion(name, reml):
    case, own = CASES[name], model(name)
    theta = points(case.sizes)[2]
    scale = np.maximum(np.abs(theta), 0.3)
    _, gradient, hessian = own.criterion(theta, reml)
    want = difference(lambda t: case.deviance(t, reml), theta, scale)
    assert np.allclose(gradient, want, rtol=1e-6, atol=1e-7 * np.abs(want).max())
    want = difference(lambda t: own.criterion(t, reml)[1], theta, scale)
    assert np.allclose(hessian, want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


# The fit


@every_criterion
@every_case
def test_estimates(name, reml):
    """Everything at the optimum by dense algebra; and an optimum of the oracle it is."""
    case, result = CASES[name], fitted(name, reml)
    assert result.converged
    assert not result.singular
    theta = result.theta
    d, want = case.table, case.evaluate(theta, reml)
    sd = np.sqrt(want.sigma2)
    assert -2 * result.llf == pytest.approx(want.criterion, abs=1e-9, rel=0)
    assert np.allclose(result.fe_params, want.beta, rtol=0, atol=1e-8 * want.se)
    assert np.allclose(result.cov_fe, want.vcov, rtol=0, atol=1e-8 * np.outer(want.se, want.se))
    assert result.scale == pytest.approx(want.sigma2, rel=1e-9)
    assert np.allclose(result.fittedvalues, want.fitted, rtol=0, atol=1e-8 * sd)
    assert np.allclose(result.resid, d.y - want.fitted, rtol=0, atol=1e-8 * sd)
    gradient = difference(lambda t: case.deviance(t, reml), theta, np.maximum(np.abs(theta), 0.1))
    hessian = model(name).criterion(theta, reml)[2]
    assert gradient @ np.linalg.solve(hessian, gradient) <= 1e-11
    covs, tables = result.ranef_cov(), result.ranef()
    tables = tables if isinstance(tables, dict) else {case.parts[0].label: tables}
    varcorr = result.varcorr()
    blocks = unpack(theta, case.sizes)
    assert list(covs) == list(varcorr) == [part.label for part in case.parts]
    for part, L, b, C in zip(case.parts, blocks, want.blups, want.condcov, strict=True):
        Phi = want.sigma2 * L @ L.T
        assert np.allclose(varcorr[part.label], Phi, rtol=1e-9, atol=1e-12 * want.sigma2)
        size = np.sqrt(np.diag(Phi))
        order, columns = place(part, tables, d)
        got = tables[part.label.split(".")[0]][columns].to_numpy()
        assert got.shape == b.shape
        assert np.all(np.abs(got - b[order]) <= 1e-8 * size)
        assert covs[part.label].shape == C.shape
        assert np.all(np.abs(covs[part.label] - C[order]) <= 1e-8 * np.outer(size, size))


def place(part, tables, d):
    """Per row of a table of effects the oracle's number of it; and the table's columns."""
    table = tables[part.label.split(".")[0]]
    if part.component is not None:
        _, names = part.component(d)
        wanted = [(g, f"{part.label}[{name}]") for g, name in names]
        assert sorted(table.index) == sorted(wanted)
        return [wanted.index(label) for label in table.index], [part.label]
    first = d.groupby(list(part.keys), sort=True).head(1)
    names = list(table.index.names)
    assert sorted(names) == sorted(part.keys)
    labels = list(first[names].itertuples(index=False, name=None))
    position = dict(zip(labels, part.codes(first), strict=True))
    own = [label if isinstance(label, tuple) else (label,) for label in table.index]
    assert sorted(own) == sorted(position)
    return [position[label] for label in own], ["Intercept" if c == "1" else c for c in part.names]


WITHIN = [name for name, case in CASES.items() if case.groups]


@every_criterion
@pytest.mark.parametrize("name", WITHIN)
def test_random_effects_of_a_group(name, reml):
    """All effects of a group with their joint conditional covariance, by name."""
    case, result = CASES[name], fitted(name, reml)
    d, want = case.table, case.evaluate(result.theta, reml)
    cov = joint_condcov(case.of_theta(result.theta), want.sigma2, len(d), case.given[2])
    effects = []
    for part in case.parts:
        if part.component is not None:
            effects += [(g, f"{part.label}[{name}]") for g, name in part.component(d)[1]]
        else:
            named = [part.keys[0] if c == "1" else c for c in part.names]
            effects += [(g, c) for g in sorted(d[case.groups].unique()) for c in named]
    b = np.concatenate([x.ravel() for x in want.blups])
    prior = np.concatenate(
        [np.tile(np.diag(L @ L.T), len(x)) for L, x in zip(
            unpack(result.theta, case.sizes), want.blups, strict=True)]
    )  # fmt: skip
    sd = np.sqrt(want.sigma2 * prior)
    assert len(result.random_effects) == len(result.random_effects_cov) == d[case.groups].nunique()
    for g, own in result.random_effects.items():
        inside = [i for i, (group, _) in enumerate(effects) if group == g]
        assert sorted(own.index) == sorted(effects[i][1] for i in inside)
        order = [inside[[effects[i][1] for i in inside].index(label)] for label in own.index]
        assert np.all(np.abs(own - b[order]) <= 1e-8 * sd[order])
        got = result.random_effects_cov[g]
        assert list(got.index) == list(got.columns) == list(own.index)
        limit = 1e-8 * np.outer(sd[order], sd[order])
        assert np.all(np.abs(got - cov[np.ix_(order, order)]) <= limit)


INFORMATION = [*WITHIN, "three levels", "crossed with a slope", "bars of one factor", "islands"]


@pytest.mark.parametrize("name", INFORMATION)
def test_standard_errors_of_the_variances(name):
    """From the joint information with the error variance, by differences of the oracle."""
    reml = len(name) % 2 == 0
    case, result = CASES[name], fitted(name, reml)
    y, X, weights, _ = case.given
    s2 = result.scale
    blocks = [s2 * L @ L.T for L in unpack(result.theta, case.sizes)]
    entries = [np.tril_indices(q) for q in case.sizes]

    def joint(v: np.ndarray) -> float:
        matrices, at = [], 0
        for q, where in zip(case.sizes, entries, strict=True):
            M = np.zeros((q, q))
            M[where] = v[at : at + len(where[0])]
            matrices.append(M + np.tril(M, -1).T)
            at += len(where[0])
        return joint_criterion(y, X, case.terms(matrices), v[-1], reml, weights)

    packed = np.concatenate([B[where] for B, where in zip(blocks, entries, strict=True)])
    diagonal = np.concatenate(
        [np.sqrt(np.outer(np.diag(B), np.diag(B)))[w] for B, w in zip(blocks, entries, strict=True)]
    )
    at, scale = np.append(packed, s2), np.append(diagonal, s2)
    # the likelihood varies on the scale of the estimates; steps stay where Psi is positive definite
    information = second_difference(joint, at, scale)
    want = np.sqrt(np.diag(np.linalg.inv(information / 2)))
    assert np.allclose(result.bse_re, want[:-1], rtol=1e-5, atol=0)
    assert result.bse_scale == pytest.approx(want[-1], rel=1e-5)


def test_a_variance_of_zero_among_several():
    """No effects of schools in the response: zero there, all else by the oracle's algebra."""
    case = CASES["slopes of the smaller unit"]
    X, d = case.given[1], case.table
    rng = np.random.default_rng(3)
    school, pupil = (d.groupby(f).ngroup().to_numpy() for f in ("g", "gh"))
    e = rng.standard_normal(len(d)) + rng.standard_normal(pupil.max() + 1)[pupil]
    e -= (np.bincount(school, e) / np.bincount(school))[school]
    d = d.assign(y=X @ [1.0, 2.0, -1.0] + e)
    result = case.model(d).fit()
    assert result.converged
    assert result.singular
    assert result.theta[-1] == 0.0
    want = evaluate(d.y, X, case.of_theta(result.theta))
    assert -2 * result.llf == pytest.approx(want.criterion, abs=1e-9, rel=0)
    assert np.array_equal(result.ranef()["g"].to_numpy(), np.zeros((8, 1)))
    assert np.array_equal(result.ranef_cov()["g"], np.zeros((8, 1, 1)))
    assert np.isnan(result.bse_re.iloc[-1])
    # the slopes of y on the school's variance at zero are not negative: it wants to stay there
    at = np.append(result.theta[:-1], 0.3)
    assert evaluate(d.y, X, case.of_theta(at)).criterion > want.criterion


# What must not matter


INVARIANT = ["three levels", "slopes of the smaller unit", "islands with slopes",
             "crossed, weights and offset", "components of two levels"]  # fmt: skip


def assert_same(a, b, label: Callable = lambda factor, x: x):
    """Two fits agree; ``label`` translates labels of levels of b into those of a."""
    assert a.llf == pytest.approx(b.llf, rel=1e-9, abs=0)
    assert np.all(np.abs(a.fe_params - b.fe_params) <= 1e-7 * b.bse_fe)
    assert a.scale == pytest.approx(b.scale, rel=1e-7)
    assert a.factors == b.factors
    (ours, theirs), sizes = (a.ranef(), b.ranef()), b.varcorr()
    assert list(ours) == list(theirs)
    for factor, table in theirs.items():
        index = [label(factor, x) for x in table.index]
        sd = np.sqrt(np.diag(sizes[factor]))
        found = ours[factor].loc[index].to_numpy()
        assert len(found) == len(ours[factor])
        assert np.all(np.abs(found - table.to_numpy()) <= 1e-6 * sd)


@every_criterion
@pytest.mark.parametrize("name", INVARIANT)
def test_unchanged_under_partitioning_and_row_order(name, reml, tmp_path):
    case, base = CASES[name], fitted(name, reml)
    d = case.table
    shuffled = d.sample(frac=1, random_state=5)
    assert_same(case.model(shuffled).fit(reml=reml), base)
    cuts = np.array([0, 3, 40, 41, 90, len(d)])
    parts = [d.iloc[a:b] for a, b in itertools.pairwise(cuts)]
    frame = dd.from_map(lambda i: parts[i], range(5), meta=d.iloc[:0])
    assert frame.npartitions == 5
    assert_same(case.model(frame).fit(reml=reml), base)
    for i, part in enumerate(parts[::-1]):
        part.to_parquet(tmp_path / f"{i}.parquet", index=False, row_group_size=25)
    assert_same(case.model(str(tmp_path)).fit(reml=reml), base)


@every_criterion
def test_unchanged_under_relabelling(reml):
    """Other names in another order, of another type."""
    case, base = CASES["three levels"], fitted("three levels", reml)
    names = {
        "g": {f"g{i}": 1000 - 7 * i for i in range(8)},
        "h": {f"h{i}": ("β", "é", "", "z")[i % 4] + str(i) for i in range(14)},
        "k": {"k0": -1.5, "k1": 0.25, "k2": -0.5},
    }
    d = case.table.assign(**{key: case.table[key].map(own) for key, own in names.items()})

    def label(factor: str, x: Any) -> Any:
        own = x if isinstance(x, tuple) else (x,)
        found = tuple(names[n][v] for n, v in zip(factor.split(":"), own, strict=True))
        return found if isinstance(x, tuple) else found[0]

    assert_same(case.model(d).fit(reml=reml), base, label)


def test_the_order_of_bars_does_not_matter():
    d = CASES["three crossed"].table
    base = fitted("three crossed", True)
    for text in ("(1 | a) + (1 | b) + (1 | c)", "(1 | b) + (1 | c) + (1 | a)"):
        found = dmixed.lmer(f"y ~ x + z + {text}", d)
        assert_same(found, base)
        assert np.allclose(found.theta, base.theta, rtol=1e-9)


def test_a_component_of_levels_is_a_bar():
    """``vc_formula={"v": "0 + C(h)"}`` beside an intercept of g is ``(1 | g) + (1 | g:h)``."""
    d = CASES["two levels"].table
    a = dmixed.lmer("y ~ x + z + (1 | g) + (1 | g:h)", d)
    b = dmixed.MixedLM.from_formula("y ~ x + z", d, "1", {"v": "0 + C(h)"}, groups="g").fit()
    assert a.llf == pytest.approx(b.llf, rel=1e-12)
    assert b.vcomp[0] == pytest.approx(a.varcorr()["g:h"].iloc[0, 0], rel=1e-7)
    assert b.cov_re.iloc[0, 0] == pytest.approx(a.varcorr()["g"].iloc[0, 0], rel=1e-7)
    assert np.allclose(a.ranef()["g:h"], b.ranef()["v"], rtol=0, atol=1e-7)


def test_a_data_set_of_one_cluster_per_row_of_the_smaller_factor():
    """Levels of the finest factor with a single row: its variance still is no residual variance."""
    rng = np.random.default_rng(1)
    n = 90
    d = pd.DataFrame({"g": np.arange(n) // 9, "h": np.arange(n) // 3, "x": rng.normal(0, 1, n)})
    d = d.drop(index=[1, 2, 4, 5, 30, 31])  # classes of one row
    d["y"] = d.x + rng.standard_normal(10)[d.g] + rng.standard_normal(30)[d.h]
    d["y"] += 0.5 * rng.standard_normal(len(d))
    result = dmixed.lmer("y ~ x + (1 | g) + (1 | h)", d)
    X = np.column_stack([np.ones(len(d)), d.x])
    tau, omega = result.theta**2
    bars = [
        Bar(X[:, :1], d.groupby(f).ngroup().to_numpy(), np.array([[v]]))
        for f, v in (("h", tau), ("g", omega))
    ]
    want = evaluate(d.y, X, bars)
    assert -2 * result.llf == pytest.approx(want.criterion, abs=1e-9)
    assert np.allclose(result.ranef()["h"].iloc[:, 0], want.blups[0][:, 0], rtol=0, atol=1e-9)


# Refusals


def test_too_many_crossed_levels_are_refused_by_name(monkeypatch):
    d = CASES["three crossed"].table
    monkeypatch.setattr(levels, "MAX_DENSE", 11)
    with pytest.raises(NotSupportedError) as caught:
        dmixed.lmer("y ~ x + (1 | a) + (1 | b) + (1 | c)", d)
    message = str(caught.value)
    for words in ("a (9 levels)", "b (7 levels)", "c (5 levels)", "12 random effects"):
        assert words in message
    monkeypatch.setattr(levels, "MAX_DENSE", 12)
    assert dmixed.lmer("y ~ x + (1 | a) + (1 | b) + (1 | c)", d).converged
    monkeypatch.setattr(levels, "MAX_NUMBERS", 100)
    with pytest.raises(NotSupportedError, match=r"a \(9 levels\)"):
        dmixed.lmer("y ~ x + (1 | a) + (1 | b) + (1 | c)", d)
    # nested factors are solved for school by school, whatever their number
    monkeypatch.setattr(levels, "MAX_NUMBERS", 2**29)
    assert dmixed.lmer("y ~ x + (1 | g/h)", CASES["two levels"].table).converged


def test_several_bars_have_no_parameters_in_statsmodels_words():
    own = model("three crossed")
    with pytest.raises(NotSupportedError, match="several bars"):
        own.loglike(np.ones(3))
    with pytest.raises(NotSupportedError, match="several bars"):
        _ = fitted("three crossed", True).params_object
    with pytest.raises(NotSupportedError, match="a, b, c"):
        _ = fitted("three crossed", True).random_effects


def of_formula(parts, data=None, groups="g"):
    d = CASES["two levels"].table if data is None else data
    return dmixed.MixedLM.from_formula("y ~ x + z", d, "1", parts, groups=groups)


def test_impossible_components_of_a_formula_are_refused_by_name():
    d = CASES["two levels"].table.assign(nothing=0.0)
    with pytest.raises(DataError, match="variance component 'empty' are zero"):
        of_formula({"v": "0 + C(h)", "empty": "0 + nothing"}, d).fit()
    with pytest.raises(FormulaError, match="'v' and 'w' are the same component"):
        of_formula({"v": "0 + C(h)", "w": "0 + C(h)"})
    with pytest.raises(FormulaError, match="a component is called 'g'"):
        of_formula({"g": "0 + C(h)"})
    with pytest.raises(DataError, match="no column 'nowhere'"):
        of_formula({"v": "0 + C(nowhere)"})


GROUPS = np.repeat(["a", "b", "c", "d"], 8)


def arrays(names=("v",), colnames=None, mats=None):
    """A model of arrays with one component of two levels in each of four groups."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal(32)
    half = np.kron(np.eye(2), np.ones((4, 1)))
    own = [["one", "two"]] * 4
    y = x + rng.standard_normal(4)[np.arange(32) // 8] + rng.standard_normal(8)[np.arange(32) // 4]
    spec = dmixed.VCSpec(
        list(names),
        [own] * len(names) if colnames is None else colnames,
        [[half] * 4] * len(names) if mats is None else mats,
    )
    X = np.column_stack([np.ones(32), x])
    return dmixed.MixedLM(y + 0.3 * rng.standard_normal(32), X, GROUPS, None, spec)


HALF = np.kron(np.eye(2), np.ones((4, 1)))
NAMES = [["one", "two"]] * 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mats": [[HALF] * 3]}, "component 'v' has 3 matrices and 4 lists of names for 4 groups"),
        ({"colnames": [NAMES[:2]]}, "component 'v' has 4 matrices and 2 lists of names"),
        (
            {"mats": [[HALF, HALF, HALF[:7], HALF]]},
            r"component 'v' has a matrix of shape \(7, 2\) for group c, which has 8 rows",
        ),
        ({"mats": [[HALF[None]] * 4]}, r"component 'v' has a matrix of shape \(1, 8, 2\)"),
        ({"mats": [[HALF.astype(str)] * 4]}, "component 'v' has a matrix of type <U32"),
        (
            {"colnames": [[["one"], *NAMES[1:]]]},
            "component 'v' has 1 names for 2 columns in group a",
        ),
        (
            {"colnames": [[*NAMES[:3], ["two", "two"]]]},
            "component 'v' has, in group d, two columns called 'two'",
        ),
        ({"names": ["v", "v"]}, "two components called 'v'"),
        ({"names": ["v", "w"], "mats": [[HALF] * 4]}, "2 names, 2 lists of column names and 1"),
        ({"mats": [[0 * HALF] * 4]}, "variance component 'v' are zero"),
        (
            {"mats": [[HALF[:, :0]] * 4], "colnames": [[[]] * 4]},
            "component 'v' has no columns",
        ),
        ({"mats": [[np.nan * HALF] * 4]}, "missing in row 0"),
    ],
)
def test_impossible_matrices_of_components_are_refused_by_name(given, words):
    with pytest.raises(DataError, match=words):
        arrays(**given).fit()


def test_components_by_group_label_must_name_every_group():
    X = np.ones((32, 1))
    y = np.arange(32) % 7.0
    old = pytest.warns(FutureWarning, match="VCSpec")
    with old, pytest.raises(DataError, match="component 'v' has no matrix for group d"):
        dmixed.MixedLM(y, X, GROUPS, None, {"v": dict.fromkeys("abc", HALF)})
    with old, pytest.raises(DataError, match="component 'v' has a matrix for 'e', no group"):
        dmixed.MixedLM(y, X, GROUPS, None, {"v": dict.fromkeys("abcde", HALF)})
    with pytest.raises(DataError, match="must be a VCSpec, not list"):
        dmixed.MixedLM(y, X, GROUPS, None, [HALF])
    with old:
        found = dmixed.MixedLM(y, X, GROUPS, None, {"v": dict.fromkeys("abcd", HALF)})
    assert found.k_vc == 1


def test_components_of_arrays_keep_their_order():
    """statsmodels sorts the components of a formula, and takes a `VCSpec` as it is."""
    whole = [["all"]] * 4
    ones_ = [np.ones((8, 1))] * 4
    own = arrays(["w", "v"], [NAMES, whole], [[HALF] * 4, ones_])
    assert own.data.vcomp_names == ["w", "v"]
    other = arrays(["v", "w"], [whole, NAMES], [ones_, [HALF] * 4])
    assert own.loglike([0.5, 2.0]) == pytest.approx(other.loglike([2.0, 0.5]), rel=1e-13)
    assert own.loglike([0.5, 2.0]) != pytest.approx(own.loglike([2.0, 0.5]), rel=1e-3)


def test_a_group_has_the_effects_of_its_own_columns_alone():
    """Groups with fewer columns of a component have fewer effects, as in statsmodels."""
    rng = np.random.default_rng(4)
    mats = [rng.standard_normal((8, 1 + i % 2)) for i in range(4)]
    own = arrays(colnames=[[["one", "two"][: m.shape[1]] for m in mats]], mats=[mats])
    effects = own.fit().random_effects
    assert list(effects["a"].index) == ["v[one]"]
    assert list(effects["b"].index) == ["v[one]", "v[two]"]
