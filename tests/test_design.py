"""Designs: batches to blocks, and what is learned over all of them, against formulaic in memory."""

from __future__ import annotations

import datetime as dt
import pickle
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from formulaic import Formula

from dmixed import keys
from dmixed.accumulation import accumulate, carried_columns
from dmixed.blocks import CONSTANT, RESPONSE, Column
from dmixed.design import (
    Batch,
    Design,
    FactorLevels,
    block,
    learn,
    matrix,
    merge_levels,
    specify,
)
from dmixed.errors import DataError, FormulaError, MissingDataError
from dmixed.formula import ParsedFormula, parse
from dmixed.moments import combine

N = 240
CUTS = ([0, N], [0, 60, 61, 61, 180, N], [*range(0, N, 16), N])


def frame() -> pd.DataFrame:
    """Rows sorted by the factors, so that batches meet different levels."""
    rng = np.random.default_rng(20)
    f = np.sort(rng.choice(list("bdac"), N))
    return pd.DataFrame(
        {
            "y": rng.normal(5, 2, N),
            "x": rng.normal(3, 2, N).round(3),
            "z": rng.uniform(1, 2, N),
            "big": 1e8 + rng.normal(0, 1, N),
            "f": f,
            "h": rng.choice(["v", "u", "w"], N),
            "k": np.sort(rng.integers(-1, 12, N)),
            "b": rng.random(N) > 0.4,
            "yield": rng.normal(0, 1, N) ** 2 + 0.1,
            "my col": rng.normal(0, 1, N),
            "g": rng.integers(0, 20, N),
        }
    )


DATA = frame()


def table(data: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(data, preserve_index=False)


def fit(
    formula: str | ParsedFormula,
    data: pa.Table,
    cuts: Sequence[int] = (),
    context: dict[str, Callable[..., Any]] | None = None,
    **options: Any,
) -> tuple[Design, list[Batch]]:
    """Everything from the formula to the design, batch by batch, as workers do it."""
    edges = list(cuts) or [0, len(data)]
    if isinstance(formula, str):
        formula = parse(formula, context or ())
    spec = specify(formula, data.slice(0, 100), context=context, **options)
    if context is None:
        spec = pickle.loads(pickle.dumps(spec))
    batches = [block(spec, data.slice(a, b - a), a) for a, b in pairwise(edges)]
    labels, positions = keys.align([batch.labels for batch in batches])
    moments = combine([accumulate(batch.block) for batch in batches], positions, len(labels))
    levels = {
        name: reduce(merge_levels, [batch.levels[name] for batch in batches])
        for name in batches[0].levels
    }
    design = learn(spec, levels, moments.columns, moments.plain, moments.nobs)
    return pickle.loads(pickle.dumps(design)) if context is None else design, batches


def carried(design: Design, batches: Sequence[Batch]) -> np.ndarray:
    """Carried columns F (n, k) of all rows, in the order of the design."""
    F = np.zeros((sum(b.block.nobs for b in batches), len(design.columns)))
    start = 0
    for batch in batches:
        rows = slice(start, start + batch.block.nobs)
        at = [design.columns.index(c) for c in batch.block.columns]
        F[rows, at] = carried_columns(batch.block, slice(0, batch.block.nobs))
        start = rows.stop
    return F


def categorical(data: pd.DataFrame) -> pd.DataFrame:
    """Data as formulaic must see them: booleans are categories here."""
    return data.assign(b=data["b"].astype("category")) if "b" in data else data


SAME = """
x
1
0 + x
x + z + x:z
f
0 + f
f + h
f * h
0 + f:h
f:h
h:f
f:h:b
f * h * x
f / x
f / h
x %in% f
f:x
f:x - 1
x:f + z
h + f:x:z
0 + f + h
0 + f + h + f:h
0 + h:x + f
b
b * x
b:f + b
x * b * f
(x + f + h) ** 2
(x + f + h + z) ** 3 - x:z
I(x ** 2)
x + I(x ** 2) + I(x ** 3)
I((x - 3) ** 2 + z)
I(x * z):f
I(x / 3) + I(-x) + I(+x - 2 * z)
I(2 ** x)
I(z ** 0.5 / (x ** 2 + 1)) - 1 + z
I(x > 3)
I(x > 3):f + I(x == 3)
I(x <= 3) * h
I(x % 2) + I(x // 2)
np.log(z)
log(z) * f
log(yield) + log10(z)
np.sqrt(yield):x
np.sin(2 * np.pi * x) + np.cos(2 * np.pi * x)
np.log(I(x ** 2))
np.minimum(x, 2) + np.maximum(x, z)
np.where(x > 3, x, 0)
exp(z) + np.exp(-x ** 2)
center(x)
center(x):f
center(x) * z
center(log(z))
scale(x) + scale(z)
scale(x) * f
scale(x, center=False)
scale(x, scale=False)
scale(x, center=1.5, scale=2)
scale(x, center=1.5)
scale(x, ddof=0)
scale(I(x ** 2))
I(scale(x) ** 2)
I(center(x) * center(z))
center(I(center(x) ** 2))
standardize(x)
standardize(x, rescale=False)
poly(x, 1)
poly(x, 2)
poly(x, 4)
poly(x, 3):f
0 + poly(x, 2):h
poly(x, 2) * poly(z, 2)
poly(log(z), degree=3)
poly(center(x), 2)
poly(x, 2, raw=True)
poly(x, 3, raw=True):f
bs(x, knots=[2, 4], lower_bound=-20, upper_bound=20)
bs(x, degree=2, lower_bound=-20, upper_bound=20)
bs(x, knots=[2.5], lower_bound=-20, upper_bound=20, degree=1):f
0 + bs(x, knots=[2, 4], lower_bound=-20, upper_bound=20, include_intercept=True)
f + bs(x, knots=[2, 4], lower_bound=-20, upper_bound=20, include_intercept=True)
f:bs(x, knots=[2, 4], lower_bound=-20, upper_bound=20, include_intercept=True)
bs(x, knots=[2, 4], lower_bound=1, upper_bound=5, extrapolation='clip')
bs(x, knots=[2, 4], lower_bound=1, upper_bound=5, extrapolation='extend')
bs(x, knots=[2, 4], lower_bound=1, upper_bound=5, extrapolation='zero')
cr(x, knots=[2, 4], lower_bound=-20, upper_bound=20) - 1
cs(x, knots=[2, 4], lower_bound=0, upper_bound=5)
cc(x, knots=[2, 4], lower_bound=-20, upper_bound=20)
C(k)
C(k):x
C(f)
C(f) * C(h, contr.sum)
C(f, contr.sum)
C(f, contr.sum()) - 1
C(f, contr.helmert)
C(f, contr.helmert(reverse=False, scale=True))
C(f, contr.diff):x
C(f, contr.diff(backward=False))
C(f, contr.poly)
C(k, contr.poly(scores=[1, 2, 4, 8, 9, 10, 12, 13, 15, 16, 17, 18, 20]))
C(f, contr.SAS)
C(f, contr.treatment('c'))
C(f, contr.treatment(base='c')) * x
C(f, Treatment('d')) + C(h, Treatment(reference='w'))
C(f, Sum) + C(h, Helmert)
C(f, Diff):C(h, Poly)
C(f, levels=['d', 'c', 'b', 'a'])
C(f, contr.sum, levels=['d', 'c', 'b', 'a'])
C(k, levels=[11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1])
C(k, contr.treatment(base=3))
C(x > 3)
f:C(f, Sum)
`my col` + yield
log(yield):`my col`
np.abs(`my col`) * f
Q('my col')
big + I((big - 100000000) ** 2)
I(big * x):f
""".strip().splitlines()


@pytest.mark.parametrize("formula", SAME)
def test_columns_are_those_of_formulaic(formula: str) -> None:
    """However the rows are cut, and whatever levels a part meets."""
    data = categorical(DATA).rename(columns={"yield": "YIELD"})
    expected = Formula(formula.replace("yield", "YIELD")).get_model_matrix(data)
    names = [name.replace("YIELD", "yield") for name in expected.columns]
    values = expected.to_numpy(float)
    scale = np.maximum(np.abs(values), 1)
    for cuts in CUTS:
        design, batches = fit(f"y ~ {formula} + ({formula} | g)", table(DATA), cuts)
        F = carried(design, batches)
        rows = matrix(design, table(DATA), response=True)
        for found, T, X in (
            (design.fixed_names, design.T_fixed, rows.X),
            (design.bars[0].names, design.terms[0].T, rows.Z[0]),
        ):
            assert list(found) == names
            np.testing.assert_allclose(F @ T / scale, values / scale, atol=1e-10, rtol=0)
            np.testing.assert_allclose(X / scale, values / scale, atol=1e-10, rtol=0)
        np.testing.assert_allclose(F @ design.t_response, DATA["y"], atol=1e-12)
        np.testing.assert_array_equal(rows.response, DATA["y"])
        assert rows.complete.all()
        random = {design.columns.index(b.block.columns[i]) for b in batches for i in b.block.random}
        assert set(np.flatnonzero(design.terms[0].T.any(axis=1))) <= random


@pytest.mark.parametrize(
    "formula",
    [
        "center(big)",
        "scale(big):f",
        "poly(big, 4)",
        "I(center(big) ** 2)",
        "I((big - 100000000) ** 3)",
        "center(I((big - 100000000) * x))",
    ],
)
def test_a_mean_of_1e8_costs_nothing(formula: str) -> None:
    """The reference is computed from big - 1e8, which is exact."""
    small = DATA.assign(big=DATA["big"] - 1e8)
    expected = Formula(formula.replace("100000000", "0")).get_model_matrix(small)
    for cuts in CUTS:
        design, batches = fit(f"y ~ {formula} + (1 | g)", table(DATA), cuts)
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X, expected, atol=1e-10, rtol=1e-10)
        np.testing.assert_allclose(matrix(design, table(DATA)).X, expected, atol=1e-10, rtol=1e-10)


