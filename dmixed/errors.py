"""Errors and warnings that dmixed raises; every message names the culprit and what to do."""

from __future__ import annotations

from collections.abc import Sequence


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


class JobError(DmixedError, ValueError):
    """A job file cannot be used; the message names the file, the line and the field.

    Attributes
    ----------
    problems
        a line for everything that is wrong
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[JobError], tuple[tuple[str, ...]]]:
        return JobError, (self.problems,)


class ConvergenceWarning(UserWarning):
    """The optimiser stopped without a certificate; estimates need a second look."""
