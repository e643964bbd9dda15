"""Linear mixed-effects models, fitted exactly, on data of any size, on Dask."""

from importlib.metadata import version

from dmixed.collected import Moments, collect
from dmixed.comparison import Comparison, compare
from dmixed.errors import (
    ConvergenceWarning,
    DataError,
    DmixedError,
    FormulaError,
    MissingDataError,
    NotSupportedError,
)
from dmixed.model import MixedLM, lmer, mixedlm
from dmixed.moments import GroupMoments
from dmixed.params import MixedLMParams, VCSpec
from dmixed.plans import Plan, plan
from dmixed.results import MixedLMResults

__version__ = version("dmixed")

__all__ = [
    "Comparison",
    "ConvergenceWarning",
    "DataError",
    "DmixedError",
    "FormulaError",
    "GroupMoments",
    "MissingDataError",
    "MixedLM",
    "MixedLMParams",
    "MixedLMResults",
    "Moments",
    "NotSupportedError",
    "Plan",
    "VCSpec",
    "__version__",
    "collect",
    "compare",
    "lmer",
    "mixedlm",
    "plan",
]