def test_shift_and_scale_of_the_pilot_do_not_matter() -> None:
    data = table(DATA)
    formula = "y ~ poly(x, 3) * f + scale(z) + I(x * z) + (x | g)"
    one = specify(parse(formula), data.slice(0, 3))
    two = specify(parse(formula), data)
    found = []
    for spec in (one, two):
        batch = block(spec, data)
        moments = accumulate(batch.block)
        design = learn(spec, batch.levels, moments.columns, moments.plain, moments.nobs)
        found.append(carried(design, [batch]) @ design.T_fixed)
    assert one.frame != two.frame
    assert one.compatible(two)
    np.testing.assert_allclose(*found, atol=1e-9)


def test_terms_without_columns() -> None:
    design, _ = fit("y ~ 0 + (1 | g)", table(DATA))
    assert design.fixed_names == ()
    assert design.T_fixed.shape == (2, 0)
    assert design.bars[0].names == ("Intercept",)
    assert matrix(design, table(DATA)).X.shape == (N, 0)


def test_a_single_level_has_no_contrast() -> None:
    data = DATA.assign(f="only")
    assert fit("y ~ f + x + (1|g)", table(data))[0].fixed_names == ("Intercept", "x")
    assert fit("y ~ 0 + f + (1|g)", table(data))[0].fixed_names == ("f[only]",)


def test_degrees() -> None:
    design, _ = fit("y ~ f * x + I(x**2) + poly(z, 2) + (1 | g)", table(DATA))
    degrees = dict(zip(design.fixed_names, design.fixed_degree, strict=True))
    assert degrees["Intercept"] == degrees["f[T.b]"] == 0
    assert degrees["x"] == degrees["f[T.b]:x"] == degrees["poly(z, 2)[1]"] == 1
    assert degrees["I(x ** 2)"] == degrees["poly(z, 2)[2]"] == 2


