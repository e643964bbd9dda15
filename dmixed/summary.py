"""Text and HTML tables of a fit, in the user's units, with every flag explained in words."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import norm

if TYPE_CHECKING:
    from dmixed.results import MixedLMResults

WIDTH = 78
"""Characters in a line of text."""

INLINE = 3
"""Columns of a bar whose correlations stand beside their variances."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a reader needs of a fit.

    Attributes
    ----------
    title
        one line
    header
        pairs of label and text
    random, fixed
        tables of the variance parameters and the fixed effects
    correlations
        a title and a lower triangle per bar, where a bar has more than `INLINE` columns
    notes
        sentences: what was dropped, flagged, or needs care
    """

    title: str
    header: tuple[tuple[str, str], ...]
    random: pd.DataFrame
    fixed: pd.DataFrame
    notes: tuple[str, ...]
    correlations: tuple[tuple[str, pd.DataFrame], ...] = ()

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.header) + 1
        lines = [self.title, "=" * len(self.title)]
        for label, text in self.header:
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=f"{label + ':':<{width}} ",
                subsequent_indent=" " * (width + 1),
            )  # fmt: skip
        lines += ["", "Random effects", _text(self.random)]
        for title, table in self.correlations:
            lines += ["", *textwrap.wrap(title, WIDTH), _text(table)]
        lines += ["", "Fixed effects"]
        lines += [_text(self.fixed) if len(self.fixed) else "(none)"]
        if self.notes:
            lines += [""]
        for note in self.notes:
            lines += textwrap.wrap(note, WIDTH, initial_indent="* ", subsequent_indent="  ")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def as_text(self) -> str:
        """The summary as plain text."""
        return str(self)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in self.header
        )
        correlations = "".join(
            f"<h5>{html.escape(title)}</h5>{table.to_html(na_rep='')}"
            for title, table in self.correlations
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<h3>{html.escape(self.title)}</h3><table>{rows}</table>"
            f"<h4>Random effects</h4>{self.random.to_html(na_rep='')}"
            f"{correlations}"
            f"<h4>Fixed effects</h4>{self.fixed.to_html(na_rep='')}"
            + (f"<ul>{notes}</ul>" if notes else "")
        )


def _text(table: pd.DataFrame) -> str:
    """A table in lines of at most `WIDTH` characters; nothing is cut."""
    plain = str(table.to_string(na_rep=""))
    if max(map(len, plain.splitlines())) <= WIDTH:
        return plain
    return "\n".join(_narrow(_one_label(table) if "Name" in table else table))


def _one_label(table: pd.DataFrame) -> pd.DataFrame:
    """The random effects with groups on lines of their own and names below them."""
    labels: list[str] = []
    rows: list[list[str]] = []
    for group, name, *cells in table.itertuples():
        if group and name:
            labels.append(group)
            rows.append([""] * len(cells))
        labels.append(f"  {name}" if name else group)
        rows.append(cells)
    return pd.DataFrame(rows, labels, table.columns.drop("Name"))


def _narrow(table: pd.DataFrame) -> list[str]:
    """Lines of a wide table: a long label has its own line, many columns come in halves."""
    widths = [2 + max(map(len, [name, *table[name]])) for name in table]
    if sum(widths) > WIDTH and len(widths) > 1:
        half = len(widths) // 2
        left, right = table.iloc[:, :half], table.iloc[:, half:]
        return [*_narrow(left), "", *_narrow(right[(right != "").any(axis=1)])]
    room = min(WIDTH - sum(widths), max(map(len, table.index)))
    lines = []
    for label, *cells in [("", *table.columns), *table.itertuples()]:
        numbers = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        if len(label) > room:
            indent = " " * (len(label) - len(label.lstrip()))
            lines += textwrap.wrap(label, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
            label = ""
        if label or numbers.strip():
            lines.append(f"{label:<{room}}{numbers}".rstrip())
    return lines


def quantile(alpha: float) -> float:
    """Normal quantile of two-sided limits at level 1 - alpha."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha={alpha!r}: must be between 0 and 1, such as 0.05 for 95% limits")
    return float(norm.ppf(1.0 - alpha / 2.0))


def summarise(result: MixedLMResults, alpha: float) -> Summary:
    """Summary of a result; confidence limits at level 1 - alpha."""
    sizes = result.group_sizes
    by = "REML" if result.reml else "maximum likelihood"
    criterion = [("Log-likelihood", f"{result.llf:.4f}" + (" (restricted)" * result.reml))]
    if not result.reml:
        criterion.append(("AIC, BIC", f"{result.aic:.3f}, {result.bic:.3f}"))
    group = ":".join(result._prepared.design.spec.group)
    header = (
        ("Formula", result.formula),
        ("Rows", f"{result.nobs:,}" + _dropped_count(result)),
        (
            "Groups",
            f"{result.n_groups:,} of {group!r}, {sizes.min():,} to {sizes.max():,} rows each"
            f" (mean {sizes.mean():.1f})",
        ),
        *criterion,
        (
            "Optimiser",
            f"{result.optimizer_summary.evaluations} evaluations, "
            + ("converged" if result.converged else "NOT CONVERGED"),
        ),
    )
    return Summary(
        title=f"Linear mixed model fitted by {by}",
        header=header,
        random=_random_table(result),
        correlations=_correlations(result) if _apart(result) else (),
        fixed=_fixed_table(result, alpha),
        notes=_notes(result),
    )


