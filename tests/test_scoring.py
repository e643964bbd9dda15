"""`to_sql`: the statement is run in DuckDB and SQLite and compared with `predict`."""

from __future__ import annotations

import sqlite3

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dmixed
from dmixed.errors import DataError, NotSupportedError
from dmixed.formula.vocabulary import ELEMENTWISE

duckdb = pytest.importorskip("duckdb")
pytest.importorskip("sqlglot")

CLOSE = 1e-12
"""Relative to the largest term of a sum: SQL adds the same numbers in another order."""


def rows(seed: int, n: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "x": rng.normal(3, 1, n),
            "z": rng.uniform(0.5, 4, n),
            "k": rng.integers(0, 9, n),
            "f": rng.choice(["a", "b", "it's", 'c "d"'], n),
            "b": rng.integers(0, 2, n).astype(bool),
            "year": rng.choice([2020, 2021, 2022], n),
            "w": rng.uniform(1, 2, n),
            "o": rng.normal(size=n),
            "g": rng.integers(0, 25, n),
            "h": rng.integers(0, 3, n),
            "school": rng.choice(["o'Neil", 'a "b"', "plain", "naïve 学"], n),
        }
    )
    effect = np.random.default_rng(1).normal(size=(25, 3))
    g = frame["g"].to_numpy()
    frame["y"] = frame["x"] * (1 + effect[g, 0]) + effect[g, 1] + rng.normal(size=n)
    frame["y"] += effect[g, 2] * frame["z"] + (frame["f"] == "b") + frame["h"] * frame["b"]
    return frame


def new_rows(seed: int = 9) -> pd.DataFrame:
    """Rows with unknown and missing groups and missing covariates."""
    frame = rows(seed, 60)
    frame["g"] = frame["g"].astype("Int64")
    frame.loc[:4, "g"] = 99
    frame.loc[5:8, "g"] = pd.NA
    frame.loc[9:11, "x"] = np.nan
    frame.loc[12, "f"] = None
    frame.loc[13, "x"] = np.inf
    frame.loc[14:16, "school"] = "nowhere"
    return frame


def tables(result: dmixed.MixedLMResults) -> dict[str, pd.DataFrame]:
    found = result.ranef_table()
    return found if isinstance(found, dict) else {"only": found}


def in_duckdb(sql: str, data: pd.DataFrame, blups: dict[str, pd.DataFrame]) -> np.ndarray:
    with duckdb.connect() as db:
        for name, table in {"new_data": data.assign(row=range(len(data))), **blups}.items():
            db.register("frame", table)
            quoted = name.replace('"', '""')
            db.execute(f'CREATE TABLE "{quoted}" AS SELECT * FROM frame')
            db.unregister("frame")
        found = db.execute(f"SELECT * FROM ({sql}) AS scored ORDER BY row").df()
    assert len(found) == len(data)
    return found["predicted"].to_numpy(np.float64, na_value=np.nan)


def in_sqlite(sql: str, data: pd.DataFrame, blups: dict[str, pd.DataFrame]) -> np.ndarray:
    db = sqlite3.connect(":memory:")
    try:
        for name, table in {"new_data": data.assign(row=range(len(data))), **blups}.items():
            table.to_sql(name, db, index=False)
        found = pd.read_sql_query(f"SELECT * FROM ({sql}) AS scored ORDER BY row", db)
    finally:
        db.close()
    assert len(found) == len(data)
    return found["predicted"].to_numpy(np.float64, na_value=np.nan)


ENGINES = {"duckdb": in_duckdb, "sqlite": in_sqlite}


def check(result: dmixed.MixedLMResults, data: pd.DataFrame, dialects=tuple(ENGINES)) -> None:
    """Both ways of prediction in every engine give what `predict` gives."""
    own = tables(result)
    names = {label: f"ranef of {label}" for label in own}
    effects = names if len(own) > 1 else "ranef of only"
    blups = {names[label]: table for label, table in own.items()}
    for groups in (True, False):
        expected = result.predict(data, groups=groups).to_numpy()
        for dialect in dialects:
            sql = result.to_sql(dialect, groups=groups, effects=effects)
            found = ENGINES[dialect](sql, data, blups if groups else {})
            np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), dialect)
            scale = np.nanmax(np.abs(expected))
            np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE * scale)


