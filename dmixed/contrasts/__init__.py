"""Linear hypotheses on parameters: how they are written, and their t, Wald and F tests.

Everything here takes and returns arrays and names, and knows nothing of models.
"""

from dmixed.contrasts.hypotheses import ContrastResults, WaldResults, t_test, wald_test
from dmixed.contrasts.terms import (
    ADJUSTMENTS,
    PairwiseResults,
    WaldTermsResults,
    pairwise,
    wald_terms,
)
from dmixed.contrasts.written import constraint

__all__ = [
    "ADJUSTMENTS",
    "ContrastResults",
    "PairwiseResults",
    "WaldResults",
    "WaldTermsResults",
    "constraint",
    "pairwise",
    "t_test",
    "wald_terms",
    "wald_test",
]
