"""What may be wrong with a fit or its data, in plain words, and what to try."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from dmixed.inference.random_effects import n_effects
from dmixed.plots.residuals import Residuals
from dmixed.summary import DIGITS, few_rows, held_at_zero, singularities
from dmixed.tabular import WIDTH

Severity = Literal["problem", "caution", "note"]

FEW = 5
"""Levels of a factor below which its variance is hardly estimated at all."""

RATHER_FEW = 20
"""Levels below which large-sample tests are too optimistic to go unmentioned."""

GIANT = 1 / 3
"""Share of the rows in one group."""

LOST = 0.05
"""Share of the rows dropped that deserves care."""

DEPENDENT = 0.999
"""Correlation of two estimates of fixed effects that are hard to tell apart."""

FLAT = 1e8
"""Condition of the scaled Hessian beyond which some variances are hardly determined."""

OUTLIER = 5.0
"""Standardised residuals beyond this size are counted."""

_EDGE = {"problem": "#D55E00", "caution": "#E69F00", "note": "#767676"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a reader of a fit should know.

    Attributes
    ----------
    severity
        "problem": estimates cannot be used as they are; "caution": some of them, or their standard
        errors, need a second look; "note": good to know
    topic
        one of few words, for programs: "convergence", "singular", "dropped", "aliased", "digits",
        "groups", "rows", "held", "collinear", "residuals"
    what
        is the case
    advice
        what to try
    """

    severity: Severity
    topic: str
    what: str
    advice: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Findings on a fit, the gravest first; prints as text, shows as HTML in notebooks.

    Attributes
    ----------
    formula
        of the model
    findings
        none if nothing is worth a word
    """

    formula: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No finding is a problem or calls for caution."""
        return all(x.severity == "note" for x in self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def _head(self) -> str:
        if not self.findings:
            return "Nothing to report: the optimum is certified and nothing looks odd."
        counts = [
            f"{n} {severity}{'s' * (n > 1)}"
            for severity in _EDGE
            if (n := sum(x.severity == severity for x in self.findings))
        ]
        return f"Found: {', '.join(counts)}."

    def __str__(self) -> str:
        lines = [*textwrap.wrap(f"Diagnosis of {self.formula}", WIDTH), self._head]
        for x in self.findings:
            lines += ["", *_wrapped(f"{x.severity}: {x.what}", ""), *_wrapped(x.advice, "  try: ")]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li style='border-left:4px solid {_EDGE[x.severity]};padding-left:8px;"
            f"margin:6px 0;list-style:none'><strong>{x.severity}</strong>: {html.escape(x.what)}"
            f"<br><em>Try:</em> {html.escape(x.advice)}</li>\n"
            for x in self.findings
        )
        return (
            "<div>\n<p><strong>Diagnosis</strong> of "
            f"<code>{html.escape(self.formula)}</code></p>\n"
            f"<p>{html.escape(self._head)}</p>\n"
            + (f"<ul style='padding-left:0'>\n{items}</ul>\n" if items else "")
            + "</div>\n"
        )


def _wrapped(text: str, first: str) -> list[str]:
    indent = " " * (len(first) or 2)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent)


def diagnose(result: Any, residuals: Residuals | None = None) -> Diagnosis:
    """Findings on a result, see `Diagnosis`.

    Parameters
    ----------
    residuals
        of its rows, to look for outliers among
    """
    found = [
        *_convergence(result),
        *_singular(result),
        *_digits(result),
        *_rows(result),
        *_groups(result),
        *_fixed(result),
        *_held(result),
        *([] if residuals is None else _residuals(residuals)),
    ]
    order = list(_EDGE)
    found.sort(key=lambda x: order.index(x.severity))
    return Diagnosis(result.formula, tuple(found))


def _convergence(result: Any) -> Iterator[Finding]:
    summary = result.optimizer_summary
    proof = summary.certificate
    if not result.converged:
        newton = summary.method == "newton"
        tried = "" if newton else "fit without method=, by the exact Newton search; "
        yield Finding(
            "problem",
            "convergence",
            f"The optimum is not certified after {summary.evaluations} evaluations: "
            f"{summary.reason}. The estimates may be far from it.",
            f"{tried}centre and scale the columns, leave out what is nearly a combination of "
            "others, simplify the random part; result.plot.convergence() shows the path",
        )
    elif np.isfinite(proof.condition) and proof.condition > FLAT:
        yield Finding(
            "caution",
            "convergence",
            "The likelihood is nearly flat in some direction of the variances (condition "
            f"{proof.condition:.0e}): they are certified, but some are hardly determined.",
            "bring random columns to one scale; leave out the random effects of least variance",
        )


def _singular(result: Any) -> Iterator[Finding]:
    if not result.singular:
        return
    parts = singularities(result.varcorr()) or ["a combination of random effects has no variance"]
    bars = [len(cov) for cov in result.varcorr().values()]
    advice = "a simpler random part gives the same fit: "
    advice += (
        "write || for | to leave out the correlations, or leave out the column named"
        if max(bars, default=1) > 1
        else "leave out the bar named"
    )
    yield Finding(
        "caution",
        "singular",
        f"Singular fit: {'; '.join(parts)}. This is the optimum; the data show no more variation "
        "between groups there than chance. Standard errors hold the zero fixed.",
        f"{advice}; result.plot.zeta() shows how large the variance may be all the same",
    )