@pytest.mark.parametrize(
    "formula",
    [
        "y ~ x + (1 | g)",
        "y ~ x * f + (1 + x + z | g)",
        "y ~ poly(x, 3) + scale(z) + (1 + scale(z) || g)",
        "y ~ 0 + f + f:x + (x | g)",
        "y ~ C(year) * b + I(x**2) + center(x):z + (1 | g)",
        "y ~ C(f, contr.sum) + C(year, contr.poly) + (1 | g)",
        "y ~ C(x > 3) + I(f == 'it\\'s') + I(z > x) + (0 + b | g)",
        "y ~ x + (x | g) + (1 | school)",
        "y ~ f + (1 + x | g/h)",
        "y ~ x + (1 | g:h)",
        "y ~ x + (1 + f | g)",
        "y ~ 1 + (1 | school)",
    ],
)
def test_predictions_are_the_same(formula: str) -> None:
    result = dmixed.lmer(formula, rows(0))
    check(result, new_rows())


EXPRESSIONS = [
    "log(z)", "log2(z)", "log10(z)", "log1p(z - 0.5)", "log1p(z / 1e9)", "expm1(z / 1e9)",
    "expm1(x)", "exp(z)", "exp2(z)", "exp10(z)", "sqrt(z)",
    "cbrt(x)", "square(x)", "reciprocal(z)", "1 / z", "z ** 0.5", "z ** -0.5", "z ** -2",
    "z ** 1.5", "abs(x - 3)", "sign(x - 3)", "floor(x)", "ceil(x)", "trunc(x)", "rint(x * 2)",
    "round(x)", "round(x, 2)", "round(100 * x, -1)", "sin(x)", "cos(x)", "tan(z / 4)",
    "arcsin(z / 5)", "arccos(z / 5)", "arctan(x)", "arctan2(x, z)", "hypot(x, z)", "sinh(z)",
    "cosh(z)", "tanh(z)", "degrees(x)", "radians(x)", "minimum(x, z)", "maximum(x, z)",
    "clip(x, 2, 4)", "where(x > 3, z, x)", "logical_and(k, b)", "logical_or(k > 3, b)",
    "logical_not(k)", "k % 3", "k // 2", "mod(x, 2)", "x // 1", "less(x, z)", "(x > z) * z",
    "negative(sqrt(z))", "log(x**2 + z)", "exp(log(z) - sqrt(abs(x)))", "z ** 0 + log(z)",
]  # fmt: skip


@pytest.mark.parametrize("start", range(0, len(EXPRESSIONS), 8))
def test_functions(start: int) -> None:
    for text in EXPRESSIONS[start : start + 8]:
        result = dmixed.lmer(f"y ~ I({text}) + (1 | g)", rows(0))
        assert not result.aliased, text
        check(result, new_rows())


def test_every_word_is_written_or_refused() -> None:
    one = {n for n, e in ELEMENTWISE.items() if e.arguments[0] == 1}
    two = {n for n, e in ELEMENTWISE.items() if e.arguments[0] == 2}
    data, refused = rows(0), set()
    for name in sorted(one | two):
        second = "2" if any(x in name for x in ("div", "mod", "rem", "power")) else "z"
        inner = "z / 5 - 0.01" if name in ("arctanh", "atanh") else "z / 5"
        inner = "z + 1" if name in ("arccosh", "acosh") else inner
        inner = f"{inner}, {second}" if name in two else inner
        text = f"{name}({inner})"
        result = dmixed.lmer(f"y ~ {text} + (1 | g)", data)
        try:
            result.to_sql("duckdb")
        except NotSupportedError as error:
            refused.add(name if name in str(error) else text)
            continue
        check(result, data.head(40))
    assert refused == {
        "acosh", "arccosh", "arcsinh", "arctanh", "asinh", "atanh", "copysign", "fmax",
        "fmin", "fmod", "heaviside", "logaddexp", "logaddexp2", "logical_xor",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("formula", "culprit"),
    [
        ("y ~ bs(x, knots=[3], lower_bound=-3, upper_bound=9) + (1 | g)", "bs(x"),
        ("y ~ own(x) + (1 | g)", "own(x)"),
        ("y ~ log(own(x)) + (1 | g)", "own(x)"),
        ("y ~ I(z ** x) + (1 | g)", "z ** x"),
        ("y ~ I(x % z) + (1 | g)", "x % z"),
        ("y ~ x + arctanh(z / 9) + (1 | g)", "arctanh(z / 9)"),
    ],
)
def test_what_sql_has_no_word_for_is_named(formula: str, culprit: str) -> None:
    context = {"own": np.exp} if "own" in formula else None
    result = dmixed.lmer(formula, rows(0), context=context)
    with pytest.raises(NotSupportedError) as caught:
        result.to_sql()
    assert culprit in str(caught.value)