def _dropped_count(result: MixedLMResults) -> str:
    dropped = sum(result.dropped.values())
    return f" used, {dropped:,} dropped" if dropped else ""


def _number(value: Any) -> str:
    """Six significant digits, empty where there is no value."""
    return "" if np.isnan(value) else f"{value:.6g}"


def _random_table(result: MixedLMResults) -> pd.DataFrame:
    """Variance, its standard error, standard deviation and correlations of each random column."""
    rows, correlations, apart = [], 0, _apart(result)
    variance_se = iter(result.bse_re)
    for label, cov in result.varcorr().items():
        sd, correlation = np.sqrt(np.diag(cov)), _correlation(cov)
        for a, name in enumerate(cov.index):
            errors = [next(variance_se) for _ in range(a + 1)]
            row = {"Group": label if a == 0 else "", "Name": str(name)}
            row |= {
                "Variance": _number(cov.iloc[a, a]),
                "Std.Err.": _number(errors[a]),
                "Std.Dev.": _number(sd[a]),
            }
            if not apart:
                correlations = max(correlations, a)
                row |= {f"Corr {b + 1}": correlation[a][b] for b in range(a)}
            rows.append(row)
    rows.append(
        {
            "Group": "Residual",
            "Name": "",
            "Variance": _number(result.scale),
            "Std.Err.": _number(result.bse_scale),
            "Std.Dev.": _number(np.sqrt(result.scale)),
        }
    )
    columns = ["Name", "Variance", "Std.Err.", "Std.Dev."]
    columns += [f"Corr {b + 1}" for b in range(correlations)]
    table = pd.DataFrame(rows).set_index("Group").reindex(columns=columns).fillna("")
    return table.rename_axis(None).rename(columns={"Corr 1": "Corr"} if correlations == 1 else {})


def _apart(result: MixedLMResults) -> bool:
    """Whether a bar has so many columns that correlations need tables of their own."""
    return max(map(len, result.varcorr().values())) > INLINE


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


def _correlations(result: MixedLMResults) -> tuple[tuple[str, pd.DataFrame], ...]:
    """A table of correlations per bar of several columns, which are numbered."""
    tables = []
    for label, cov in result.varcorr().items():
        q = len(cov)
        if q > 1:
            rows = [[*row, *[""] * (q - 1 - len(row))] for row in _correlation(cov)]
            names = [f"{a + 1} {name}" for a, name in enumerate(cov.index)]
            table = pd.DataFrame(rows, names, [str(b + 1) for b in range(q - 1)])
            tables.append((f"Correlations of the random effects, {label}", table))
    return tuple(tables)


def _fixed_table(result: MixedLMResults, alpha: float) -> pd.DataFrame:
    """Estimates with large-sample tests and limits."""
    beta, se = result.fe_params, result.bse_fe
    half = quantile(alpha) * se
    z = beta / se
    level = f"{100 * (1 - alpha):g}%"
    return pd.DataFrame(
        {
            "Coef.": beta.map(_number),
            "Std.Err.": se.map(_number),
            "z": z.map(lambda value: f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3e}"),
            "P>|z|": [f"{2 * norm.sf(abs(value)):.3f}" for value in z],
            f"[{level} lower": (beta - half).map(_number),
            f"{level} upper]": (beta + half).map(_number),
        }
    )


def _notes(result: MixedLMResults) -> tuple[str, ...]:
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
    q, p = len(result.cov_re), len(result.fe_params)
    if result.nobs <= result.n_groups * q + p:
        notes.append(
            f"No more rows ({result.nobs:,}) than random effects ({result.n_groups:,} groups "
            f"times {q}) and fixed effects ({p}): the variances are hardly determined. Take a "
            "simpler random part, or more rows per group."
        )
    blocks = result._prepared.problem.factors.blocks
    for bar in (result._prepared.design.bars[j] for j in blocks.held):
        notes.append(
            f"{bar.text} lies within another bar: the likelihood cannot split what the two share, "
            "and all of it is given to the larger one. Leave the smaller out."
        )
    if np.any(np.array(result._estimates.variances.zero) & blocks.moving):
        notes.append(
            "Singular fit: a variance is exactly zero or a correlation exactly one. The estimates "
            "are the optimum, but the random part is richer than these data can show; a simpler "
            "one gives the same fit. Standard errors hold the zero fixed."
        )
    if not result.converged:
        notes.append(
            f"Not converged: {result.optimizer_summary.reason}. Do not trust these estimates; "
            "rescale the columns or simplify the random part."
        )
    lost = result.optimizer_summary.certificate.digits_lost
    if lost > 6:
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
