"""Several grouping factors and variance components: keys, random columns, their names, cells."""

from __future__ import annotations

import datetime as dt
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_design import CUTS, DATA, N, carried, fit, table

from dmixed import keys
from dmixed.blocks import CONSTANT, RESPONSE, Column
from dmixed.cellmoments import CellMoments, merge, parts_moments
from dmixed.design import Design, DesignSpec, block, component_column, matrix, specify
from dmixed.errors import DataError, MissingDataError, NotSupportedError
from dmixed.formula import ParsedFormula, parse, parse_parts
from dmixed.sources import open_source


def components(re_formula: str | None = None, groups: Any = "g", **parts: str) -> ParsedFormula:
    """A model with variance components."""
    return parse_parts("y ~ x", groups, re_formula, vc_formula=parts)


def spec_of(formula: str | ParsedFormula, **options: Any) -> DesignSpec:
    parsed = parse(formula) if isinstance(formula, str) else formula
    return pickle.loads(pickle.dumps(specify(parsed, table(DATA), **options)))


def terms(spec: DesignSpec) -> list[tuple[int, tuple[int, ...], list[str], tuple[int, ...]]]:
    """Terms of a spec, their products as text."""
    return [
        (
            term.block,
            term.key,
            [":".join(factor.text for factor, _ in product) or "1" for product in term.products],
            term.reduced,
        )
        for term in spec.terms
    ]


class TestBars:
    @pytest.mark.parametrize(
        ("formula", "names", "expected"),
        [
            ("(x | g)", ("g",), [(0, (0,), ["1", "x"], ())]),
            ("(1 | g:h)", ("g", "h"), [(0, (0, 1), ["1"], ())]),
            ("(1 | g) + (1 | h)", ("g", "h"), [(0, (0,), ["1"], ()), (1, (1,), ["1"], ())]),
            (
                "(x | g/h)",
                ("g", "h"),
                [(0, (0,), ["1", "x"], ()), (1, (1, 0), ["1", "x"], ())],
            ),
            (
                "(1 | h:g) + (0 + x | g) + (0 + x | g:h) + (0 + f | `my col`)",
                ("h", "g", "my col"),
                [
                    (0, (0, 1), ["1"], ()),
                    (1, (1,), ["x"], ()),
                    (2, (0, 1), ["x"], ()),
                    (3, (2,), ["f"], ()),
                ],
            ),
        ],
    )
    def test_keys_and_terms(self, formula: str, names: tuple[str, ...], expected: list) -> None:
        spec = spec_of(f"y ~ x + {formula}")
        assert spec.group == tuple(key.name for key in spec.keys) == names
        assert terms(spec) == expected

    def test_columns_labels_and_names(self) -> None:
        formula = "y ~ x + (1 + x | g) + (1 | h) + (0 + z | g) + (0 + f | g:h) + (0 + x | h:g)"
        for cuts in CUTS:
            design, batches = fit(formula, table(DATA), cuts)
            F = carried(design, batches)
            assert [bar.label for bar in design.bars] == ["g", "h", "g.1", "g:h", "g:h.1"]
            assert {bar.component for bar in design.bars} == {None}
            rows = matrix(design, table(DATA), response=True)
            expected = [
                np.column_stack([np.ones(N), DATA["x"]]),
                np.ones((N, 1)),
                DATA[["z"]],
                pd.get_dummies(DATA["f"]),
                DATA[["x"]],
            ]
            random = {
                design.columns.index(b.columns[i])
                for b in [x.block for x in batches]
                for i in b.random
            }
            for term, bar, Z, wanted in zip(
                design.terms, design.bars, rows.Z, expected, strict=True
            ):
                assert term.names == bar.names
                assert tuple(component_column(term, "??", j) for j in range(len(term.names))) == (
                    term.names
                )
                np.testing.assert_allclose(F @ term.T, wanted, atol=1e-12)
                np.testing.assert_allclose(Z, wanted, atol=1e-12)
                assert set(np.flatnonzero(term.T.any(axis=1))) <= random
            assert design.T_unmet.shape == (0, 2 + 2 + 1 + 1 + 4 + 1)
            assert rows.labels is not None
            assert rows.codes is not None
            assert rows.labels.names == ("g", "h")
            cells = rows.labels.take(rows.codes)
            np.testing.assert_array_equal(cells.arrays[0], DATA["g"])
            np.testing.assert_array_equal(cells.arrays[1], DATA["h"])

    def test_constant_is_the_first_random_column(self) -> None:
        _, batches = fit("y ~ x + (0 + z | g) + (0 + f | h)", table(DATA))
        made = batches[0].block
        assert made.columns[made.random[0]] == CONSTANT

    def test_a_key_may_be_a_fixed_covariate_too(self) -> None:
        design, batches = fit("y ~ h + C(k) + x + (1 | h:g) + (1 | k) + (1 | x)", table(DATA))
        assert batches[0].labels.names == ("h", "g", "k", "x")
        assert design.fixed_columns == ("h", "k", "x")
        rows = matrix(design, table(DATA))
        np.testing.assert_allclose(rows.X[:, -1], DATA["x"], atol=1e-12)
        assert rows.labels is not None
        assert rows.codes is not None
        np.testing.assert_array_equal(rows.labels.take(rows.codes).arrays[3], DATA["x"])
        alone = matrix(design, table(DATA[["h", "k", "x"]]), groups=False, bars=False)
        np.testing.assert_array_equal(alone.X, rows.X)

    def test_specs_of_other_keys_do_not_add(self) -> None:
        one = spec_of("y ~ x + (1 | g) + (1 | h)")
        assert one.compatible(spec_of("y ~ x + (1 | g) + (1 | h)"))
        for other in ("(1 | g)", "(1 | g) + (1 | g:h)", "(1 | g:h)", "(1 | h) + (1 | g)"):
            assert not one.compatible(spec_of(f"y ~ x + {other}"))
        reduced = [spec_of(components(v=text)) for text in ("0 + C(f)", "1 + C(f)")]
        assert not reduced[0].compatible(reduced[1])


