"""Linear mixed-effects models, fitted exactly, on data of any size, on Dask."""

from importlib.metadata import version

from dmixed.collected import Moments, MomentStore, collect, open_moments
from dmixed.comparison import Comparison, compare
from dmixed.errors import (
    ConvergenceWarning,
    DataError,
    DmixedError,
    FormulaError,
    MissingDataError,
    NotSupportedError,
)
from dmixed.folded import FoldedEffects
from dmixed.model import MixedLM, lmer, mixedlm
from dmixed.moments import GroupMoments
from dmixed.params import MixedLMParams, VCSpec
from dmixed.plans import Plan, plan
from dmixed.results import MixedLMResults
from dmixed.tracking import log_mlflow

__version__ = version("dmixed")

__all__ = [
    "Comparison",
    "ConvergenceWarning",
    "DataError",
    "DmixedError",
    "FoldedEffects",
    "FormulaError",
    "GroupMoments",
    "MissingDataError",
    "MixedLM",
    "MixedLMParams",
    "MixedLMResults",
    "MomentStore",
    "Moments",
    "NotSupportedError",
    "Plan",
    "VCSpec",
    "__version__",
    "collect",
    "compare",
    "lmer",
    "log_mlflow",
    "mixedlm",
    "open_moments",
    "plan",
]
