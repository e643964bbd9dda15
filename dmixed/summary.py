"""Summary of a fit in statsmodels' layout, in the user's units, with every flag in words."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from dmixed.covariance import singular_parts
from dmixed.errors import DataError
from dmixed.tabular import (
    RULE,
    WIDTH,
    html_pairs,
    html_table,
    latex_pairs,
    latex_table,
    latex_text,
    ruled,
    text_pairs,
    text_table,
)

__all__ = [
    "WIDTH",
    "Summary",
    "few_rows",
    "held_at_zero",
    "quantile",
    "singularities",
    "summarise",
]

INLINE = 3
"""Columns of a bar whose correlations stand beside their variances."""

DIGITS = 6
"""Decimal digits of the criterion lost to rounding that are still not worth a word."""

TITLE = "Mixed Linear Model Regression Results"
"""Title of a summary, as in statsmodels."""


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """What a reader needs of a fit. All cells are text; estimates have six significant digits.

    Attributes
    ----------
    title
        one line
    header
        four columns: label, value, label, value
    model
        labels and values that need more room: the formula
    coefficients
        fixed effects, then the variance parameters in user units, by name
    random
        variances, standard deviations and correlations of the random effects by group
    notes
        sentences: what was dropped, flagged, or needs care
    correlations
        a title and a lower triangle per bar, where a bar has more than `INLINE` columns
    """

    title: str
    header: pd.DataFrame
    model: tuple[tuple[str, str], ...]
    coefficients: pd.DataFrame
    random: pd.DataFrame
    notes: tuple[str, ...] = ()
    correlations: tuple[tuple[str, pd.DataFrame], ...] = ()

    @property
    def tables(self) -> list[pd.DataFrame]:
        """Copies: header, coefficients, random effects, then any tables of correlations."""
        wide = [(label, value, "", "") for label, value in self.model]
        header = pd.concat([self.header, pd.DataFrame(wide, columns=range(4))], ignore_index=True)
        others = [self.coefficients, self.random, *(table for _, table in self.correlations)]
        return [header, *(table.copy() for table in others)]

    def as_text(self) -> str:
        """Plain text of at most `WIDTH` characters a line."""
        random = [RULE, "Random effects", *text_table(self.random)]
        for title, table in self.correlations:
            random += ["", *textwrap.wrap(title, WIDTH), *text_table(table)]
        natural = [*text_pairs(self.header, self.model), *text_table(self.coefficients), *random]
        titles = textwrap.wrap(self.title, WIDTH)
        width = max(map(len, [*titles, *natural]))
        body = [*text_pairs(self.header, self.model, width), RULE]
        body += [*text_table(self.coefficients, width, rule=True), *random]
        edge = "=" * width
        notes: list[str] = []
        for note in self.notes:
            notes += textwrap.wrap(note, WIDTH, initial_indent="* ", subsequent_indent="  ")
        top = [line.center(width).rstrip() for line in titles]
        return "\n".join([*top, edge, ruled([*body, edge]), *notes])

    def as_html(self) -> str:
        """The same as HTML."""
        model = "".join(
            f"<p>{html.escape(label)} {html.escape(value)}</p>\n" for label, value in self.model
        )
        correlations = "".join(
            f"<h5>{html.escape(title)}</h5>\n{html_table(table)}"
            for title, table in self.correlations
        )
        notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in self.notes)
        return (
            f"<h3>{html.escape(self.title)}</h3>\n{html_pairs(self.header)}{model}"
            f"{html_table(self.coefficients)}<h4>Random effects</h4>\n{html_table(self.random)}"
            f"{correlations}" + (f"<ul>\n{notes}</ul>\n" if notes else "")
        )

    def as_latex(self, label: str = "") -> str:
        """The same as a LaTeX table, which needs no packages; ``label`` is for references."""
        model = "\n\n".join(
            f"{latex_text(name)} \\texttt{{{latex_text(value)}}}" for name, value in self.model
        )
        correlations = "".join(
            f"{latex_text(title)}\n{latex_table(table)}" for title, table in self.correlations
        )
        notes = "".join(f"\\item {latex_text(note)}\n" for note in self.notes)
        return (
            f"\\begin{{table}}\n\\caption{{{latex_text(self.title)}}}\n\\label{{{label}}}\n"
            f"{latex_pairs(self.header)}{model}\n{latex_table(self.coefficients)}"
            f"Random effects\n{latex_table(self.random)}{correlations}"
            + (f"\\begin{{itemize}}\n{notes}\\end{{itemize}}\n" if notes else "")
            + "\\end{table}\n"
        )

    def __str__(self) -> str:
        return self.as_text()

    def __repr__(self) -> str:
        return self.as_text()

    def _repr_html_(self) -> str:
        return self.as_html()


def quantile(alpha: float) -> float:
    """Normal quantile of two-sided limits at level 1 - alpha."""
    if not 0.0 < alpha < 1.0:
        raise DataError(f"alpha={alpha!r}: must be between 0 and 1, such as 0.05 for 95% limits")
    return float(norm.ppf(1.0 - alpha / 2.0))


def summarise(
    result: Any,
    alpha: float = 0.05,
    yname: str | None = None,
    xname_fe: Sequence[str] | None = None,
    xname_re: Sequence[str] | None = None,
    title: str | None = None,
) -> Summary:
    """Summary of a result.

    Parameters
    ----------
    result
        estimates, in user units, as a result of a fit has them
    alpha
        limits are at level 1 - alpha
    yname
        name of the response, instead of its own
    xname_fe, xname_re
        names of the fixed effects, and of the variance parameters below them, instead of theirs
    title
        instead of `TITLE`

    Raises
    ------
    ValueError
        alpha is not between 0 and 1, or there are more or fewer names than parameters
    """
    return Summary(
        title=TITLE if title is None else title,
        header=_header(result, result.endog_name if yname is None else yname),
        model=_model(result),
        coefficients=_coefficients(result, alpha, _names(result, xname_fe, xname_re)),
        random=_random_table(result),
        correlations=_correlations(result.varcorr()) if _apart(result.varcorr()) else (),
        notes=_notes(result),
    )


# ---------------------------------------------------------------------------- tables


def _number(value: float) -> str:
    """Six significant digits, empty where there is no value."""
    return "" if np.isnan(value) else f"{value:.6g}"


def _header(result: Any, yname: str) -> pd.DataFrame:
    """Labels and values in two pairs of columns."""
    smallest, largest, mean = result.group_size_range
    left = {
        "Model:": "MixedLM",
        "No. Observations:": f"{result.nobs:d}",
        "No. Groups:": f"{result.n_groups:d}",
        "Min. group size:": f"{smallest:d}",
        "Max. group size:": f"{largest:d}",
        "Mean group size:": f"{mean:.1f}",
    }
    right = {
        "Dependent Variable:": str(yname),
        "Method:": result.method,
        "Scale:": _number(result.scale),
        "Scale Std.Err.:": _number(result.bse_scale),
        "Log-Likelihood:": f"{result.llf:.4f}",
    }
    if not result.reml:
        right |= {"AIC:": f"{result.aic:.4f}", "BIC:": f"{result.bic:.4f}"}
    right["Converged:"] = "Yes" if result.converged else "No"
    rows = zip_longest(left.items(), right.items(), fillvalue=("", ""))
    return pd.DataFrame([[*first, *second] for first, second in rows])


def _model(result: Any) -> tuple[tuple[str, str], ...]:
    """The formula, and the factors where there are several."""
    lines = [("Formula:", result.formula)]
    if len(result.factors) > 1:
        levels = ", ".join(f"{label} ({count})" for label, count in result.factors.items())
        lines.append(("Factors:", f"{levels}; groups are those of {result.group_name}"))
    return tuple(lines)


def _names(
    result: Any, xname_fe: Sequence[str] | None, xname_re: Sequence[str] | None
) -> list[str]:
    """Names of the rows of the coefficients."""
    own, p = list(map(str, result.params_user.index)), len(result.fe_params)
    for what, given, count in (
        ("xname_fe", xname_fe, p),
        ("xname_re", xname_re, len(own) - p),
    ):
        if given is not None and (isinstance(given, str) or len(given) != count):
            raise DataError(f"{what} should be a list of length {count}, but it is {given!r}")
    fixed = own[:p] if xname_fe is None else list(map(str, xname_fe))
    return fixed + (own[p:] if xname_re is None else list(map(str, xname_re)))


def _coefficients(result: Any, alpha: float, names: list[str]) -> pd.DataFrame:
    """Estimates; the fixed effects with large-sample tests and limits."""
    b, p = result.params_user.to_numpy(dtype=float), len(result.fe_params)
    se = result.bse_user.to_numpy(dtype=float)
    tested = np.where(np.arange(len(b)) < p, se, np.nan)
    half = quantile(alpha) * tested
    with np.errstate(divide="ignore", invalid="ignore"):
        z = b / tested
    columns = {
        "Coef.": map(_number, b),
        "Std.Err.": map(_number, se),
        "z": map(_ratio, z),
        "P>|z|": ("" if np.isnan(value) else f"{2 * norm.sf(abs(value)):.3f}" for value in z),
        f"[{alpha / 2:g}": map(_number, b - half),
        f"{1 - alpha / 2:g}]": map(_number, b + half),
    }
    return pd.DataFrame({name: list(cells) for name, cells in columns.items()}, index=names)


def _ratio(z: float) -> str:
    """Three decimals, or an exponent where they would be many digits."""
    return "" if np.isnan(z) else f"{z:.3f}" if abs(z) < 1e6 else f"{z:.3e}"


def _random_table(result: Any) -> pd.DataFrame:
    """Variance, standard deviation and correlations of each random column, by group."""
    varcorr = result.varcorr()
    rows, correlations, apart = [], 0, _apart(varcorr)
    for label, cov in varcorr.items():
        sd, correlation = np.sqrt(np.diag(cov)), _correlation(cov)
        for a, name in enumerate(cov.index):
            row = {
                "Group": label if a == 0 else "",
                "Levels": _levels(label, result.factors) if a == 0 else "",
                "Name": str(name),
                "Variance": _number(cov.iloc[a, a]),
                "Std.Dev.": _number(sd[a]),
            }
            if not apart:
                correlations = max(correlations, a)
                row |= {f"Corr {b + 1}": correlation[a][b] for b in range(a)}
            rows.append(row)
    residual = {"Variance": _number(result.scale), "Std.Dev.": _number(np.sqrt(result.scale))}
    rows.append({"Group": "Residual", "Levels": "", "Name": "", **residual})
    columns = ["Levels", "Name", "Variance", "Std.Dev."]
    columns += [f"Corr {b + 1}" for b in range(correlations)]
    table = pd.DataFrame(rows).set_index("Group").reindex(columns=columns).fillna("")
    return table.rename(columns={"Corr 1": "Corr"} if correlations == 1 else {})


def _levels(label: str, factors: Mapping[str, int]) -> str:
    """Levels of a bar's factor: bar ``g.1`` is one more bar of factor ``g``."""
    stem, dot, number = label.rpartition(".")
    factor = stem if label not in factors and dot and number.isdigit() else label
    return f"{factors[factor]:d}" if factor in factors else ""