class TestComponents:
    @pytest.mark.parametrize(
        ("text", "names", "expected"),
        [
            ("0 + C(f)", ("g", "f"), [(0, (0, 1), ["1"], ())]),
            ("0 + f", ("g", "f"), [(0, (0, 1), ["1"], ())]),
            ("0 + `my col`:C(`my col`)", ("g", "my col"), [(0, (0, 1), ["`my col`"], ())]),
            ("0 + x", ("g",), [(0, (0,), ["x"], ())]),
            ("0 + x + z", ("g",), [(0, (0,), ["x", "z"], ())]),
            ("1", ("g",), [(0, (0,), ["1"], ())]),
            ("0 + C(f):x", ("g", "f"), [(0, (0, 1), ["x"], ())]),
            ("0 + C(f):C(h)", ("g", "f", "h"), [(0, (0, 1, 2), ["1"], ())]),
            ("1 + C(f)", ("g", "f"), [(0, (0,), ["1"], ()), (0, (0, 1), ["1"], (1,))]),
            (
                "C(f) * x",
                ("g", "f"),
                [(0, (0,), ["1", "x"], ()), (0, (0, 1), ["1", "x"], (1,))],
            ),
            (
                "0 + C(f) + h",
                ("g", "f", "h"),
                [(0, (0, 1), ["1"], ()), (0, (0, 2), ["1"], (2,))],
            ),
            ("0 + C(x > 3)", ("g", "x > 3"), [(0, (0, 1), ["1"], ())]),
            ("0 + C(g)", ("g",), [(0, (0,), ["1"], ())]),
            ("0 + C(f, Treatment('b'))", ("g", "f"), [(0, (0, 1), ["1"], ())]),
            ("1 + C(f, Treatment)", ("g", "f"), [(0, (0,), ["1"], ()), (0, (0, 1), ["1"], (1,))]),
        ],
    )
    def test_keys_and_terms(self, text: str, names: tuple[str, ...], expected: list) -> None:
        spec = spec_of(components(v=text))
        assert spec.group == names
        assert terms(spec) == expected

    def test_beside_random_coefficients(self) -> None:
        design, _ = fit(components("~x", ["g", "h"], a="0 + C(f)", b="0 + x"), table(DATA))
        assert design.spec.group == ("g", "h", "f")
        assert [(t.block, t.key, t.names) for t in design.terms] == [
            (0, (0, 1), ("Intercept", "x")),
            (1, (0, 1, 2), ("Intercept",)),
            (2, (0, 1), ("x",)),
        ]
        assert [(b.label, b.names, b.component) for b in design.bars] == [
            ("g:h", ("Intercept", "x"), None),
            ("a", (), "a"),
            ("b", (), "b"),
        ]
        assert design.bars[1].text == "a: 0 + C(f)"

    def test_categories_of_a_component_are_not_carried(self) -> None:
        _, batches = fit(components(a="0 + C(f):x", b="0 + h"), table(DATA))
        made = batches[0].block
        assert set(made.columns) == {
            CONSTANT,
            Column((), (("x", 1),)),
            Column((), ((RESPONSE, 1),)),
        }
        assert [made.columns[i].powers for i in made.random] == [(), (("x", 1),)]

    @pytest.mark.parametrize(
        ("text", "names"),
        [  # as statsmodels (patsy) names them
            ("0 + C(f)", ["C(f)[L]"]),
            ("0 + f", ["f[L]"]),
            ("0 + b", ["b[L]"]),
            ("0 + C(f):x", ["C(f)[L]:x"]),
            ("0 + x:C(f)", ["x:C(f)[L]"]),
            ("1 + C(f)", ["Intercept", "C(f)[T.L]"]),
            ("C(f) * x", ["Intercept", "x", "C(f)[T.L]", "C(f)[T.L]:x"]),
            ("0 + C(f):C(h)", ["C(f)[L]:C(h)[M]"]),
            ("0 + x + z", ["x", "z"]),
            ("0 + C(f):poly(x, 2)", ["C(f)[L]:poly(x, 2)[1]", "C(f)[L]:poly(x, 2)[2]"]),
            ("0 + C(x > 3)", ["C(x > 3)[L]"]),
            ("0 + `{}`", ["{}[L]"]),
            ("0 + C(g)", ["C(g)[G]"]),
        ],
    )
    def test_names(self, text: str, names: list[str]) -> None:
        data = table(DATA.assign(**{"{}": DATA["f"]}))
        design, _ = fit(components(v=text), data)
        found = [
            component_column(term, ["G", "L", "M"][: len(term.key)], j)
            for term in design.terms
            for j in range(len(term.names))
        ]
        assert found == names

    @pytest.mark.parametrize(
        ("values", "names"),
        [
            ([0.0, 1.5], ["C(v)[0.0]", "C(v)[1.5]"]),
            ([0, 3], ["C(v)[0]", "C(v)[3]"]),
            ([False, True], ["C(v)[False]", "C(v)[True]"]),
            (["b", "a"], ["C(v)[b]", "C(v)[a]"]),
            ([dt.date(2020, 1, 2), None], ["C(v)[2020-01-02]"]),
        ],
    )
    def test_levels_in_names(self, values: list, names: list[str]) -> None:
        data = pa.table({"y": np.arange(40.0), "x": np.arange(40.0) % 7, "v": values * 20})
        data = data.append_column("g", pa.array(np.repeat(range(4), 10)))
        design, batches = fit(components(v="0 + C(v)"), data)
        (term,) = design.terms
        _, labels = keys.subset(batches[0].labels, term.key)
        found = [
            component_column(term, levels, 0)
            for levels in zip(*(a.to_pylist() for a in labels.arrays), strict=True)
        ]
        assert found[: len(names)] == names

    def test_columns(self) -> None:
        formula = components("1", a="0 + C(f):x", b="0 + poly(z, 2)", c="1 + h")
        for cuts in CUTS:
            design, batches = fit(formula, table(DATA), cuts)
            F = carried(design, batches)
            rows = matrix(design, table(DATA))
            assert [t.block for t in design.terms] == [0, 1, 2, 3, 3]
            assert [t.reduced for t in design.terms] == [(), (), (), (), (2,)]
            for term, Z in zip(design.terms, rows.Z, strict=True):
                np.testing.assert_allclose(F @ term.T, Z, atol=1e-12)
            np.testing.assert_allclose(rows.Z[1][:, 0], DATA["x"], atol=1e-14)
            np.testing.assert_allclose(rows.Z[2].T @ rows.Z[2], np.eye(2), atol=1e-12)
            np.testing.assert_array_equal(rows.Z[4], np.ones((N, 1)))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1 + C(f, Sum)", r"component 'v': C\(f, Sum\): contrasts .* write 0 \+ C\(f\)"),
            ("0 + C(f, Sum)", r"component 'v': C\(f, Sum\): contrasts other than treatment"),
            ("1 + C(f, contr.SAS)", r"component 'v': C\(f, contr.SAS\): contrasts"),
            ("1 + C(f, Treatment('b'))", "whose base is the first level of each group"),
            ("0 + C(f, levels=['a', 'b'])", r"component 'v': C\(f, levels=.*leave it out"),
        ],
    )
    def test_contrasts_without_meaning_in_a_group(self, text: str, message: str) -> None:
        with pytest.raises(NotSupportedError, match=message):
            spec_of(components(v=text))

    def test_what_is_not_in_the_data_is_named(self) -> None:
        with pytest.raises(DataError, match="no column 'cask', which the formula uses"):
            spec_of(components(v="0 + C(cask)"))
        with pytest.raises(DataError, match=r"column 'f' has type .* where a number is needed"):
            spec_of(components(v="0 + C(f > 3)"))
        lists = table(DATA).append_column("list", pa.array([[1]] * N))
        with pytest.raises(DataError, match=r"column 'list' has type list.*cannot be a group key"):
            fit(components(v="0 + C(list)"), lists)

    def test_two_columns_of_one_name(self) -> None:
        data = table(DATA.rename(columns={"z": "Intercept"}))
        with pytest.raises(DataError, match=r"v: 1 .*2 columns called 'Intercept'.*rename"):
            fit(components(v="1 + Intercept"), data)


