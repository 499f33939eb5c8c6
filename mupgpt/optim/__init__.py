"""Optimizers whose groups are a table's rows, for one model or for members."""

from mupgpt.optim.clip import clip_gradients
from mupgpt.optim.groups import param_groups
from mupgpt.optim.make import make_optimizer
from mupgpt.optim.rates import assert_rates, effective_lrs, set_lr

__all__ = [
    "assert_rates",
    "clip_gradients",
    "effective_lrs",
    "make_optimizer",
    "param_groups",
    "set_lr",
]
