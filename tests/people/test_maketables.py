"""A publication table of several fits by the real maketables."""

from __future__ import annotations

import pandas as pd
import pytest

import dmixed
from dmixed import example

maketables = pytest.importorskip("maketables", reason="extra people: pip install '.[people]'")


def test_two_fits_side_by_side() -> None:
    with example.data() as path:
        rows = pd.read_parquet(path)
    first = dmixed.lmer("mAch ~ ses + (1 | school)", rows)
    second = dmixed.lmer("mAch ~ ses + (1 + ses | school)", rows, reml=False)
    made = maketables.ETable(
        [first.to_maketables(), second.to_maketables()], coef_fmt="b:.3f (se:.3f)"
    )
    text = made.make(type="tex")
    page = made.make(type="gt").as_raw_html()
    for shown in (text, page):
        assert "mAch" in shown
        assert f"{first.fe_params['ses']:.3f}" in shown
        assert f"{second.bse_fe['ses']:.3f}" in shown
        assert "7,185" in shown
        for word in ("SD: Residual", "Observations", "Groups: school", "REML", "AIC"):
            assert word in shown
    assert "SD: ses | school" in page
    cells = made.df
    (observations,) = [row for row in cells.index if "Observations" in row]
    assert [str(x) for x in cells.loc[observations]] == ["7,185"] * 2
    (aic,) = [row for row in cells.index if "AIC" in row]
    assert cells.loc[aic].iloc[0] == "-"  # of REML there is none