class TestMissing:
    def test_rows_without_a_key_are_dropped_and_counted_once(self) -> None:
        data = DATA.copy()
        data.loc[3, "y"] = np.nan
        data["g"] = data["g"].where(~data.index.isin([3, 5]))
        data["h"] = data["h"].where(~data.index.isin([5, 6]), None)
        data["f"] = data["f"].where(data.index != 7, None)
        data.loc[8, "z"] = np.nan  # hidden by fmax
        data.loc[9, "big"] = -1.0  # its logarithm is NaN
        formula = components(
            "1", v="0 + C(f):h", w="0 + C(fmax(z, 1.5))", u="0 + C(round(log(big)))"
        )
        for cuts in CUTS:
            design, batches = fit(formula, table(data), cuts)
            total: dict[str, int] = {}
            for batch in batches:
                for reason, rows in batch.dropped.items():
                    total[reason] = total.get(reason, 0) + rows
            assert total == {
                "y: missing": 1,
                "g: missing": 1,
                "h: missing": 1,
                "f: missing": 1,
                "z: missing": 1,
                "round(log(big)): missing": 1,
            }
            rows = matrix(design, table(data), response=True)
            assert np.flatnonzero(~rows.complete).tolist() == [3, 5, 6, 7, 8, 9]
        spec = specify(formula, table(data), missing="raise")
        with pytest.raises(MissingDataError, match="y: missing in row 3"):
            block(spec, table(data))
        with pytest.raises(MissingDataError, match="z: missing in row 1 "):
            block(spec, table(data.loc[7:].assign(f="a")), where="part 1")

    def test_an_expression_may_have_many_levels(self) -> None:
        n = 12_000
        data = pa.table({"y": np.arange(n) * 1.0, "x": np.sin(np.arange(n)), "g": np.arange(n) % 9})
        _, batches = fit(components(v="0 + C(2 * x)"), data)
        assert batches[0].block.n_groups == n


