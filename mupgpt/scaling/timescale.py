"""AdamW's weights as a moving average of its updates: how far back they remember."""

import math

import numpy as np
from numpy.typing import ArrayLike

from mupgpt.scaling.linear import PowerFit, fit_loglog
from mupgpt.scaling.resample import LEVEL
from mupgpt.scaling.runs import FloatArray

__all__ = [
    "adamw_timescale",
    "decay_for_timescale",
    "ema_weights",
    "fit_timescale",
    "timescale_fraction",
]


def adamw_timescale(lr: float, weight_decay: float) -> float:
    """Return τ = 1/(η·λ), the steps over which AdamW's weights average its updates.

    AdamW multiplies the weights by 1 − ηλ each step, so they are an exponential moving average with
    that rate (Wang & Aitchison, arXiv 2405.13698). Without decay nothing is forgotten: τ = ∞.

    Raises ValueError for a rate or a decay that is negative or not finite.

    >>> round(adamw_timescale(lr=6e-4, weight_decay=0.1))
    16667
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value:g}: it must be finite and not negative")
    forgotten = lr * weight_decay
    return 1 / forgotten if forgotten else math.inf


def timescale_fraction(lr: float, weight_decay: float, steps: int) -> float:
    """Return τ as a fraction of the run, B/(ηλD) (Power Lines, arXiv 2505.13738).

    >>> round(timescale_fraction(lr=6e-4, weight_decay=0.1, steps=9037), 2)  # Cerebras-GPT 111M
    1.84
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: a run has at least one")
    return adamw_timescale(lr, weight_decay) / steps


def decay_for_timescale(fraction: float, lr: float, steps: int) -> float:
    """Return the weight decay whose timescale is `fraction` of the run: λ = 1/(η·S·fraction).

    >>> round(timescale_fraction(3e-4, decay_for_timescale(0.22, 3e-4, 1000), 1000), 12)
    0.22
    """
    for name, value in (("fraction", fraction), ("lr", lr), ("steps", steps)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value:g}: it must be finite and above zero")
    return 1 / (lr * steps * fraction)


def ema_weights(lr: ArrayLike, weight_decay: float) -> FloatArray:
    """Return what each step's update contributes to the final weights.

    c_i = η_i·λ·Π_{j>i}(1 − η_j·λ). `lr` is the rate of every step, so this holds under any schedule
    ("Straight to Zero", arXiv 2502.15938). With the share of the initial weights, Π(1 − η_j·λ),
    they sum to one.

    >>> ema_weights([0.5, 0.5], weight_decay=1.0).tolist()
    [0.25, 0.5]
    """
    rates = np.asarray(lr, float) * weight_decay
    if not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError("lr·weight_decay leaves [0, 1]: the decay would flip the weights' sign")
    kept = np.cumprod((1 - rates)[::-1])[::-1]
    return rates * np.append(kept[1:], 1.0)


def fit_timescale(
    tokens_per_param: ArrayLike, fraction: ArrayLike, *, level: float = LEVEL
) -> PowerFit:
    """Return τ_opt = c·(D/N)^m fitted to the best fractions found (Power Lines, arXiv 2505.13738).

    `fraction` is the timescale over the run that was best at each number of tokens per parameter.

    >>> fit = fit_timescale([20, 80, 320], [0.2, 0.1, 0.05])
    >>> round(fit.exponents["tokens_per_param"], 9)
    -0.5
    """
    return fit_loglog(fraction, level, tokens_per_param=tokens_per_param)
