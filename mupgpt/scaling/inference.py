"""How big a model should be when it will also be used: training and inference paid together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import root_scalar

from mupgpt.scaling.chinchilla import ChinchillaLaw

__all__ = ["FlopCost", "InferenceOptimum", "inference_optimum"]


@dataclass(frozen=True, kw_only=True)
class FlopCost:
    """What a useful FLOP costs: the price of a peak FLOP, and the part of the peak in use (MFU).

    Prices are in any one currency (1 counts plain FLOPs). Reading input tokens is one large batch,
    writing output tokens is bound by memory, so their MFU differ widely.

    Raises ValueError for a price that is not positive or an MFU outside (0, 1].

    >>> FlopCost(price_train=2.0, mfu_train=0.5).train
    4.0
    """

    price_train: float = 1.0
    price_input: float = 1.0
    price_output: float = 1.0
    mfu_train: float = 1.0
    mfu_input: float = 1.0
    mfu_output: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf or (name.startswith("mfu") and value > 1):
                wanted = "a share of the peak in (0, 1]" if name.startswith("mfu") else "positive"
                raise ValueError(f"{name} = {value:g}: it must be {wanted}")

    @property
    def train(self) -> float:
        """The cost of one useful training FLOP."""
        return self.price_train / self.mfu_train

    @property
    def input(self) -> float:
        """The cost of one useful FLOP on input tokens."""
        return self.price_input / self.mfu_input

    @property
    def output(self) -> float:
        """The cost of one useful FLOP on output tokens."""
        return self.price_output / self.mfu_output


@dataclass(frozen=True)
class InferenceOptimum:
    """The cheapest model of a given loss over its life: its size, its training and its bill.

    `n_params`, `tokens` and `flops` (6ND) describe the training; `cost` is the whole bill,
    `training_cost` its first part; `unaware_cost` is the bill of the training-optimal model.
    """

    loss: float
    n_params: float
    tokens: float
    flops: float
    cost: float
    training_cost: float
    unaware_cost: float

    @property
    def saving(self) -> float:
        """The part of the unaware bill that is saved."""
        return 1 - self.cost / self.unaware_cost


def inference_optimum(
    law: ChinchillaLaw,
    loss: float,
    *,
    input_tokens: float = 0.0,
    output_tokens: float = 0.0,
    cost: FlopCost | None = None,
) -> InferenceOptimum:
    """Return the N and D of least total cost that reach `loss` (Sardana et al., arXiv 2401.00448).

    Minimises c_train·6ND + (c_in·T_in + c_out·T_out)·2N on the curve L(N, D) = loss, each c a price
    over its MFU. Without inference tokens this is the training-only optimum at that loss. More
    inference makes the model smaller and its training longer.

    Raises ValueError for a loss that the law cannot reach and for negative token counts.

    >>> from mupgpt.scaling.chinchilla import HOFFMANN_2022
    >>> target = HOFFMANN_2022.optimum(1e23)
    >>> used = inference_optimum(HOFFMANN_2022, target.loss, output_tokens=2e12)
    >>> used.n_params < target.n_params, used.tokens > target.tokens
    (True, True)
    """
    if not law.E < loss < math.inf:
        raise ValueError(f"loss = {loss:g}: the law reaches losses above its E = {law.E:.4g} only")
    for name, tokens in (("input_tokens", input_tokens), ("output_tokens", output_tokens)):
        if not 0 <= tokens < math.inf:
            raise ValueError(f"{name} = {tokens:g}: give a finite count, 0 for none")
    cost = cost or FlopCost()
    per_param = 2 * (cost.input * input_tokens + cost.output * output_tokens)
    trained = _training_optimum(law, loss)
    log_n = _least_cost(law, loss, 6 * cost.train, per_param, trained)
    training, total = _bill(law, loss, log_n, 6 * cost.train, per_param)
    n_params, tokens = math.exp(log_n), _tokens(law, loss, log_n)
    return InferenceOptimum(
        loss=loss,
        n_params=n_params,
        tokens=tokens,
        flops=6 * n_params * tokens,
        cost=total,
        training_cost=training,
        unaware_cost=_bill(law, loss, trained, 6 * cost.train, per_param)[1],
    )


def _training_optimum(law: ChinchillaLaw, loss: float) -> float:
    """ln N of the cheapest training: there αA·N^−α = βB·D^−β, so A·N^−α is β/(α+β) of loss − E."""
    share = (loss - law.E) * law.beta / (law.alpha + law.beta)
    return math.log(law.A / share) / law.alpha


def _least_cost(
    law: ChinchillaLaw, loss: float, per_flop: float, per_param: float, trained: float
) -> float:
    """ln N where d(cost)/d(ln N) = 0. It lies between the smallest N of that loss and `trained`."""
    smallest = math.log(law.A / (loss - law.E)) / law.alpha

    def slope(log_n: float) -> float:
        gap = loss - law.E - law.A * math.exp(-law.alpha * log_n)
        longer = law.alpha * law.A * math.exp(-law.alpha * log_n) / (law.beta * gap)
        return per_flop * _tokens(law, loss, log_n) * (1 - longer) + per_param

    # Tokens diverge at the smallest size, where the slope is −∞: come near enough to see it.
    span = step = trained - smallest
    while slope(smallest + step) > 0:
        step /= 2
    low = smallest + step
    return root_scalar(slope, bracket=(low, trained), xtol=1e-13).root if step < span else trained


def _tokens(law: ChinchillaLaw, loss: float, log_n: float) -> float:
    gap = loss - law.E - law.A * math.exp(-law.alpha * log_n)
    return (law.B / gap) ** (1 / law.beta)


def _bill(
    law: ChinchillaLaw, loss: float, log_n: float, per_flop: float, per_param: float
) -> tuple[float, float]:
    n_params = math.exp(log_n)
    training = per_flop * n_params * _tokens(law, loss, log_n)
    return training, training + per_param * n_params