def _digits(result: Any) -> Iterator[Finding]:
    proof = result.optimizer_summary.certificate
    if proof.digits_lost > DIGITS:
        yield Finding(
            "caution",
            "digits",
            f"About {proof.digits_lost:.0f} of 16 digits of the criterion are lost to rounding, "
            f"which leaves it uncertain by {proof.rounding:.1g} deviance units.",
            "centre columns with a large mean; take off what is known of effects that dwarf the "
            "noise, with offset=",
        )


def _rows(result: Any) -> Iterator[Finding]:
    dropped = dict(result.dropped)
    lost = sum(dropped.values())
    if lost:
        share = lost / (lost + result.nobs)
        reasons = ", ".join(f"{reason} ({rows:,})" for reason, rows in dropped.items())
        yield Finding(
            "caution" if share > LOST else "note",
            "dropped",
            f"{lost:,} of {lost + result.nobs:,} rows ({share:.1%}) were dropped, each counted "
            f"under its first reason: {reasons}.",
            "see whether rows miss values by chance; if not, fill them in or model what is missing",
        )
    prepared = result._prepared
    problem = prepared.problem
    sizes = problem.factors.blocks.sizes
    effects = sum(n_effects(problem, j) * size for j, size in enumerate(sizes))
    for text in few_rows(prepared.nobs, effects, problem.factors.p):
        what, _, advice = text.partition(". ")
        yield Finding("caution", "rows", f"{what}.", advice.rstrip("."))


def _groups(result: Any) -> Iterator[Finding]:
    for name, levels in result.factors.items():
        if levels < FEW:
            yield Finding(
                "caution",
                "groups",
                f"{name} has {levels} level{'s' * (levels != 1)}: a variance between so few is "
                "hardly estimated, and tests that take it as known are far too optimistic.",
                f"make {name} a fixed effect, or report limits of result.plot.zeta()",
            )
        elif levels < RATHER_FEW:
            yield Finding(
                "note",
                "groups",
                f"{name} has {levels} levels: standard errors and z tests, which are of large "
                "samples, are somewhat too optimistic.",
                "profiles (result.plot.zeta()) instead of normal limits",
            )
    smallest, largest, mean = result.group_size_range
    share = largest / result.nobs
    if share >= GIANT and result.n_groups > 2 / GIANT:
        yield Finding(
            "caution",
            "groups",
            f"One of {result.n_groups:,} groups of {result.group_name} has {share:.0%} of the "
            "rows.",
            "see whether its key stands for missing ones (such as 0, -1, 'unknown'), and leave "
            "those rows out if it does",
        )
    if mean < 2.0 and smallest == 1:
        yield Finding(
            "note",
            "groups",
            f"Groups of {result.group_name} have {mean:.2f} rows on average: what varies between "
            "groups of one row cannot be told from the error.",
            "see whether the key is finer than it was meant to be",
        )


def _fixed(result: Any) -> Iterator[Finding]:
    if result.aliased:
        yield Finding(
            "caution",
            "aliased",
            f"Left out of the fixed effects, as linear combinations of the columns before them: "
            f"{', '.join(result.aliased)}. The fit is the same whichever is left out.",
            "leave the term out of the formula; if it should not be dependent, look for columns "
            "that are copies, or combinations of levels without rows",
        )
    cov = np.asarray(result._estimates.cov_beta)
    sd = np.sqrt(np.diag(cov))
    with np.errstate(divide="ignore", invalid="ignore"):
        R = np.abs(cov / np.outer(sd, sd))
    R = np.tril(np.nan_to_num(R), -1)
    if R.size and R.max() > DEPENDENT:
        a, b = np.unravel_index(int(R.argmax()), R.shape)
        names = result._fixed_names
        yield Finding(
            "note",
            "collinear",
            f"The estimates of {names[b]} and {names[a]} have a correlation of {R.max():.4f}: "
            "the data hardly tell them apart.",
            "centre the columns (center(x)), use poly(x, n) for powers, or leave one of them out",
        )


def _held(result: Any) -> Iterator[Finding]:
    prepared, found = result._prepared, result._estimates
    for j in prepared.problem.factors.blocks.held:
        what, _, advice = held_at_zero(prepared.bars[j].text).rpartition(". ")
        yield Finding("caution", "held", f"{what}.", advice.rstrip("."))
    free = [x for x in (found.free_beta, found.free_pairs) if x is not None]
    n = sum(int((~x).sum()) for x in free)
    if n:
        yield Finding(
            "note",
            "held",
            f"{n} parameter{'s were' if n > 1 else ' was'} held at the starting value, and "
            "standard errors take it as known.",
            "fit without free= to estimate all parameters",
        )
    if found.penalised:
        yield Finding(
            "note",
            "held",
            "The fit was penalised: estimates are pulled towards zero, and tests do not know.",
            "compare with the fit without a penalty",
        )


def _residuals(found: Residuals) -> Iterator[Finding]:
    n, beyond = found.alone.total, found.beyond(OUTLIER)
    expected = 2.0 * n * float(norm.sf(OUTLIER))
    if beyond > 3.0 * expected:
        largest = float(np.abs(found.alone.centres[:, 0]).max())
        yield Finding(
            "caution",
            "residuals",
            f"{beyond:,} of {n:,} residuals {'is' if beyond == 1 else 'are'} beyond {OUTLIER:g} "
            f"standard deviations ({expected:.1g} would be by chance); the largest is about "
            f"{largest:.3g}.",
            "look at result.plot.qq() and at these rows (augment()); correct errors of recording, "
            "or transform the response",
        )
