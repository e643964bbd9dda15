"""Sections of a report as HTML: a heading, sentences, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dmixed import markup
from dmixed.markup import text
from dmixed.optimizer import BOUNDARY_LIMIT, CURVATURE_LIMIT, GRADIENT_LIMIT, ROUNDING_LIMIT
from dmixed.plots.blups import Blups
from dmixed.report.elements import box, figure, grid, heading, listed, paragraph
from dmixed.report.facts import LEVEL, Changes, Component, Content, Effect, Facts, Remark, Table
from dmixed.report.pictures import Pictures
from dmixed.report.words import counted, limits, number, percent, short
from dmixed.summary import quantile

INLINE = 3
"""Columns of a bar whose correlations stand beside their variances."""

INSTALL = "pip install 'dmixed[plot]'"

_SEVERITIES = "problem", "caution", "note"


# --------------------------------------------------------------------------- the model


def glance(content: Content, pictures: Pictures) -> str:
    """Whether the fit can be used, and what is the most important."""
    facts = content.facts
    found = [_verdict(facts)]
    counts = [(x, sum(y.severity == x for y in content.remarks)) for x in _SEVERITIES]
    told = ", ".join(counted(n, severity) for severity, n in counts if n)
    worst = next((severity for severity, n in counts if n), "good")
    found.append(
        paragraph(f"Diagnostics found {told}; see there what to try.", kind=worst)
        if told
        else paragraph("Diagnostics found nothing that deserves a word.", kind="good")
    )
    missing = [picture.title for picture in pictures if picture.svg is None]
    if missing:
        names = "; ".join(missing)
        found.append(
            paragraph(
                f"Pictures are missing, because matplotlib is not installed: {names}.",
                f"To have them: {INSTALL}, and make the report again.",
                kind="caution",
            )
        )
    fixed, random = facts.explained
    pairs = [
        ("Response", facts.endog_name),
        ("Rows used", f"{facts.nobs:,}"),
        ("Levels", ", ".join(f"{label} {n:,}" for label, n in facts.factors.items())),
        ("Fixed effects", f"{len(facts.fixed):,}"),
        ("Standard deviation of the error", number(math.sqrt(facts.scale))),
        ("Explained by the fixed part", percent(fixed)),
        ("Explained with the random effects", percent(random)),
    ]
    found.append(listed("Key figures", ((x, y) for x, y in pairs if y)))
    return "".join(found)


def _verdict(facts: Facts) -> str:
    if not facts.converged:
        return paragraph(
            "The optimum is not certified: the estimates must not be used as they are.",
            f"{facts.optimizer_summary.reason}.",
            kind="problem",
        )
    told = "The optimum is certified: gradient and curvature were checked where the search ended."
    if facts.singular:
        return paragraph(
            told,
            "The fit is singular: a variance is exactly zero, or effects depend on others.",
            kind="caution",
        )
    return paragraph(told, kind="good")


def model(content: Content) -> str:
    """Formula, method, rows and groups."""
    facts = content.facts
    smallest, largest, mean = facts.sizes
    method = {"REML": "restricted maximum likelihood (REML)", "ML": "maximum likelihood (ML)"}
    dropped = sum(facts.dropped.values())
    pairs = [
        ("Response", facts.endog_name),
        ("Method", method.get(facts.method, facts.method)),
        ("Weights", facts.weights or ""),
        ("Offset", facts.offset or ""),
        ("Rows used", f"{facts.nobs:,}"),
        ("Rows dropped", f"{dropped:,}"),
        ("Rows of a group", f"{smallest:,} to {largest:,}, {mean:,.1f} on average "
                            f"({facts.group_name})"),
        ("Left out of the fixed effects", ", ".join(facts.aliased)),
        ("Log-likelihood", f"{facts.llf:.4f}" + " (restricted)" * (facts.method == "REML")),
        ("AIC", "" if math.isnan(facts.aic) else f"{facts.aic:.4f}"),
        ("BIC", "" if math.isnan(facts.bic) else f"{facts.bic:.4f}"),
    ]  # fmt: skip
    found = [
        f'<p><code class="formula">{text(facts.formula)}</code></p>\n',
        listed("Method, rows and groups", ((x, y) for x, y in pairs if y)),
        grid("Random factors", ("Factor", "Levels"), facts.factors.items()),
    ]
    if dropped:
        rows = ((reason, n) for reason, n in facts.dropped.items() if n)
        found.append(grid("Rows dropped, each under its first reason", ("Reason", "Rows"), rows))
    return "".join(found)


def estimates(content: Content, pictures: Pictures) -> str:
    """Fixed effects with tests and limits."""
    facts = content.facts
    if not facts.fixed:
        return paragraph("The model has no fixed effects.")
    names = "Effect", "Estimate", "Std. error", "z", "p", "Lower 95%", "Upper 95%"
    made = grid("Estimates of the fixed effects", names, map(_effect, facts.fixed), names[1:])
    told = paragraph(
        f"In units of {facts.endog_name} per unit of the column. Tests and limits are of large "
        "samples (normal), given the variances: with few groups they are too optimistic.",
        kind="soft",
    )
    return made + told + ("" if pictures.fixed is None else figure(pictures.fixed))


def _effect(effect: Effect) -> tuple[str, ...]:
    p = effect.p
    shown = "" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"
    z = _finite(effect.z, ".3f" if abs(effect.z) < 1e6 else ".3e")
    numbers = map(number, (effect.value, effect.se))
    return (effect.name, *numbers, z, shown, *map(number, effect.limits))


# --------------------------------------------------------------------------- random effects


def variances(content: Content) -> str:
    """Variances, correlations and shares."""
    facts = content.facts
    components = facts.components
    names = [
        "Term",
        "Levels",
        "Column",
        "Variance",
        "95% limits",
        "Std. dev.",
        "Correlation",
        "Share",
    ]
    rows = [row for component in components for row in _variances(component)]
    kept = [
        j for j, name in enumerate(names) if name == "Levels" or any(row[j] != "" for row in rows)
    ]
    shown = [names[j] for j in kept]
    right = {"Levels", "Variance", "95% limits", "Std. dev.", "Share"}
    found = [
        grid(
            "Variances of the random effects and of the error",
            shown,
            ([row[j] for j in kept] for row in rows),
            right,
        )
    ]
    found += [_correlations(x) for x in components if len(x.names) > INLINE]
    fixed, random = facts.explained
    told = [
        "Limits are approximate: normal on the logarithm of the variance; there are none for a "
        "variance that is zero or was held."
    ]
    if any(not math.isnan(x.share) for x in components):
        told.append(
            "A share is the mean variance that a term gives a row, over that of all random terms "
            "and the error; of random intercepts it is the intra-class correlation (ICC)."
        )
    if not math.isnan(fixed):
        told.append(
            f"The fixed part explains {percent(fixed)} of the variance of a row (marginal R2), "
            f"with the random effects {percent(random)} (conditional R2)."
        )
    return "".join(found) + paragraph(*told, kind="soft")


def _variances(component: Component) -> Iterator[tuple[str, ...]]:
    levels = "" if component.levels is None else f"{component.levels:,}"
    for j, name in enumerate(component.names):
        variance = float(component.cov[j, j])
        pairs = [
            f"{component.correlation(j, b):.3f} with {component.names[b]}"
            for b in range(j)
            if len(component.names) <= INLINE and not math.isnan(component.correlation(j, b))
        ]
        first = j == 0
        yield (
            component.label,
            levels if first else "",
            name,
            number(variance),
            limits(*component.limits(j)),
            number(math.sqrt(max(variance, 0.0))),
            "; ".join(pairs),
            percent(component.share) if first else "",
        )


def _correlations(component: Component) -> str:
    q = len(component.names)
    names = [f"{j + 1}" for j in range(q - 1)]
    rows = [
        [f"{a + 1} {component.names[a]}"]
        + [
            f"{r:.3f}" if b < a and not math.isnan(r := component.correlation(a, b)) else ""
            for b in range(q - 1)
        ]
        for a in range(q)
    ]
    caption = f"Correlations of the random effects by {component.label}"
    return grid(caption, ["Column", *names], rows, names)


def effects(content: Content, pictures: Pictures) -> str:
    """The least and the greatest effects of each factor."""
    found = [
        paragraph(
            "Conditional modes (BLUPs) of the levels, with 95% limits given the fixed effects and "
            "the variances. They are shrunk towards zero, the more the fewer rows a level has.",
            kind="soft",
        )
    ]
    for label, summary in content.effects.items():
        found.append(heading(f"By {label}"))
        found.append(_levels(label, summary))
        found += map(figure, pictures.effects[label])
    return "".join(found)


def _levels(label: str, summary: Blups) -> str:
    z, m, k = quantile(LEVEL), len(summary.labels), summary.k
    names = [label]
    for name in summary.names:
        names += [name, f"{name}: 95% limits"]
    rows: list[list[str]] = []
    for i in range(m):
        if summary.total > m and i == k:
            rows.append([f"… {summary.total - m:,} between …"] + [""] * (len(names) - 1))
        cells = [str(summary.labels[i])]
        for value, se in zip(summary.values[i], summary.se[i], strict=True):
            cells += [short(float(value)), limits(float(value - z * se), float(value + z * se))]
        rows.append(cells)
    by = f", in the order of {summary.names[0]}" if len(summary.names) > 1 else ""
    caption = (
        f"The {k} least and the {k} greatest of {summary.total:,} levels of {label}{by}"
        if summary.total > m
        else f"The {counted(m, 'level')} of {label}{by}"
    )
    return grid(caption, names, rows, names[1:])


# --------------------------------------------------------------------------- judgement


def diagnostics(content: Content, pictures: Pictures) -> str:
    """Findings, and pictures of the residuals."""
    found = [_findings(content.remarks)]
    if content.residuals is None:
        found.append(
            paragraph(
                "Residuals were not looked at, which needs the data: dmixed report FIT --data URI.",
                kind="soft",
            )
        )
        return "".join(found)
    found.append(heading("Residuals"))
    found.append(paragraph(f"Of {content.rows}." if content.rows else ""))
    return "".join([*found, *map(figure, pictures.residuals)])


def _findings(remarks: Sequence[Remark]) -> str:
    if not remarks:
        return paragraph("Nothing to report: the optimum is certified and nothing looks odd.")
    items = "".join(
        f'<li class="{_kind(x)}"><strong>{text(f"{_kind(x).capitalize()}: {x.topic}")}</strong>\n'
        f"{paragraph(x.what)}{paragraph(f'Try: {x.advice}.')}</li>\n"
        for x in remarks
    )
    return f'<ul class="findings">\n{items}</ul>\n'


def _kind(remark: Remark) -> str:
    return remark.severity if remark.severity in _SEVERITIES else "note"


def certificate(content: Content, pictures: Pictures) -> str:
    """Evidence that the estimates are the optimum."""
    summary = content.facts.optimizer_summary
    proof = summary.certificate
    names = "Condition", "Found", "Wanted", "Holds"
    rows = [
        ("Scaled gradient, max |g| / sqrt(diag H)", f"{proof.gradient:.1e}",
         f"at most {GRADIENT_LIMIT:.0e}", proof.gradient <= GRADIENT_LIMIT),
        ("Slope at variances of zero", "no variance is zero" if math.isinf(proof.boundary) else
         f"{proof.boundary:.1e}", f"at least {BOUNDARY_LIMIT:.0e}",
         proof.boundary >= BOUNDARY_LIMIT),
        ("Least curvature, scaled", f"{proof.curvature:.1e}", f"more than {CURVATURE_LIMIT:.0e}",
         proof.curvature > CURVATURE_LIMIT),
        ("Rounding error of the criterion", f"{proof.rounding:.1e}", f"at most {ROUNDING_LIMIT:g}",
         proof.rounding <= ROUNDING_LIMIT),
    ]  # fmt: skip
    shown = ((*row[:3], "yes" if row[3] else "no") for row in rows)
    pairs = [
        ("Method", summary.method),
        ("Evaluations", f"{summary.evaluations:,}"),
        ("Evaluations on a sample before", f"{summary.sampled:,}" if summary.sampled else ""),
        ("Evaluations of a second search", f"{summary.checks:,}" if summary.checks else ""),
        ("Ended because", summary.reason),
        ("Condition of the Hessian", _finite(proof.condition, ".3g")),
        ("Decimal digits lost, of 16", _finite(proof.digits_lost, ".1f")),
    ]
    told = paragraph(
        "An optimum is certified where all conditions hold; criterion and rounding are in deviance "
        "units (twice the log-likelihood).",
        kind="soft",
    )
    picture = pictures.convergence
    return "".join(
        [
            grid("Conditions of the certificate", names, shown, ("Found",)),
            told,
            listed("Search", ((x, y) for x, y in pairs if y)),
            "" if picture is None else figure(picture),
        ]
    )


def _finite(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


def drift(changes: Changes | None, pictures: Pictures) -> str:
    """What has changed since the last fit."""
    if changes is None:
        return paragraph(
            "A saved fit knows of no other. Of results that dmixed refit publishes, this compares "
            "the newest version with the one before.",
            kind="soft",
        )
    against = (
        f"Compared with version {changes.before}."
        if changes.before is not None
        else f"Not compared: {changes.reason}."
    )
    found = [paragraph(against, *changes.told)]
    if changes.before is not None:
        names = "Estimate", "Before", "Before: 95% limits", "Now", "Now: 95% limits", "Change / SE"
        rows = ((x.name, *_told(x.before), *_told(x.now), _change(x.change)) for x in changes.moved)
        caption = "Estimates before and now; changes in standard errors of the fit before"
        found.append(grid(caption, names, rows, names[1:]))
        found += [] if pictures.drift is None else [figure(pictures.drift)]
    if changes.groups:
        heads = "Factor", "Levels", "New", "Gone", "Some that are new", "Some that are gone"
        found.append(grid("Levels that are new and gone", heads, changes.groups))
    return "".join(found)


def _told(found: tuple[float, float, float] | None) -> tuple[str, str]:
    return ("", "") if found is None else (number(found[0]), limits(found[1], found[2]))


def _change(size: float) -> str:
    return "" if math.isnan(size) else f"{size:+.2f}"


def provenance(content: Content) -> str:
    """Which rows the fit is of, and what made it."""
    pairs = [("Report of", content.source)] if content.source else []
    found = [listed("Origin", [*pairs, *content.provenance.pairs])]
    return "".join([*found, *map(_table, content.provenance.tables)])


def _table(found: Table) -> str:
    made = markup.table(found.names, found.rows, caption=found.caption, heads=1)
    return box(made, found.caption)
