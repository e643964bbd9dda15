"""A report as one page of HTML that needs nothing else: no requests, no scripts, no fonts.

All text goes through `markup.text`, which escapes it. Beside it there are the pictures, whose texts
matplotlib and `ElementTree` escape, and whatever got in would neither run nor load: the page has a
policy that forbids all but its own styles.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files

from dmixed.markup import text
from dmixed.report import sections
from dmixed.report.facts import Content
from dmixed.report.pictures import Pictures

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
"""What the page may load: nothing."""


def page(content: Content, pictures: Pictures) -> str:
    """The whole page."""
    parts = [
        ("glance", "At a glance", sections.glance(content, pictures)),
        ("model", "Model", sections.model(content)),
        ("fixed", "Fixed effects", sections.estimates(content, pictures)),
        ("variances", "Variance decomposition", sections.variances(content)),
        ("effects", "Random effects", sections.effects(content, pictures)),
        ("diagnostics", "Diagnostics", sections.diagnostics(content, pictures)),
        ("certificate", "Convergence certificate", sections.certificate(content, pictures)),
        ("drift", "Drift since the last fit", sections.drift(content.changes, pictures)),
        ("provenance", "Data and provenance", sections.provenance(content)),
    ]
    links = "".join(f'<li><a href="#{name}">{text(title)}</a></li>\n' for name, title, _ in parts)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{text(title)}</h2>\n{made}</section>\n'
        for name, title, made in parts
    )
    title = f"Mixed model of {content.facts.endog_name}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="dmixed {text(version("dmixed"))}">
<title>{text(f"{title}: {content.facts.formula}")}</title>
<link rel="icon" href="data:,">
<style>
{_style()}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="soft"><code>{text(content.facts.formula)}</code></p>
</header>
<nav aria-label="Sections">
<ul>
{links}</ul>
</nav>
<main>
{body}</main>
<footer>
<p>Made by dmixed {text(version("dmixed"))}. This page is complete: it loads nothing.</p>
</footer>
</body>
</html>
"""


def _style() -> str:
    return files("dmixed.report").joinpath("page.css").read_text(encoding="utf-8")