def _apart(varcorr: Mapping[str, pd.DataFrame]) -> bool:
    """Whether a bar has so many columns that correlations need tables of their own."""
    return max(map(len, varcorr.values()), default=0) > INLINE


def _correlation(cov: pd.DataFrame) -> list[list[str]]:
    """Lower triangle of correlations, empty where a variance is zero."""
    sd = np.sqrt(np.diag(cov))
    return [
        [
            f"{cov.iloc[a, b] / (sd[a] * sd[b]):.3f}" if sd[a] > 0 and sd[b] > 0 else ""
            for b in range(a)
        ]
        for a in range(len(sd))
    ]


def _correlations(varcorr: Mapping[str, pd.DataFrame]) -> tuple[tuple[str, pd.DataFrame], ...]:
    """A table of correlations per bar of several columns, which are numbered."""
    tables = []
    for label, cov in varcorr.items():
        q = len(cov)
        if q > 1:
            rows = [[*row, *[""] * (q - 1 - len(row))] for row in _correlation(cov)]
            names = [f"{a + 1} {name}" for a, name in enumerate(cov.index)]
            table = pd.DataFrame(rows, names, [str(b + 1) for b in range(q - 1)])
            tables.append((f"Correlations of the random effects, {label}", table))
    return tuple(tables)