def moments_of(spec: DesignSpec, *frames: pd.DataFrame, apart: bool = True) -> CellMoments:
    """Moments of frames that are read apart, or one after the other into one state."""
    parts = [(part, 0) for frame in frames for part in open_source(frame).parts(spec.columns)]
    if not apart:
        return parts_moments(spec, parts)
    return merge([parts_moments(spec, [part]) for part in parts])


class TestCells:
    @pytest.mark.parametrize(
        ("formula", "by"),
        [
            ("y ~ x + (1 | g) + (x | h)", ["g", "h"]),
            ("y ~ x + (x | g/h)", ["g", "h"]),
            ("y ~ x + (1 | k)", ["k"]),
            ("y ~ x + f + (1 | g) + (1 | f) + (0 + x | k)", ["g", "f", "k"]),
            (components("1", v="0 + C(f)", w="0 + x:C(k)"), ["g", "f", "k"]),
            (components(v="0 + C(x > 3)"), ["g", "x > 3"]),
        ],
    )
    @pytest.mark.parametrize("apart", [True, False])
    def test_they_are_what_pandas_groups_by(
        self, formula: str | ParsedFormula, by: list[str], apart: bool
    ) -> None:
        spec = spec_of(formula)
        data = DATA.assign(**{"x > 3": DATA["x"] > 3, "xy": DATA["x"] * DATA["y"]})
        moments = moments_of(spec, data[:100], data[100:101], data[101:], apart=apart)
        expected = data.groupby(by)[["y", "x", "xy"]].agg(["size", "sum"])
        index = keys.to_pandas(moments.labels)
        assert len(index) == len(expected)
        assert list(index.names) == by
        expected = expected.loc[index]
        design = moments.design
        group = moments.group
        np.testing.assert_array_equal(group.counts, expected["y", "size"])
        x = design.T_fixed[:, design.fixed_names.index("x")]
        W = group.WtF[:, 0]  # the constant
        np.testing.assert_allclose(W @ design.t_response, expected["y", "sum"], atol=1e-10)
        np.testing.assert_allclose(W @ x, expected["x", "sum"], atol=1e-10)
        at = list(group.random)
        if not x[[i for i in range(len(x)) if i not in at]].any():  # x is a random column too
            xy = np.einsum("i,gij,j->g", x[at], group.WtF, design.t_response)
            np.testing.assert_allclose(xy, expected["xy", "sum"], atol=1e-9)

    def test_levels_of_each_factor(self) -> None:
        """What follows the pass: cells to levels of each term."""
        moments = moments_of(spec_of("y ~ x + (x | g/h)"), DATA[:50], DATA[50:])
        design: Design = moments.design
        for term, by in zip(design.terms, (["g"], ["h", "g"]), strict=True):
            codes, labels = keys.subset(moments.labels, term.key)
            counts = np.bincount(codes, moments.group.counts)
            index = keys.to_pandas(labels)
            expected = DATA.groupby(by).size()
            assert len(labels) == len(expected)
            np.testing.assert_array_equal(counts, expected.loc[index])

    @pytest.mark.parametrize("formula", ["y ~ x + (x | g)", "y ~ x + (1 | g) + (1 | h)"])
    def test_parts_may_be_read_into_one_state(self, formula: str) -> None:
        """Integer keys that a later part puts between those of an earlier one too."""
        spec = spec_of(formula)
        frames = [DATA[DATA["g"] % 3 == j] for j in (1, 0, 2)]
        one = moments_of(spec, *frames, apart=False)
        whole = moments_of(spec, DATA)
        _, (at, order) = keys.align([one.labels, whole.labels])
        np.testing.assert_array_equal(at, np.arange(len(one.labels)))
        np.testing.assert_allclose(one.group.WtF[order], whole.group.WtF, atol=1e-10)
        np.testing.assert_array_equal(one.group.counts[order], whole.group.counts)
