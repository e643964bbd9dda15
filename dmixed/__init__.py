"""Linear mixed-effects models, fitted exactly, on data of any size, on Dask."""

from importlib.metadata import version

from dmixed.collect import Moments
from dmixed.errors import (
    ConvergenceWarning,
    DataError,
    DmixedError,
    FormulaError,
    MissingDataError,
    NotSupportedError,
)
from dmixed.model import MixedLM, lmer
from dmixed.moments import GroupMoments
from dmixed.results import MixedLMResults

__version__ = version("dmixed")

__all__ = [
    "ConvergenceWarning",
    "DataError",
    "DmixedError",
    "FormulaError",
    "GroupMoments",
    "MissingDataError",
    "MixedLM",
    "MixedLMResults",
    "Moments",
    "NotSupportedError",
    "__version__",
    "lmer",
]