def test_bars_have_labels_and_their_own_columns() -> None:
    formula = "y ~ x + (1 + x || g) + (0 + f | g)"
    design, batches = fit(formula, table(DATA), CUTS[2])
    assert [bar.label for bar in design.bars] == ["g", "g.1", "g.2"]
    assert [bar.text for bar in design.bars] == ["(1 | g)", "(0 + x | g)", "(0 + f | g)"]
    assert design.bars[0].names == ("Intercept",)
    assert design.bars[2].names == ("f[a]", "f[b]", "f[c]", "f[d]")
    rows = matrix(design, table(DATA))
    np.testing.assert_allclose(rows.Z[1][:, 0], DATA["x"], atol=1e-14)
    np.testing.assert_array_equal(rows.Z[2], pd.get_dummies(DATA["f"]))
    assert fit("y ~ (1 | g:h)", table(DATA))[0].bars[0].label == "g:h"
    for batch in batches:
        assert batch.block.columns[batch.block.random[0]] == CONSTANT


def test_constant_is_random_even_without_a_random_intercept() -> None:
    design, batches = fit("y ~ x + (0 + x | g)", table(DATA))
    made = batches[0].block
    assert made.columns[made.random[0]] == CONSTANT
    assert design.bars[0].names == ("x",)


def test_carried_columns_of_a_plain_model_are_few() -> None:
    _, batches = fit("y ~ x + z + (1 + x | g)", table(DATA))
    assert set(batches[0].block.columns) == {
        CONSTANT,
        Column((), (("x", 1),)),
        Column((), (("z", 1),)),
        Column((), ((RESPONSE, 1),)),
    }
    assert [batches[0].block.columns[i].powers for i in batches[0].block.random] == [
        (),
        (("x", 1),),
    ]


def test_numbers_are_not_copied() -> None:
    data = table(DATA[["y", "x", "g"]])
    spec = specify(parse("y ~ x + (1 | g)"), data)
    made = block(spec, data).block
    x = data["x"].chunk(0).to_numpy()
    assert any(np.shares_memory(values, x) for values in made.values)


def test_spec_is_small() -> None:
    spec = specify(parse("y ~ f * x + poly(z, 3) + (1 + x | g)"), table(DATA))
    assert len(pickle.dumps(spec)) < 10_000


class TestLevels:
    def test_order_is_by_code_point_and_by_number(self) -> None:
        rng = np.random.default_rng(1)
        data = table(
            pd.DataFrame(
                {
                    "y": rng.normal(size=60),
                    "t": rng.permutation(["b", "Z", "é", "a", "ab", ""] * 10),
                    "k": rng.permutation([10, 9, -1] * 20),
                    "w": rng.permutation([2.5, 10.0, 1.0] * 20),
                    "g": range(60),
                }
            )
        )
        design, _ = fit("y ~ 0 + t + C(k) + C(w) + (1 | g)", data, [0, 7, 30, 60])
        assert design.levels["t"] == ("", "Z", "a", "ab", "b", "é")
        assert design.levels["k"] == (-1, 9, 10)
        assert design.fixed_names[-4:] == ("C(k)[T.9]", "C(k)[T.10]", "C(w)[T.2.5]", "C(w)[T.10.0]")

    def test_declared_order_is_kept_where_all_parts_have_it(self) -> None:
        declared = pd.Categorical(DATA["f"], ["d", "x", "b", "c", "a"])
        data = table(DATA.assign(f=declared))
        design, _ = fit("y ~ f + (1 | g)", data, CUTS[2])
        assert design.levels["f"] == ("d", "b", "c", "a")
        assert design.fixed_names[1] == "f[T.b]"

    def test_other_declarations_in_other_parts_are_sorted(self) -> None:
        a = FactorLevels(("d", "b"), ("d", "b", "a"))
        b = FactorLevels(("a",), ("a", "b", "d"))
        c = FactorLevels(("c",), None)
        none = FactorLevels((), None)
        for order in ([a, b, c], [b, c, a], [none, a, none, c, b]):
            assert reduce(merge_levels, order).ordered("f") == ("a", "b", "c", "d")
        assert reduce(merge_levels, [none, a, none, a]).ordered("f") == ("d", "b")

    def test_merging_is_associative(self) -> None:
        parts = [
            FactorLevels((1, 2), None),
            FactorLevels((2.0, 3.0), None),
            FactorLevels((), (1, 2)),
            FactorLevels((0,), None),
        ]
        left = reduce(merge_levels, parts)
        right = merge_levels(parts[0], merge_levels(parts[1], merge_levels(parts[2], parts[3])))
        assert left.ordered("k") == right.ordered("k") == (0, 1, 2, 3)
        assert [type(x) for x in left.ordered("k")] == [int, int, int, float]

    def test_integers_that_nulls_made_floats_are_the_same_levels(self) -> None:
        k = np.tile([1, 2, 3], 20)
        whole = pa.table({"y": np.arange(60.0), "k": k, "g": np.arange(60) % 7})
        first = whole.slice(0, 30)
        nulls = np.where(np.arange(30) == 4, np.nan, k[30:].astype(float))
        second = whole.slice(30).set_column(1, "k", pa.array(nulls))
        spec = specify(parse("y ~ C(k) + (1 | g)"), first)
        for order in ([first, second], [second, first]):
            batches = [block(spec, part) for part in order]
            levels = reduce(merge_levels, [b.levels["k"] for b in batches])
            assert levels.ordered("k") == (1, 2, 3)
            assert all(isinstance(x, int) for x in levels.ordered("k"))
            columns = {c for b in batches for c in b.block.columns}
            assert len(columns) == 5
        assert sum(b.dropped.get("k: missing", 0) for b in batches) == 1

    def test_text_and_numbers_do_not_mix(self) -> None:
        mixed = merge_levels(FactorLevels(("a",), None), FactorLevels((1,), None))
        with pytest.raises(DataError, match=r"'k' is text in one part .* and a number in another"):
            mixed.ordered("k")

    def test_a_level_outside_levels_is_named(self) -> None:
        with pytest.raises(DataError, match=r"'f' has the level 'a', which C\(f, levels="):
            fit("y ~ C(f, levels=['b', 'c', 'd']) + (1 | g)", table(DATA))

    def test_a_base_that_is_not_there_is_named(self) -> None:
        with pytest.raises(DataError, match=r"Treatment\('q'\)\): .*'q'.*levels: 'a', 'b'"):
            fit("y ~ C(f, Treatment('q')) + (1 | g)", table(DATA))

    def test_too_many_levels(self) -> None:
        names = [f"n{i}" for i in range(5000)]
        data = pa.table({"y": np.arange(5000.0), "name": names, "g": np.arange(5000) % 9})
        with pytest.raises(DataError, match=r"'name' has 5000 levels.*\(1 \| name\)"):
            fit("y ~ name + (1 | g)", data)
        with pytest.raises(DataError, match="'name' has 5000 levels"):
            fit("y ~ name + (1 | g)", data, range(0, 5001, 500))

    def test_too_many_combinations(self) -> None:
        i = np.arange(3600)
        data = pa.table(
            {"y": i * 1.0, "a": [f"a{j // 60}" for j in i], "b": [f"b{j % 60}" for j in i], "g": i}
        )
        with pytest.raises(DataError, match="'a:b' has 3600 levels"):
            fit("y ~ a:b + (1 | g)", data)

    def test_a_cell_without_rows_has_a_column_of_zeros(self) -> None:
        data = DATA[~((DATA["f"] == "b") & (DATA["h"] == "w"))]
        design, batches = fit("y ~ f * h + (1 | g)", table(data))
        X = carried(design, batches) @ design.T_fixed
        at = design.fixed_names.index("f[T.b]:h[T.w]")
        assert not X[:, at].any()
        # Predicting such a row gives what the contrasts say, not zeros.
        row = matrix(design, table(DATA[(DATA["f"] == "b") & (DATA["h"] == "w")])).X[0]
        assert row[at] == 1
        sums, _ = fit("y ~ C(f, Sum) * C(h, Sum) + (1 | g)", table(data))
        expected = Formula("C(f, Sum) * C(h, Sum)").get_model_matrix(DATA)
        np.testing.assert_allclose(matrix(sums, table(DATA)).X, expected)


