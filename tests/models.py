"""Models that are not fitted, for tests of the criterion itself."""

from __future__ import annotations

from typing import Any

import dmixed
from dmixed.formula import parse


def model_of(
    formula: str, data: Any, weights: str | None = None, offset: str | None = None
) -> dmixed.MixedLM:
    """The model that `dmixed.lmer` would fit."""
    return dmixed.MixedLM._of(parse(formula), data, weights, offset, "drop", None, None, None)