def test_nested_functions_do_not_explode() -> None:
    text = "z"
    for _ in range(20):
        text = f"round({text} + 0.1)"
    result = dmixed.lmer(f"y ~ {text} + (1 | g)", rows(0))
    with pytest.raises(NotSupportedError, match="too long"):
        result.to_sql()


def test_weights_and_offset() -> None:
    data = new_rows()
    data.loc[20, "o"] = np.nan
    check(dmixed.lmer("y ~ x + (x | g)", rows(0), weights="w", offset="o"), data)


def test_aliased_columns_and_components() -> None:
    check(dmixed.lmer("y ~ x + I(2 * x) + z + (1 | g)", rows(0)), new_rows())
    split = dmixed.mixedlm("y ~ x", rows(0), groups="g", vc_formula={"part": "0 + C(h)"}).fit()
    with pytest.raises(NotSupportedError, match="part"):
        split.to_sql()
    assert "LEFT JOIN" not in split.to_sql(groups=False)


def test_keys_and_columns_of_one_name() -> None:
    data = rows(0).rename(columns={"g": "rows"})
    check(dmixed.lmer("y ~ x + (0 + x | rows)", data), data)
    data = rows(0).assign(g=lambda t: t["g"] + 1.0)
    check(dmixed.lmer("y ~ x + (0 + g | g)", data), data)


def test_a_level_that_the_fit_has_not_seen_is_null() -> None:
    result = dmixed.lmer("y ~ x + f + (1 | g)", rows(0))
    data = rows(3, 10)
    data.loc[2, "f"] = "new"
    for dialect, run in ENGINES.items():
        found = run(result.to_sql(dialect), data, {"ranef": result.ranef_table()})
        assert np.flatnonzero(np.isnan(found)).tolist() == [2]


def test_names_from_anywhere() -> None:
    nasty = 'x"; DROP TABLE new_data; --'
    data = rows(0).rename(columns={"x": nasty, "z": "a b'c", "g": 'key "1"'})
    data["f"] = data["f"].replace("a", "'; DROP TABLE new_data; --")
    formula = f'y ~ `{nasty}` * f + log(`a b\'c`) + (1 + `{nasty}` | `key "1"`)'
    check(dmixed.lmer(formula, data), data)
    result = dmixed.lmer(formula, data)
    sql = result.to_sql("duckdb", table='t"; DROP', effects='r"; DROP')
    assert '"t""; DROP" AS' in sql
    assert '"r""; DROP" AS' in sql
    assert '"s"."t" AS' in result.to_sql("postgres", table=("s", "t"))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6),
             min_size=2, max_size=5, unique=True),
    st.integers(0, 2**16),
)  # fmt: skip
def test_any_levels_and_labels(labels: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rows(seed, 200)
    data["f"] = rng.choice(labels, 200)
    data["school"] = rng.choice(labels, 200)
    result = dmixed.lmer("y ~ x + f + (1 | school)", data)
    check(result, data.head(50))


@pytest.mark.parametrize("dialect", ["ansi", "postgres", "snowflake", "bigquery", "mysql", "tsql"])
def test_dialects_that_are_not_run_can_be_parsed(dialect: str) -> None:
    import sqlglot

    sql = dmixed.lmer("y ~ x * f + log(z) + (x | g)", rows(0)).to_sql(dialect)
    assert sqlglot.parse_one(sql, dialect="" if dialect == "ansi" else dialect)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dialect": "nosuch"}, "dialect='nosuch'"),
        ({"table": ("a", "b", "c", "d")}, "table="),
        ({"table": ""}, "cannot be a name"),
        ({"effects": {"h": "t"}}, "effects="),
    ],
)
def test_arguments_that_make_no_sense(options: dict, words: str) -> None:
    result = dmixed.lmer("y ~ x + (x | g)", rows(0))
    with pytest.raises(DataError, match=words):
        result.to_sql(**options)
