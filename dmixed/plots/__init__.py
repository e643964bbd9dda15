"""Pictures of a fit; matplotlib, an extra, is loaded when the first is drawn.

What a picture needs of rows and of groups are counts in bins that add (`dmixed.binned`), so that
they stay where they are, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from dmixed.plots import blups, residuals, search
from dmixed.plots.partial import partial as _partial

__all__ = ["Plots"]


class Plots:
    """Pictures of a result: ``result.plot.caterpillar()`` and so on.

    Every method draws on ``ax`` if that is given (matplotlib Axes, or as many as the plot has),
    else on a new figure, and returns the Axes: one, or a numpy array of several. Axes are labelled
    in the user's units; the titles name the model.

    Raises
    ------
    DmixedError
        matplotlib is not installed: ``pip install 'dmixed[plot]'``
    """

    def __init__(self, result: Any) -> None:
        self._result = result

    def __repr__(self) -> str:
        names = [name for name in vars(type(self)) if not name.startswith("_")]
        return f"<plots of {self._result.formula!r}: {', '.join(names)}>"

    # ------------------------------------------------------------------ random effects

    def caterpillar(
        self,
        factor: str | None = None,
        effects: str | Sequence[str] | None = None,
        *,
        k: int = blups.K,
        alpha: float = 0.05,
        strip: bool | None = None,
        ax: Any = None,
    ) -> Any:
        """BLUPs of the levels of a factor, with intervals (lme4's ``dotplot(ranef(m))``).

        Intervals are normal, from the conditional variances given beta and the variances, as
        those of ``ranef_table()``. Levels are in the order of the first effect.

        Parameters
        ----------
        factor
            as in ``result.factors``; the first by default
        effects
            some of its effects, such as ``"Intercept"``; all by default, side by side
        k
            of more than 2 k levels the k smallest and the k largest are shown
        alpha
            intervals are at level 1 - alpha
        strip
            quantiles of the effects of all levels, with the mean interval of the levels of about
            that rank, instead of single levels; None: for more than 2,000 levels

        Raises
        ------
        DataError
            there is no such factor or effect
        """
        return blups.caterpillar(self._result, factor, _names(effects), k, alpha, strip, ax)

    def scatter_matrix(
        self,
        factor: str | None = None,
        effects: str | Sequence[str] | None = None,
        *,
        alpha: float = 0.05,
        ax: Any = None,
    ) -> Any:
        """BLUPs of each two columns of a bar, with the ellipse of their estimated covariance.

        The ellipse has a share 1 - alpha of the true effects inside; BLUPs are shrunk, so that
        more of them are. Of more than 1,000 levels counts are shown; of more than five columns
        the first five.

        Parameters
        ----------
        factor
            label of a bar, as in ``varcorr()``; by default the first with two columns or more
        effects
            some of its columns
        ax
            (q - 1)^2 Axes, row by row; those above the diagonal are hidden

        Raises
        ------
        DataError
            no bar has two columns
        """
        return blups.scatter_matrix(self._result, factor, _names(effects), alpha, ax)

    # ------------------------------------------------------------------ likelihood

    def zeta(self, *names: str, alpha: float = 0.05, points: int = 7, ax: Any = None) -> Any:
        """Profile likelihood of parameters: zeta against the parameter, with its limits marked.

        Zeta is the signed root of twice the fall of the log-likelihood, maximised over the other
        parameters; where it passes normal quantiles are the confidence limits, and where it is
        straight those of ``conf_int`` are good. Fixed effects are in their units; of random
        effects it is the standard deviation, in units of the response per unit of the column.
        A limit that is not marked does not exist: the data cannot tell the variance from zero.

        Parameters
        ----------
        *names
            as in ``params_user``: fixed effects and variances; by default all of them (the first
            16), each of which takes about ten fits on the moments
        alpha
            limits are at level 1 - alpha
        points
            values between the limits

        Raises
        ------
        DataError
            there is no such parameter
        NotSupportedError
            the fit was penalised, or held some parameters
        """
        return search.zeta(self._result, names, alpha, points, ax)

    def convergence(self, *, ax: Any = None) -> Any:
        """How the optimum was found: criterion above it, and the size of the gradient.

        Both in deviance units, on a logarithmic scale: the Newton decrement ``g'H^-1 g / 2`` is the
        gradient's size in the metric of the curvature, and what a step is about to gain.
        """
        return search.convergence(self._result, ax)

    # ------------------------------------------------------------------ fixed effects

    def partial(
        self,
        variable: str,
        *,
        grid: Any = None,
        at: Mapping[str, Any] | None = None,
        alpha: float = 0.05,
        ax: Any = None,
    ) -> Any:
        """The fixed part along one variable, with a confidence band from ``cov_fe``.

        Of a number a curve, of a category its levels. The formula is evaluated, so that
        polynomials, splines, transforms and interactions are right.

        Parameters
        ----------
        variable
            a data column of the fixed effects
        grid
            values of it. By default the levels of a category; of a number mean - 2 sd to
            mean + 2 sd over the rows of the fit, since moments do not know the range: the curve may
            go where there are no data, or not as far as they do
        at
            values of other columns; by default numbers are at the mean of what the formula has of
            them (``log(x)`` at the mean of the logarithm), categories at their first level
        alpha
            the band is at level 1 - alpha, pointwise, given the variances

        Raises
        ------
        DataError
            no fixed effect uses the column, a level was not in the data of the fit, or the moments
            do not tell a range or a mean that is needed
        """
        return _partial(self._result, variable, grid, at, alpha, ax)

    # ------------------------------------------------------------------ residuals

    @cached_property
    def _own_residuals(self) -> residuals.Residuals:
        return residuals.residuals_of(self._result)

    def _residuals(self, data: Any, storage_options: Any) -> residuals.Residuals:
        if data is None:
            return self._own_residuals
        return residuals.residuals_of(self._result, data, storage_options)

    def residuals(self, data: Any = None, *, storage_options: Any = None, ax: Any = None) -> Any:
        """Residuals against fitted values (with BLUPs), and their running mean.

        Of more than 1,000 rows it is counts, which one pass over the rows makes where they are;
        `residuals`, `qq` and `scale_location` of the rows of the fit share it.

        Parameters
        ----------
        data
            rows with all columns of the model; the rows of the fit by default
        storage_options
            for fsspec, with a URI
        """
        return residuals.against_fitted(self._result, self._residuals(data, storage_options), ax)

    def qq(self, data: Any = None, *, storage_options: Any = None, ax: Any = None) -> Any:
        """Quantiles of the standardised residuals against those of the normal distribution.

        Quantiles come from counts in at most 16,384 bins, finer than a pixel. See `residuals`.
        """
        return residuals.normal_plot(self._result, self._residuals(data, storage_options), ax)

    def scale_location(
        self, data: Any = None, *, storage_options: Any = None, ax: Any = None
    ) -> Any:
        """Root of the size of the standardised residuals against fitted values.

        Its running mean is level where the error variance is the same everywhere. See `residuals`.
        """
        return residuals.scale_location(self._result, self._residuals(data, storage_options), ax)


def _names(effects: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (effects,) if isinstance(effects, str) else None if effects is None else tuple(effects)