# ---------------------------------------------------------------------------- notes


def few_rows(nobs: int, n_random: int, n_fixed: int) -> tuple[str, ...]:
    """A sentence where the rows are no more than the effects, else none.

    Parameters
    ----------
    nobs
        rows
    n_random, n_fixed
        random effects (columns times levels, summed over the bars) and fixed effects
    """
    if nobs > n_random + n_fixed:
        return ()
    return (
        f"No more rows ({nobs:,}) than random effects ({n_random:,}) and fixed effects "
        f"({n_fixed:,}): the variances are hardly determined. Take a simpler random part, or more "
        "rows per group.",
    )


def singularities(varcorr: Mapping[str, pd.DataFrame]) -> list[str]:
    """What is singular in the covariances of the bars, in words that end no sentence."""
    return [
        text
        for label, cov in varcorr.items()
        for text in singular_parts(label, list(map(str, cov.index)), cov.to_numpy())
    ]


def held_at_zero(bar: str) -> str:
    """A sentence for a bar, as written, whose variances are held at zero."""
    return (
        f"{bar} lies within another bar: the likelihood cannot split what the two share, and all "
        "of it is given to the larger one. Leave the smaller out."
    )


def _notes(result: Any) -> tuple[str, ...]:
    """Flags in plain words, with what to try."""
    notes = []
    if result.dropped:
        reasons = ", ".join(f"{reason} ({rows:,})" for reason, rows in result.dropped.items())
        notes.append(f"Rows dropped, each counted under its first reason: {reasons}.")
    if result.aliased:
        notes.append(
            "Left out of the fixed effects because they are linear combinations of the columns "
            f"before them: {', '.join(result.aliased)}."
        )
    notes += result.notes
    if result.singular:
        parts = singularities(result.varcorr())
        which = f" Here {'; '.join(parts)}." if parts else ""
        notes.append(
            f"Singular fit: a variance is exactly zero or a correlation exactly one.{which} The "
            "estimates are the optimum, but the random part is richer than these data can show; a "
            "simpler one gives the same fit. Standard errors hold the zero fixed."
        )
    if not result.converged:
        notes.append(
            f"Not converged: {result.optimizer_summary.reason}. Do not trust these estimates; "
            "rescale the columns or simplify the random part."
        )
    lost = result.optimizer_summary.certificate.digits_lost
    if lost > DIGITS:
        notes.append(
            f"About {lost:.0f} of 16 digits of the criterion are lost to rounding: group effects "
            "or collinear columns dwarf the residual noise."
        )
    if len(result.fe_params):
        notes.append(
            "Tests and limits of the fixed effects are large-sample (z): with few groups they "
            "are too optimistic."
        )
    return tuple(notes)
