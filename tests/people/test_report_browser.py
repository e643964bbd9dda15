"""The report in Chromium: it loads nothing, can be read at any width and by everyone."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_refit import Place

import dmixed
from dmixed.report import place_of, report_html, write

BROWSER = shutil.which("chromium")
ABSENT = [x for x in ("axe_playwright_python", "playwright") if not importlib.util.find_spec(x)]

pytestmark = [
    pytest.mark.skipif(bool(ABSENT), reason=f"extra people: no {', '.join(ABSENT)}"),
    pytest.mark.skipif(BROWSER is None, reason="system package chromium"),
]

SWITCHES = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDTHS, SCHEMES = (1280, 360), ("light", "dark")
LONG = "Department_of_very_long_names_without_any_space_at_all_number_{} <b> & so on"

CELLS = """
box => {
  const frame = box.getBoundingClientRect();
  const cells = [...box.querySelectorAll('th, td')];
  const clipped = cells.filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.textContent);
  const last = cells.filter(x => !x.nextElementSibling);
  const across = new Set(last.map(x => Math.round(x.getBoundingClientRect().right)));
  box.scrollLeft = box.scrollWidth;
  const hidden = last.filter(x => x.getBoundingClientRect().right > frame.right + 1).length;
  const caption = box.querySelector('caption').getBoundingClientRect();
  box.scrollLeft = 0;
  const start = box.querySelector('caption').getBoundingClientRect();
  return {
    cells: cells.length, clipped, hidden, wider: box.scrollWidth > box.clientWidth + 1,
    scrolls: ['auto', 'scroll'].includes(getComputedStyle(box).overflowX),
    caption: start.right <= frame.right + 1, small: cells.some(
      x => parseFloat(getComputedStyle(x).fontSize) < 13),
  };
}
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of published results with drift, and one with long names and residuals."""
    from dmixed.released import released

    folder = tmp_path_factory.mktemp("reports")
    place = Place(tmp_path_factory.mktemp("published"))
    for day in range(2):
        place.add(day, shift=float(day))
        place.done(0)
    found = {"drift": folder / "drift.html", "long": folder / "long.html"}
    write(report_html(released(str(place.results))), place_of(found["drift"], False), False)

    rng = np.random.default_rng(3)
    n = 2000
    g = np.arange(n) % 40
    data = pd.DataFrame({"unit": [LONG.format(i) for i in g], "t": rng.normal(size=n)})
    data["arm"] = rng.choice([LONG.format("a"), "b"], n)
    data["site"] = rng.integers(0, 12, n)
    data["y"] = rng.normal(size=n) + 0.3 * data.t + rng.normal(size=40)[g] + g / 50 * data.t
    data["y"] += rng.normal(size=12)[data["site"]]
    result = dmixed.lmer("y ~ t * arm + (t | unit) + (1 | site)", data)
    result.report(found["long"], residuals=True)
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(SWITCHES))
        yield browser
        browser.close()


@pytest.fixture(params=["drift", "long"])
def report(request: pytest.FixtureRequest, reports: dict[str, Path]) -> Path:
    return reports[request.param]


class Opened:
    """A page that was opened, and what happened then."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str, **options: Any) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **options
        )
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page = self.context.new_page()
        self.page.on("request", lambda x: self.asked.append(x.url))
        self.page.on("console", lambda x: self.said.append(x.text))
        self.page.on("pageerror", lambda x: self.said.append(str(x)))
        self.page.goto(path.as_uri(), wait_until="networkidle")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_asked_for_and_it_fits(
    chromium: Any, report: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    with Opened(chromium, report, width, scheme) as opened:
        page = opened.page
        assert opened.said == []
        assert [x for x in opened.asked if not x.startswith("data:")] == [report.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")

        boxes = [x.evaluate(CELLS) for x in page.locator(".box").all()]
        assert len(boxes) == page.locator("table").count() > 8
        for box in boxes:
            assert box["cells"] > 1
            assert box["clipped"] == []
            assert box["hidden"] == 0
            assert box["scrolls"]
            assert box["caption"]
            assert not box["small"]
        assert any(box["wider"] for box in boxes) or width > 360
        for picture in page.locator("svg").all():
            frame = picture.bounding_box()
            assert frame is not None
            assert 250 < frame["width"] <= width
            assert frame["height"] > 50
        page.screenshot(path=tmp_path / f"{report.stem}-{scheme}-{width}.png", full_page=True)


def test_pictures_have_legible_texts(chromium: Any, report: Path) -> None:
    """Seven pixels and more on a phone, and nothing beyond the edges of its picture."""
    script = """
    svg => {
      const frame = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].map(x => {
        const own = x.getBoundingClientRect();
        const beyond = Math.max(frame.left - own.left, own.right - frame.right,
                                frame.top - own.top, own.bottom - frame.bottom);
        return [x.textContent, Math.min(own.width, own.height), beyond];
      });
    }
    """
    with Opened(chromium, report, 360, "light") as opened:
        found = [x for y in opened.page.locator("svg").all() for x in y.evaluate(script)]
    assert len(found) > 40
    assert [x for x in found if x[2] > 1.0] == []
    assert [x for x in found if len(x[0].strip()) > 1 and x[1] < 7.0] == []


def _unsure(response: dict[str, Any]) -> list[str]:
    """Beginnings of the elements outside of pictures of which axe could not tell.

    It does not judge a single character, nor what the heads of rows lie over when tables scroll.
    """
    found = []
    for rule in response["incomplete"]:
        for node in rule["nodes"]:
            why = {check["data"].get("messageKey") for check in node["any"] if check["data"]}
            of_picture = node["html"].startswith(("<text", "<tspan"))
            if rule["id"] != "color-contrast" or not (of_picture or why & {"shortTextContent"}):
                found.append(node["html"][:3])
    return found


def _only(page: Any) -> list[dict[str, Any]]:
    """Violations of two rules."""
    from axe_playwright_python.sync_playwright import Axe

    rules = {"runOnly": ["color-contrast", "svg-img-alt"]}
    found: list[dict[str, Any]] = Axe().run(page, options=rules).response["violations"]
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_accessible(chromium: Any, report: Path, width: int, scheme: str) -> None:
    """axe-core finds nothing, has looked at what counts, and finds what is made wrong."""
    from axe_playwright_python.sync_playwright import Axe

    with Opened(chromium, report, width, scheme, bypass_csp=True) as opened:
        every = {"resultTypes": ["violations", "incomplete", "passes"]}
        found = Axe().run(opened.page, options=every)
        assert found.violations_count == 0, found.generate_report()
        passed = {x["id"]: len(x["nodes"]) for x in found.response["passes"]}
        assert passed["color-contrast"] > 200
        assert set(_unsure(found.response)) <= ({"<td", "<th"} if width == 360 else set())
        for rule in ("document-title", "html-has-lang", "heading-order", "svg-img-alt", "region"):
            assert passed[rule] > 0, rule
        opened.page.evaluate("document.querySelector('main p').style.color = '#777'")
        opened.page.evaluate("document.querySelector('svg').removeAttribute('aria-label')")
        again = {x["id"] for x in _only(opened.page)}
        assert again == {"color-contrast", "svg-img-alt"}


def test_keyboard(chromium: Any, report: Path) -> None:
    """Links and tables are reached in order, what has the focus is seen, tables scroll."""
    with Opened(chromium, report, 360, "light") as opened:
        page = opened.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "At a glance"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
        page.keyboard.press("Enter")
        assert page.url.endswith("#glance")
        box = page.locator(".box").filter(has_text="Estimates of the fixed effects").first
        box.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(300)
        assert box.evaluate("x => x.scrollLeft") > 0
        assert box.evaluate("x => getComputedStyle(x).outlineStyle") == "solid"


def test_print(chromium: Any, report: Path) -> None:
    """On paper nothing scrolls, and it is dark on white whatever the screen is."""
    with Opened(chromium, report, 720, "dark") as opened:
        page = opened.page
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert not page.locator("nav").is_visible()
        shown = "x => getComputedStyle(x).overflowX"
        assert {x.evaluate(shown) for x in page.locator(".box").all()} == {"visible"}
        assert page.pdf().startswith(b"%PDF")
