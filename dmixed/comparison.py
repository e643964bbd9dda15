"""Models of the same rows beside each other: likelihood-ratio tests, AIC and BIC."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2

from dmixed.blocks import CONSTANT, RESPONSE, Column
from dmixed.errors import DataError
from dmixed.fitting import Estimates, fit
from dmixed.preparation import Prepared
from dmixed.results import MixedLMResults
from dmixed.tabular import RULE, WIDTH, html_table, latex_table, latex_text, ruled, text_table

SAME = 1e-8
"""Relative difference of means and variances of the response that rounding can make."""

COLUMNS = ("npar", "AIC", "BIC", "logLik", "deviance", "Chisq", "Df", "p")


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A table of models, those with fewer parameters first; as R's ``anova(m1, m2)``.

    Attributes
    ----------
    table
        per model ``npar`` (estimated parameters, the error variance included), ``AIC``, ``BIC``
        (with the logarithm of the rows), ``logLik`` and ``deviance`` (-2 logLik; restricted under
        REML); ``Chisq``, ``Df`` and ``p`` of the likelihood-ratio test against the model before it
    models
        formula of each
    method
        "ML" or "REML": whose likelihoods these are
    notes
        sentences: what was fitted again, and tests that need care
    """

    table: pd.DataFrame
    models: tuple[tuple[str, str], ...]
    method: str
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> pd.Series:
        """One column of the table."""
        return self.table[name]

    def __len__(self) -> int:
        """Number of models."""
        return len(self.table)

    @property
    def _cells(self) -> pd.DataFrame:
        """The table as text."""
        cells = {name: [_text(name, x) for x in self.table[name]] for name in COLUMNS}
        return pd.DataFrame(cells, self.table.index.astype(str))

    @property
    def _title(self) -> str:
        return f"Comparison of models ({self.method})"

    def as_text(self) -> str:
        """Plain text of at most `WIDTH` characters a line."""
        models: list[str] = []
        for name, formula in self.models:
            models += textwrap.wrap(f"{name}: {formula}", WIDTH, subsequent_indent="    ")
        notes: list[str] = []
        for note in self.notes:
            notes += textwrap.wrap(note, WIDTH, initial_indent="* ", subsequent_indent="  ")
        body = [self._title, *models, RULE, *text_table(self._cells, rule=True), RULE]
        return "\n".join([ruled(body), *notes])

    def as_html(self) -> str:
        """The same as HTML."""
        models = "".join(f"<p>{html.escape(f'{name}: {text}')}</p>\n" for name, text in self.models)
        notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in self.notes)
        return f"<h4>{html.escape(self._title)}</h4>\n{models}{html_table(self._cells)}" + (
            f"<ul>\n{notes}</ul>\n" if notes else ""
        )

    def as_latex(self) -> str:
        """The same as LaTeX, which needs no packages."""
        models = "\n\n".join(
            f"{latex_text(name)}: \\texttt{{{latex_text(text)}}}" for name, text in self.models
        )
        return f"{models}\n{latex_table(self._cells)}" + "\n\n".join(map(latex_text, self.notes))

    def __str__(self) -> str:
        return self.as_text()

    def __repr__(self) -> str:
        return self.as_text()

    def _repr_html_(self) -> str:
        return self.as_html()


def _text(name: str, value: float) -> str:
    """A cell of a column; nothing where there is no test."""
    if np.isnan(value):
        return ""
    if name == "p":
        return "< 2.2e-16" if value < 2.2e-16 else f"{value:.4g}"
    digits = {"npar": 0, "Df": 0, "Chisq": 3}.get(name, 2)
    return f"{value:.{digits}f}"


def compare(
    *results: MixedLMResults, names: Sequence[str] | None = None, refit: bool = True
) -> Comparison:
    """Compare models of the same rows by likelihood-ratio tests, AIC and BIC.

    Each model is tested against the one before it in the order of their numbers of parameters;
    the test means something if that one is a special case of it.

    Parameters
    ----------
    *results
        two or more fits
    names
        what to call the models; ``m1``, ``m2``, ... by default
    refit
        fit models of REML again by ML, from their moments, where models differ in their fixed
        effects or are not all of REML: restricted likelihoods of other fixed effects cannot be
        compared. False: refuse them

    Raises
    ------
    DataError
        the models are of different rows or responses, or penalised

    Notes
    -----
    A variance of zero lies at the edge of what a variance can be; the chi-square distribution then
    makes p-values too large (Self & Liang 1987). Where models differ by one variance alone, half
    the p-value is right; the table has the p-values of the chi-square distribution, as R's, and a
    note.

    Examples
    --------
    >>> import numpy as np, pandas as pd, dmixed
    >>> rng = np.random.default_rng(1)
    >>> g = np.repeat(np.arange(50), 10)
    >>> x = rng.standard_normal(500)
    >>> y = 1 + 0.1 * x + rng.standard_normal(50)[g] + rng.standard_normal(500)
    >>> moments = dmixed.collect("y ~ x + (1 | g)", pd.DataFrame({"y": y, "x": x, "g": g}))
    >>> print(moments.compare(["y ~ 1 + (1 | g)", "y ~ x + (1 | g)"]))
    Comparison of models (ML)
    m1: y ~ 1 + (1 | g)
    m2: y ~ x + (1 | g)
    ...
    """
    if len(results) < 2:
        raise DataError("a comparison needs two models or more")
    for result in results:
        if not isinstance(result, MixedLMResults):
            raise DataError(f"a result of a fit is needed, not {type(result).__name__}")
    given = [f"m{i + 1}" for i in range(len(results))] if names is None else [*map(str, names)]
    if len(given) != len(results) or len(set(given)) < len(given):
        raise DataError(f"names= needs {len(results)} different names")
    _check_same(results, given)
    estimates, notes = _comparable(results, given, refit)
    order = sorted(range(len(results)), key=lambda i: estimates[i].n_free)
    table = _table([estimates[i] for i in order], results[0].nobs)
    table.index = pd.Index([given[i] for i in order])
    notes += _cautions([results[i] for i in order], [given[i] for i in order], table)
    notes += [
        f"The fit of {given[i]} is not certified as an optimum."
        for i in order
        if not estimates[i].summary.converged
    ]
    method = "REML" if estimates[0].reml else "ML"
    models = tuple((given[i], _formula(results[i])) for i in order)
    return Comparison(table, models, method, tuple(notes))