def with_gaps() -> pd.DataFrame:
    data = DATA.copy()
    data["k"] = data["k"].astype("Int64")
    data.loc[[3, 5], "y"] = np.nan
    data.loc[[5, 7], "x"] = np.inf
    data.loc[[8], "z"] = 0.0
    data.loc[[7, 9, 10], "f"] = None
    data["h"] = data["h"].where(data.index != 11, None)
    data["g"] = data["g"].where(~data.index.isin([10, 12]), np.nan)
    data["w"] = 1.0 + (data.index == 20)
    data.loc[[12, 13], "w"] = np.nan
    data["o"] = 0.5
    data.loc[[14], "o"] = -np.inf
    return data


class TestMissing:
    formula = "y ~ x + f + log(z) + (1 + h | g)"

    @pytest.mark.parametrize("cuts", CUTS)
    def test_each_row_counts_once_under_its_first_reason(self, cuts: list[int]) -> None:
        data = table(with_gaps())
        design, batches = fit(self.formula, data, cuts, weights="w", offset="o")
        total: dict[str, int] = {}
        for batch in batches:
            for reason, rows in batch.dropped.items():
                total[reason] = total.get(reason, 0) + rows
        assert total == {
            "y: missing": 2,
            "x: missing": 1,
            "f: missing": 2,
            "log(z): not finite": 1,
            "h: missing": 1,
            "g: missing": 1,
            "w: missing": 1,
            "o: missing": 1,
        }
        kept = ~with_gaps().index.isin([3, 5, 7, 8, 9, 10, 11, 12, 13, 14])
        assert sum(b.block.nobs for b in batches) == kept.sum()
        rows = matrix(design, data, response=True)
        np.testing.assert_array_equal(rows.complete, kept)
        clean = categorical(with_gaps()[kept])
        expected = Formula("x + f + log(z)").get_model_matrix(clean)
        np.testing.assert_allclose(rows.X[kept], expected, atol=1e-12)
        F = carried(design, batches)
        np.testing.assert_allclose(F @ design.T_fixed, expected, atol=1e-12)
        np.testing.assert_allclose(F @ design.t_response, clean["y"] - 0.5, atol=1e-12)
        np.testing.assert_array_equal(
            np.concatenate([b.block.weights for b in batches]), clean["w"]
        )
        groups = [
            batch.labels.arrays[0].to_numpy(zero_copy_only=False)[batch.block.group]
            for batch in batches
        ]
        np.testing.assert_array_equal(np.concatenate(groups).astype(float), clean["g"])
        for batch in batches:  # only groups with rows
            assert set(batch.block.group) == set(range(batch.block.n_groups))

    @pytest.mark.parametrize("missing", ["raise", "none"])
    def test_refused(self, missing: str) -> None:
        data = table(with_gaps())
        spec = specify(parse(self.formula), data, missing=missing)
        with pytest.raises(MissingDataError, match=r'y: missing in row 103 \(part 2\).*"drop"'):
            block(spec, data, 100, "part 2")
        complete = data.slice(30)
        assert block(spec, complete).dropped == {}
        broken = complete.set_column(2, "z", pa.array(np.zeros(len(complete))))
        with pytest.raises(MissingDataError, match=r"log\(z\): not finite in row 0"):
            block(spec, broken)

    @pytest.mark.parametrize("missing", ["raise", "none"])
    def test_the_first_row_is_named_with_its_first_column(self, missing: str) -> None:
        data = DATA.assign(w=1.0, o=0.0)
        data.loc[9, "y"] = np.nan
        data.loc[6, ["z", "w", "o"]] = np.nan
        data.loc[8, "x"] = np.nan
        data.loc[3, "w"] = -1.0  # said once nothing is missing
        spec = specify(parse(self.formula), table(data), missing=missing, weights="w", offset="o")
        with pytest.raises(MissingDataError, match=r"^z: missing in row 16;"):
            block(spec, table(data), 10)
        data["z"] = 1.0
        with pytest.raises(MissingDataError, match=r"^w: missing in row 16;"):
            block(spec, table(data), 10)
        data.loc[6, "w"] = 1.0
        with pytest.raises(MissingDataError, match=r"^o: missing in row 16;"):
            block(spec, table(data), 10)
        data["g"] = data["g"].where(data.index != 2)
        with pytest.raises(MissingDataError, match=r"^g: missing in row 12;"):
            block(spec, table(data), 10)

    def test_a_function_that_hides_missing_values_changes_nothing(self) -> None:
        data = DATA.assign(x=DATA["x"].where(DATA.index != 4))
        formula = "y ~ where(x > 3, 1, 0) + np.fmin(x, 2) + I(f == 'a') + (1 | g)"
        design, batches = fit(formula, table(data))
        assert batches[0].dropped == {"x: missing": 1}
        assert np.flatnonzero(~matrix(design, table(data)).complete).tolist() == [4]

    def test_text_that_is_missing_in_a_comparison(self) -> None:
        data = DATA.assign(f=DATA["f"].where(DATA.index != 4, None))
        design, batches = fit("y ~ I(f == 'a') + I('b' != f) + (1 | g)", table(data))
        assert batches[0].dropped == {"f: missing": 1}
        X = carried(design, batches) @ design.T_fixed
        kept = data.drop(index=4)
        np.testing.assert_allclose(X[:, 1], kept["f"] == "a", atol=1e-12)
        np.testing.assert_allclose(X[:, 2], kept["f"] != "b", atol=1e-12)

    def test_nothing_left(self) -> None:
        data = table(DATA.assign(x=np.nan))
        spec = specify(parse("y ~ x + f + (1 | g)"), data)
        batch = block(spec, data)
        assert batch.block.nobs == batch.block.n_groups == 0
        with pytest.raises(DataError, match="no rows to fit"):
            learn(spec, batch.levels, batch.block.columns, np.zeros((3, 3)), 0)

    def test_zero_rows(self) -> None:
        data = table(DATA)
        spec = specify(parse("y ~ x + f * h + C(k) + (1 + f | g)"), data)
        batch = block(spec, data.slice(0, 0))
        assert batch.block.nobs == 0
        assert batch.levels == {name: FactorLevels((), None) for name in ("f", "h", "k")}
        assert accumulate(batch.block).nobs == 0

    def test_an_empty_pilot(self) -> None:
        spec = specify(parse("y ~ x + f + (1 | g)"), table(DATA).slice(0, 0))
        assert set(spec.frame.scale) == {1.0}
        assert block(spec, table(DATA)).levels["f"].ordered("f") == tuple("abcd")


