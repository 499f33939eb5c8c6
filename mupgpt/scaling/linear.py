"""Linear and power-law regression with Student's t intervals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from mupgpt.scaling.resample import LEVEL, Interval
from mupgpt.scaling.runs import FloatArray, as_columns

__all__ = ["LinearFit", "PowerFit", "fit_linear", "fit_loglog"]


@dataclass(frozen=True, eq=False)
class LinearFit:
    """y = Σ coef·column: the coefficients by name, their intervals, residuals (y − fit) and R².

    Under weights, residuals and R² are those of the weighted rows.
    """

    coef: dict[str, float]
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    r2: float
    notes: tuple[str, ...]
    covariance: FloatArray = field(repr=False)
    variance: float
    dof: int

    def predict(self, **columns: ArrayLike) -> FloatArray:
        """Return Σ coef·column for new rows."""
        return _matrix(columns, tuple(self.coef)) @ np.array(list(self.coef.values()))

    def predict_interval(
        self, level: float = LEVEL, weight: float = 1.0, /, **columns: ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """Return the low and the high end for one new measurement of this weight at each row."""
        rows = _matrix(columns, tuple(self.coef))
        own = np.sum(rows @ self.covariance * rows, axis=1)
        spread = np.sqrt(own + self.variance / weight**2)
        half = _half_width(level, self.dof, spread)
        middle = self.predict(**columns)
        return middle - half, middle + half


def fit_linear(
    y: ArrayLike, level: float = LEVEL, weights: ArrayLike | None = None, **columns: ArrayLike
) -> LinearFit:
    """Return the least-squares fit of y on the named columns, with exact t intervals.

    Raises ValueError when columns cannot be told apart (rank) or outnumber the rows. With as many
    columns as rows nothing is left to judge the fit by: intervals are infinite and a note says so.

    >>> fit = fit_linear([1.0, 3.0, 5.0], one=[1, 1, 1], x=[0, 1, 2])
    >>> round(fit.coef["x"], 9), round(fit.r2, 9)
    (2.0, 1.0)
    """
    names = tuple(columns)
    rows = _matrix(columns, names)
    target = np.asarray(y, float)
    weight = np.ones(len(target)) if weights is None else np.asarray(weights, float)
    rows, target = rows * weight[:, None], target * weight
    size = np.linalg.norm(rows, axis=0)  # columns may differ by 1e20: judge rank at equal size
    if np.linalg.matrix_rank(rows / np.where(size > 0, size, 1), tol=1e-9) < len(names):
        raise ValueError(
            f"{', '.join(names)} cannot be told apart on {len(target)} rows: they move together; "
            "add runs that vary one without the others, or leave one out"
        )
    coef = np.linalg.lstsq(rows / size, target, rcond=None)[0] / size
    residuals = target - rows @ coef
    dof = len(target) - len(names)
    variance = float(residuals @ residuals) / max(dof, 1)
    covariance = np.linalg.inv((rows / size).T @ (rows / size)) / np.outer(size, size) * variance
    half = _half_width(level, dof, np.sqrt(np.diag(covariance)))
    return LinearFit(
        coef=dict(zip(names, coef.tolist(), strict=True)),
        intervals={
            n: Interval(float(c - h), float(c + h))
            for n, c, h in zip(names, coef, half, strict=True)
        },
        residuals=residuals,
        r2=_r2(target, residuals),
        notes=() if dof else (f"{len(names)} coefficients on {len(target)} rows: no interval",),
        covariance=covariance,
        variance=variance,
        dof=dof,
    )


@dataclass(frozen=True, eq=False)
class PowerFit:
    """y = coefficient·Π x^exponent, with intervals and residuals (ln y − ln fit)."""

    coefficient: float
    exponents: dict[str, float]
    intervals: dict[str, Interval]
    residuals: FloatArray = field(repr=False)
    r2: float
    notes: tuple[str, ...]
    logs: LinearFit = field(repr=False)

    def predict(self, **columns: ArrayLike) -> FloatArray:
        """Return y at new values of the predictors."""
        return np.exp(self.logs.predict(**_log_columns(columns)))

    def predict_interval(
        self, level: float = LEVEL, /, **columns: ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """Return the low and the high end for one new measurement at each row."""
        low, high = self.logs.predict_interval(level, **_log_columns(columns))
        return _exp(low), _exp(high)


def fit_loglog(y: ArrayLike, level: float = LEVEL, **columns: ArrayLike) -> PowerFit:
    """Return the power law y = k·Π x^p fitted on logarithms, with t intervals.

    The intervals hold "coefficient" and one exponent per predictor. Raises ValueError for values
    that are not positive and for predictors that move together.

    >>> fit = fit_loglog([3.0, 12.0, 48.0], tokens=[1.0, 4.0, 16.0])
    >>> round(fit.coefficient, 9), round(fit.exponents["tokens"], 9)
    (3.0, 1.0)
    """
    target, *_ = as_columns(y=y, **columns).values()
    logs = fit_linear(np.log(target), level, **_log_columns(columns))
    coef, intervals = dict(logs.coef), dict(logs.intervals)
    log_k, around = coef.pop("one"), intervals.pop("one")
    return PowerFit(
        coefficient=math.exp(log_k),
        exponents=coef,
        intervals={"coefficient": Interval(*_exp(np.array(around)).tolist()), **intervals},
        residuals=logs.residuals,
        r2=logs.r2,
        notes=logs.notes,
        logs=logs,
    )


def _exp(logs: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # the interval of an unidentified level may reach e^1e4
        return np.exp(logs)


def _log_columns(columns: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    logs = {name: np.log(np.atleast_1d(np.asarray(v, float))) for name, v in columns.items()}
    return {"one": np.ones(len(next(iter(logs.values())))), **logs}


def _matrix(columns: Mapping[str, ArrayLike], names: tuple[str, ...]) -> FloatArray:
    if set(columns) != set(names):
        raise ValueError(f"columns are {', '.join(columns)}: give exactly {', '.join(names)}")
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(columns[n]) for n in names)), 1).astype(
        float
    )


def _half_width(level: float, dof: int, spread: FloatArray) -> FloatArray:
    if dof == 0:
        return np.full(len(spread), math.inf)
    return student.ppf((1 + level) / 2, dof) * spread


def _r2(target: FloatArray, residuals: FloatArray) -> float:
    total = float(np.sum((target - target.mean()) ** 2))
    return 1 - float(residuals @ residuals) / total if total > 0 else math.nan