def _formula(result: MixedLMResults) -> str:
    """A model in one line."""
    parsed = result._prepared.design.spec.formula
    if parsed.words is None:
        return result.formula
    return ", ".join([result.formula, *(bar.text for bar in parsed.bars)])


def _check_same(results: Sequence[MixedLMResults], names: Sequence[str]) -> None:
    """Refuse models of different rows, responses, weights or offsets, and penalised ones."""
    first = results[0]
    spec, own = first._prepared.design.spec, _response(first._prepared)
    for result, name in zip(results, names, strict=True):
        if result._estimates.penalised or result._estimates.shrunk is not None:
            raise DataError(f"{name} is penalised: its likelihood is not at its maximum")
        if result.nobs != first.nobs:
            raise DataError(
                f"{names[0]} is of {first.nobs:,} rows and {name} of {result.nobs:,}: fit them to "
                "the same rows (rows with missing values are dropped; models of the same moments "
                "have the same rows)"
            )
        other = result._prepared.design.spec
        mine = _response(result._prepared)
        if (other.weights, other.offset) != (spec.weights, spec.offset) or (
            abs(mine[2] - own[2]) > SAME * first.nobs
        ):
            raise DataError(f"{names[0]} and {name} have different weights or offsets")
        if result.endog_name != first.endog_name or not np.allclose(
            mine[:2], own[:2], rtol=SAME, atol=SAME * np.sqrt(own[1])
        ):
            raise DataError(f"{names[0]} and {name} are of different responses")


def _response(prepared: Prepared) -> tuple[float, float, float]:
    """Mean and variance of the response less the offset, and the sum of log weights."""
    totals = prepared.moments.summary.totals
    y, one = totals.columns.index(Column((), ((RESPONSE, 1),))), totals.columns.index(CONSTANT)
    shift, scale = prepared.design.spec.frame.of(RESPONSE)
    mean = totals.unweighted[one, y] / totals.nobs
    variance = totals.unweighted[y, y] / totals.nobs - mean**2
    return shift + scale * mean, scale**2 * variance, totals.log_weights


def _comparable(
    results: Sequence[MixedLMResults], names: Sequence[str], refit: bool
) -> tuple[list[Estimates], list[str]]:
    """Estimates whose likelihoods can be compared, and what was done for it."""
    estimates = [result._estimates for result in results]
    restricted = [i for i, found in enumerate(estimates) if found.reml]
    fixed = {result._prepared.fixed_names for result in results}
    if not restricted or (len(restricted) == len(results) and len(fixed) == 1):
        return estimates, []
    if not refit:
        raise DataError(
            "restricted likelihoods cannot be compared with others, or with those of models with "
            "other fixed effects: fit with reml=False, or let refit=True do it"
        )
    for i in restricted:
        found = estimates[i]
        if found.free_beta is not None or found.free_pairs is not None:
            raise DataError(f"{names[i]} has parameters that are held: fit it with reml=False")
        estimates[i] = fit(results[i]._prepared, False)
    which = ", ".join(names[i] for i in restricted)
    return estimates, [f"Fitted again by maximum likelihood, having been fitted by REML: {which}."]


def _table(estimates: Sequence[Estimates], nobs: int) -> pd.DataFrame:
    """Rows of the table, in this order."""
    deviance = np.array([found.value for found in estimates])
    npar = np.array([found.n_free for found in estimates])
    fewer = np.diff(npar, prepend=npar[:1])
    chisq = np.maximum(-np.diff(deviance, prepend=deviance[:1]), 0.0)
    with np.errstate(invalid="ignore"):
        p = np.where(fewer > 0, chi2.sf(chisq, np.maximum(fewer, 1)), np.nan)
    df = fewer.astype(np.float64)
    chisq[0] = df[0] = np.nan
    values = [npar, deviance + 2.0 * npar, deviance + np.log(nobs) * npar, -0.5 * deviance]
    return pd.DataFrame(dict(zip(COLUMNS, [*values, deviance, chisq, df, p], strict=True)))


def _cautions(
    results: Sequence[MixedLMResults], names: Sequence[str], table: pd.DataFrame
) -> list[str]:
    """Which tests are of variances at the edge of what they can be."""
    found = []
    for i in range(1, len(results)):
        small, large = results[i - 1], results[i]
        more = _variances(large) - _variances(small)
        if not more > 0 or not table["Df"].iloc[i] > 0:
            continue
        one = more == 1 and table["Df"].iloc[i] == 1
        found.append(
            f"{names[i]} against {names[i - 1]} tests a variance at zero, the edge of what it can "
            "be: the p-value is too large"
            + (", half of it is right." if one else ", the test is conservative.")
        )
    return found


def _variances(result: MixedLMResults) -> int:
    """Variances among the parameters."""
    return sum(a == b for a, b in result._prepared.problem.factors.blocks.pairs)