class TestWeightsAndOffset:
    @pytest.mark.parametrize("weight", [0.0, -2.0])
    def test_weights_must_be_positive(self, weight: float) -> None:
        data = DATA.assign(w=1.0)
        data.loc[17, "w"] = weight
        spec = specify(parse("y ~ x + (1 | g)"), table(data), weights="w")
        message = rf"weight 'w' is {weight:g} in row 117 \(part 3\)"
        with pytest.raises(DataError, match=message):
            block(spec, table(data), 100, "part 3")

    def test_weights_of_rows_that_are_dropped_do_not_matter(self) -> None:
        data = DATA.assign(w=1.0)
        data.loc[17, ["x", "w"]] = np.nan, -1.0
        data.loc[18, ["y", "w"]] = np.nan, 0.0
        spec = specify(parse("y ~ x + (1 | g)"), table(data), weights="w")
        made = block(spec, table(data))
        assert made.dropped == {"y: missing": 1, "x: missing": 1}
        assert made.block.weights is not None
        assert (made.block.weights == 1).all()
        data.loc[40, "w"] = 0.0
        with pytest.raises(DataError, match="weight 'w' is 0 in row 40;"):
            block(spec, table(data))

    def test_weights_that_are_text(self) -> None:
        with pytest.raises(DataError, match=r"column 'f' has type .*string.* number is needed"):
            specify(parse("y ~ x + (1 | g)"), table(DATA), weights="f")
        with pytest.raises(DataError, match="no column 'q'"):
            specify(parse("y ~ x + (1 | g)"), table(DATA), offset="q")

    def test_missing_must_be_known(self) -> None:
        with pytest.raises(DataError, match="missing must be"):
            specify(parse("y ~ x + (1 | g)"), table(DATA), missing="ignore")


