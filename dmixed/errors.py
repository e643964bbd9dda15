"""Errors and warnings that dmixed raises; every message names the culprit and what to do."""


class DmixedError(Exception):
    """Base class of all errors that dmixed raises on purpose."""


class FormulaError(DmixedError, ValueError):
    """The formula cannot be read, or asks for something outside the fixed vocabulary."""


class NotSupportedError(FormulaError):
    """A well-formed model that this version cannot fit yet; the message says what is missing."""


class DataError(DmixedError, ValueError):
    """The data do not fit the model: a column, type, value or length; the message names it."""


class MissingDataError(DataError):
    """Missing values met under ``missing="raise"`` or ``missing="none"``."""


class ConvergenceWarning(UserWarning):
    """The optimiser stopped without a certificate; estimates need a second look."""