class TestTypes:
    @pytest.mark.parametrize(
        "values",
        [
            pa.array(np.arange(40), pa.uint8()),
            pa.array(np.arange(40), pa.int64()),
            pa.array(np.arange(40), pa.uint64()),
            pa.array(np.arange(40.0), pa.float32()),
            pa.array(np.arange(40.0).astype(np.float16)),
            pa.array([Decimal(i) / 4 for i in range(40)], pa.decimal128(10, 2)),
            pa.array([None, *range(39)], pa.int32()),
        ],
        ids=str,
    )
    def test_numbers(self, values: pa.Array) -> None:
        data = pa.table({"y": np.arange(40.0), "x": values, "g": np.arange(40) % 5})
        design, batches = fit("y ~ x + (1 | g)", data, [0, 11, 40])
        expected = values.cast(pa.float64()).drop_null().to_numpy()
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X[:, 1], expected, atol=1e-12)

    @pytest.mark.parametrize(
        "type_",
        [
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.dictionary(pa.int8(), pa.string()),
            pa.dictionary(pa.int32(), pa.large_string()),
        ],
        ids=str,
    )
    def test_text(self, type_: pa.DataType) -> None:
        words = ["b", "a", None, "c"] * 10
        data = pa.table({"y": np.arange(40.0), "f": words, "g": np.arange(40) % 5})
        data = data.set_column(1, "f", data["f"].cast(type_))
        design, batches = fit("y ~ f + (1 | g)", data)
        assert set(design.levels["f"]) == set("abc")
        assert batches[0].dropped == {"f: missing": 10}

    def test_categories_that_are_numbers_or_booleans(self) -> None:
        data = DATA.assign(k=pd.Categorical(DATA["k"]), b=pd.Categorical(DATA["b"]))
        design, _ = fit("y ~ k + b + (1 | g)", table(data), CUTS[1])
        assert design.fixed_names[1] == "k[T.0]"
        assert design.fixed_names[-1] == "b[T.True]"

    def test_a_dictionary_that_repeats_values_or_holds_null(self) -> None:
        dictionary = pa.DictionaryArray.from_arrays(
            pa.array([0, 1, 2, 3, None] * 8), pa.array(["b", "a", "b", None])
        )
        data = pa.table({"y": np.arange(40.0), "f": dictionary, "g": np.arange(40) % 5})
        design, batches = fit("y ~ 0 + f + (1 | g)", data)
        assert set(design.levels["f"]) == {"a", "b"}
        assert batches[0].dropped == {"f: missing": 16}

    @pytest.mark.parametrize(
        "type_", [pa.string(), pa.dictionary(pa.int32(), pa.string())], ids=str
    )
    def test_a_comparison_with_text_has_no_limit_of_levels(self, type_: pa.DataType) -> None:
        words = pa.array([f"n{i}" for i in range(3000)] + [None]).cast(type_)
        data = pa.table({"y": np.arange(3001.0), "name": words, "g": np.arange(3001) % 9})
        design, batches = fit("y ~ I(name == 'n7') + (1 | g)", data)
        X = carried(design, batches) @ design.T_fixed
        assert np.flatnonzero(X[:, 1] > 0.5).tolist() == [7]
        assert batches[0].dropped == {"name: missing": 1}

    @pytest.mark.parametrize(
        "type_", [pa.uint64(), pa.float16(), pa.float32(), pa.decimal128(5, 1), pa.bool_()], ids=str
    )
    def test_levels_of_numbers_of_any_type(self, type_: pa.DataType) -> None:
        k = pa.array([0.0, 1.0] * 20).cast(pa.float16() if type_ == pa.float16() else pa.float64())
        data = pa.table({"y": np.arange(40.0), "k": k.cast(type_), "g": np.arange(40) % 7})
        design, _ = fit("y ~ C(k) + (1 | g)", data, [0, 1, 40])
        assert design.levels["k"] == (0, 1)

    def test_many_declared_categories(self) -> None:
        declared = pd.Categorical(DATA["f"], [f"n{i}" for i in range(20_000)] + list("dcba"))
        design, _ = fit("y ~ f + (1 | g)", table(DATA.assign(f=declared)))
        assert design.levels["f"] == tuple("abcd")

    def test_a_boolean_is_a_category_alone_and_a_number_in_arithmetic(self) -> None:
        design, batches = fit("y ~ b + I(b * 2) + I(b) + (1 | g)", table(DATA))
        assert design.fixed_names[1] == "b[T.True]"
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X[:, 2], DATA["b"] * 2, atol=1e-12)

    @pytest.mark.parametrize(
        "values",
        [
            pa.array([dt.date(2020, 1, 1)] * 5),
            pa.array([dt.datetime(2020, 1, 1)] * 5),
            pa.array([dt.timedelta(1)] * 5),
            pa.array([dt.time(1)] * 5),
            pa.array([b"a"] * 5),
            pa.array([[1]] * 5),
            pa.array([{"a": 1}] * 5),
            pa.array([dt.date(2020, 1, 1)] * 5).dictionary_encode(),
        ],
        ids=lambda a: str(a.type),
    )
    @pytest.mark.parametrize("factor", ["day", "C(day)", "log(day)"])
    def test_covariates_of_other_types_are_refused(self, values: pa.Array, factor: str) -> None:
        data = pa.table({"y": np.arange(5.0), "day": values, "g": range(5)})
        with pytest.raises(DataError, match=r"column 'day' has type .*convert it to"):
            specify(parse(f"y ~ {factor} + (1 | g)"), data)

    def test_dates_can_be_groups(self) -> None:
        days = [dt.date(2020, 1, 1 + i % 9) for i in range(N)]
        _, batches = fit("y ~ x + (1 | day)", table(DATA.assign(day=days)))
        assert batches[0].block.n_groups == 9

    def test_text_where_a_number_is_needed(self) -> None:
        for formula in ("f ~ x + (1 | g)", "y ~ log(f) + (1 | g)", "y ~ I(f + 1) + (1 | g)"):
            with pytest.raises(DataError, match=r"column 'f' has type .* where a number is needed"):
                specify(parse(formula), table(DATA))
        with pytest.raises(DataError, match="column 'x' has type double, not text"):
            specify(parse("y ~ I(x == 'a') + (1 | g)"), table(DATA))

    def test_a_type_that_changes_is_named(self) -> None:
        data = table(DATA)
        spec = specify(parse("y ~ x + f + (1 | g)"), data)
        text = data.set_column(1, "x", pa.array(["a"] * N))
        with pytest.raises(
            DataError, match=r"column 'x' has type string \(part 2\) where a number"
        ):
            block(spec, text, 0, "part 2")
        at = data.column_names.index("f")
        with pytest.raises(
            DataError, match=r"column 'f' has type double \(part 2\), but holds cat"
        ):
            block(spec, data.set_column(at, "f", pa.array(np.ones(N))), 0, "part 2")
        with pytest.raises(DataError, match=r"no column 'f' in the data \(part 2\)"):
            block(spec, data.drop(["f"]), 0, "part 2")

    def test_a_column_of_nulls_fits_any_type(self) -> None:
        data = table(DATA)
        spec = specify(parse("y ~ x + f + (1 | g)"), data)
        for name in ("x", "f", "y", "g"):
            at = data.column_names.index(name)
            batch = block(spec, data.set_column(at, name, pa.nulls(N)))
            assert batch.dropped == {f"{name}: missing": N}


class TestOwnFunctions:
    def test_they_are_called_with_arrays(self) -> None:
        def twice(x: np.ndarray, k: float) -> np.ndarray:
            return k * x

        design, batches = fit(
            "twice(y, 1) ~ twice(x, 3):f + log(z) + (twice(x, 2) | g)",
            table(DATA),
            CUTS[1],
            {"twice": twice, "log": lambda z: z},
        )
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X[:, 1], DATA["z"], atol=1e-12)
        np.testing.assert_allclose(X[:, 2:].sum(axis=1), 3 * DATA["x"], atol=1e-12)
        np.testing.assert_allclose(carried(design, batches) @ design.t_response, DATA["y"])

    @pytest.mark.parametrize("context", [["h"], {"h": 3}])
    def test_they_come_by_name(self, context: Any) -> None:
        with pytest.raises(DataError, match="context must map names to functions"):
            specify(parse("y ~ h(x) + (1 | g)", ["h"]), table(DATA), context=context)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x[:3], "must give one number per row"),
            (lambda x: x.astype(str), "must give one number per row"),
            (lambda x: None, "must give one number per row"),
            (lambda x: 1 / 0, "the function 'f' failed: division by zero"),
        ],
    )
    def test_what_they_do_wrong_is_named(self, function: Callable, message: str) -> None:
        with pytest.raises(DataError, match=message):
            fit("y ~ f(x) + (1 | g)", table(DATA), context={"f": function})


class TestMatrix:
    def test_new_rows_are_coded_as_in_the_fit(self) -> None:
        formula = "y ~ poly(x, 2) + scale(z) * f + C(k, Sum) + (1 + h | g)"
        design, _ = fit(formula, table(DATA))
        whole = matrix(design, table(DATA))
        some = DATA.drop(columns="y").iloc[[5, 100, 200]]
        rows = matrix(design, table(some))
        np.testing.assert_array_equal(rows.X, whole.X[[5, 100, 200]])
        np.testing.assert_array_equal(rows.Z[0], whole.Z[0][[5, 100, 200]])
        assert rows.response is None
        np.testing.assert_array_equal(rows.labels.arrays[0].to_numpy()[rows.codes], some["g"])

    def test_an_unseen_level_is_named(self) -> None:
        design, _ = fit("y ~ f + (1 | g)", table(DATA))
        with pytest.raises(
            DataError, match=r"'f' has the level 'new' \(part 1\), which was not in"
        ):
            matrix(design, table(DATA.assign(f="new")), "part 1")

    def test_missing_values_give_nan(self) -> None:
        design, _ = fit("y ~ x + f + (1 + h | g)", table(DATA), offset="z")
        data = DATA.copy()
        data.loc[3, "x"] = np.nan
        data.loc[4, "f"] = None
        data.loc[5, "h"] = None
        data.loc[6, "z"] = np.nan
        data["g"] = data["g"].where(data.index != 7, np.nan)
        rows = matrix(design, table(data))
        assert np.flatnonzero(np.isnan(rows.X).all(axis=1)).tolist() == [3, 4, 5]
        assert np.isnan(rows.offset[6])
        assert rows.codes[7] == -1
        assert np.flatnonzero(~rows.complete).tolist() == [3, 4, 5, 6, 7]

    def test_fixed_part_alone_needs_its_columns_alone(self) -> None:
        design, _ = fit("y ~ x + f + (1 + h | g)", table(DATA), offset="z", weights="z")
        assert design.fixed_columns == ("x", "f")
        rows = matrix(design, table(DATA[["f", "x"]]), groups=False, bars=False)
        assert rows.Z == ()
        assert rows.codes is None
        np.testing.assert_array_equal(rows.X, matrix(design, table(DATA)).X)

    def test_many_rows_are_done_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        design, _ = fit("y ~ x * f * h + (1 | g)", table(DATA))
        expected = matrix(design, table(DATA))
        monkeypatch.setattr("dmixed.design.matrices.CHUNK", 7)
        np.testing.assert_array_equal(matrix(design, table(DATA)).X, expected.X)


class TestLearning:
    def test_constant_columns_have_no_scale(self) -> None:
        data = table(DATA.assign(x=3.0))
        for formula in ("scale(x)", "poly(x, 2)", "standardize(x):f"):
            with pytest.raises(DataError, match="all the same"):
                fit(f"y ~ {formula} + (1 | g)", data)
        assert fit("y ~ center(x) + (1 | g)", data)[0].fixed_names[1] == "center(x)"

    def test_too_few_values_for_a_polynomial(self) -> None:
        data = table(DATA.assign(x=np.arange(N) % 3))
        fit("y ~ poly(x, 2) + (1 | g)", data)
        with pytest.raises(DataError, match="do not differ enough for degree 3"):
            fit("y ~ poly(x, 3) + (1 | g)", data)

    def test_values_that_overflow_are_named(self) -> None:
        data = DATA.copy()
        data.loc[200, "x"] = 1e200
        with pytest.raises(DataError, match="x: values so large that their squares overflow"):
            fit("y ~ x + (1 | g)", table(data))

    def test_a_spline_names_values_out_of_bounds(self) -> None:
        with pytest.raises(DataError, match=r"bs\(x, .*beyond"):
            fit("y ~ bs(x, knots=[2], lower_bound=1, upper_bound=4) + (1 | g)", table(DATA))

    def test_a_column_called_pi(self) -> None:
        data = table(DATA.rename(columns={"x": "pi"}))
        design, batches = fit("y ~ I(pi * z) + (1 | g)", data)
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X[:, 1], DATA["x"] * DATA["z"], atol=1e-12)
        design, batches = fit("y ~ I(pi * z) + (1 | g)", table(DATA))
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X[:, 1], np.pi * DATA["z"], atol=1e-12)

    def test_a_product_of_too_high_degree(self) -> None:
        with pytest.raises(FormulaError, match="total degree"):
            fit("y ~ I(x**7):I(z**7) + (1 | g)", table(DATA))

    def test_a_design_that_is_too_wide(self) -> None:
        i = np.arange(120)
        data = {"y": i * 1.0, "g": i % 7}
        data |= {name: [f"{name}{j}" for j in i % 60] for name in "ab"}
        with pytest.raises(DataError, match="the term a:b makes the design more than 2000"):
            fit("y ~ a:b + (1 | g)", pa.table(data))


class TestSizes:
    """Units of any size are fitted, or refused by name; nothing over- or underflows on the way."""

    @pytest.mark.parametrize("formula", ["x", "f * x", "scale(x)", "poly(x, 3)", "x:z"])
    @pytest.mark.parametrize("exponent", [-150, -100, 100, 149])
    def test_far_units(self, formula: str, exponent: int) -> None:
        unit = 10.0**exponent
        data = DATA.assign(x=DATA["x"] * unit, y=DATA["y"] * unit)
        design, batches = fit(f"y ~ {formula} + (1 | g)", table(data), CUTS[1])
        near, _ = fit(f"y ~ {formula} + (1 | g)", table(DATA), CUTS[1])
        expected = matrix(near, table(DATA)).X
        raw = formula in ("x", "f * x", "x:z")  # the others have no units
        units = [unit if raw and "x" in name else 1.0 for name in near.fixed_names]
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X / units, expected, rtol=1e-9, atol=1e-9)
        y = carried(design, batches) @ design.t_response
        np.testing.assert_allclose(y / unit, DATA["y"], rtol=1e-12)
        assert np.abs(carried(design, batches)).max() < 1e4

    @pytest.mark.parametrize(
        ("change", "formula", "message"),
        [
            ({"x": 1e160}, "x", "x: values so large that their squares overflow"),
            ({"x": 1e305}, "scale(x)", "x: values so large that their squares overflow"),
            ({"x": 1e-160}, "x", "x: values so small that their squares underflow"),
            ({"x": 1e-300}, "f:x", "x: values so small that their squares underflow"),
            ({"x": 1e-320}, "x", "x: values so small that their squares underflow"),
            ({"y": 1e200}, "x", "y: values so large that their squares overflow"),
            ({"y": 1e-200}, "x", "y: values so small that their squares underflow"),
            ({"x": 1e100, "z": 1e100}, "x:z", "x:z: values so large"),
            ({"x": 1e-100, "z": 1e-100}, "x:z", "x:z: values so small"),
            ({"x": 1e-100}, "I(x**2)", r"I\(x \*\* 2\): values so small"),
            ({"x": 1e-110}, "I(x**3)", r"x \*\* 3: values so small"),
            ({"x": 1e110}, "I(x**3)", r"x \*\* 3: values so large"),
            ({}, "exp(200 * x)", r"exp\(200 \* x\): values so large"),
        ],
    )
    def test_beyond_that_is_named(
        self, change: dict[str, float], formula: str, message: str
    ) -> None:
        data = DATA.assign(**{name: DATA[name] * unit for name, unit in change.items()})
        with pytest.raises(DataError, match=f"{message}.*rescale the column"):
            fit(f"y ~ {formula} + (1 | g)", table(data), CUTS[1])

    def test_products_of_far_units_that_cancel(self) -> None:
        data = DATA.assign(x=DATA["x"] * 1e-90, z=DATA["z"] * 1e90)
        design, batches = fit("y ~ 0 + x:z + (1 | g)", table(data))
        X = carried(design, batches) @ design.T_fixed
        np.testing.assert_allclose(X[:, 0], DATA["x"] * DATA["z"], rtol=1e-12)

    @pytest.mark.parametrize("column", ["x", "y"])
    @pytest.mark.parametrize("outlier", [1e90, -1e155, 1e308])
    def test_an_outlier_is_named_with_its_row(self, column: str, outlier: float) -> None:
        data = DATA.copy()
        data.loc[150, "x"] = np.nan
        data.loc[200, column] = outlier
        spec = specify(parse("y ~ x + (1 | g)"), table(data).slice(0, 100))
        message = rf"{column}: values so large .*\({outlier:g} in row 1200 \(part 2\), among"
        with pytest.raises(DataError, match=message.replace("+", r"\+")):
            block(spec, table(data), 1000, "part 2")
        whole = specify(parse("y ~ x + (1 | g)"), table(data.loc[:199]))
        block(whole, table(data.loc[:199]))
        if abs(outlier) > 1e100:
            with pytest.raises(DataError, match=f"{column}: values so large"):
                specify(parse("y ~ x + (1 | g)"), table(data))

    def test_outliers_whose_product_overflows(self) -> None:
        data = DATA.copy()
        data.loc[200, ["x", "z"]] = 1e40
        fit("y ~ x + z + (1 | g)", table(data))
        with pytest.raises(DataError, match="x:z: values so large that their squares overflow"):
            fit("y ~ x:z + (1 | g)", table(data))

    def test_values_lost_next_to_a_pilot_of_zeros(self) -> None:
        data = table(DATA.assign(x=np.where(DATA.index < 100, 0.0, 1e-100)))
        with pytest.raises(DataError, match="x: values so small that their squares underflow"):
            fit("y ~ x + (1 | g)", data)


class TestPilot:
    def test_only_complete_rows_decide(self) -> None:
        data = DATA.copy()
        data.loc[:89, "y"] = np.nan
        data.loc[:89, "x"] = 1e12
        spec = specify(parse("y ~ x + (1 | g)"), table(data).slice(0, 100))
        shift, scale = spec.frame.of("x")
        assert abs(shift - 3) < 4
        assert 0.5 <= scale <= 4

    def test_without_complete_rows_each_column_decides(self) -> None:
        even = DATA.index % 2 == 0
        data = DATA.assign(x=(DATA["x"] + 1e6).where(even), y=DATA["y"].where(~even))
        assert abs(specify(parse("y ~ x + (1 | g)"), table(data)).frame.of("x")[0] - 1e6) < 10


class TestNames:
    @pytest.mark.parametrize(
        ("formula", "name"),
        [
            ("y ~ Intercept + (1 | g)", "Intercept"),
            ("y ~ f + `f[T.b]` + (1 | g)", "f[T.b]"),
            ("y ~ x + (f + `f[T.b]` | g)", "f[T.b]"),
        ],
    )
    def test_two_coefficients_of_one_name(self, formula: str, name: str) -> None:
        data = table(DATA.rename(columns={"big": name}))
        with pytest.raises(DataError, match=rf"columns called '{re.escape(name)}'.*rename the col"):
            fit(formula, data)

    def test_names_may_recur_elsewhere(self) -> None:
        data = table(DATA.rename(columns={"x": "Intercept"}))
        design, _ = fit("y ~ 0 + Intercept + (1 | g) + (0 + Intercept | g)", data)
        assert design.fixed_names == design.bars[0].names == design.bars[1].names == ("Intercept",)
