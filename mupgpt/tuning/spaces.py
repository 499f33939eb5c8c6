"""A space that can be searched: what a joint sweep looks at when nobody says otherwise.

The start of a hidden matrix is given in units of 1/√fan_in at the base, where activations keep
their size: from half to twice of it. Rates, multipliers and the logits' scale keep wide ranges.
sweeps/README.md has what was measured.
"""

import math

from mupgpt.config.schema import Base
from mupgpt.tuning.space import Dimension

__all__ = ["balanced_space"]

LR = (5e-4, 5e-2)
STD = (0.5, 2.0)  # × 1/√d_model of the base
EMB_MULT = (0.2, 30.0)
OUTPUT_MULT = (0.2, 16.0)
LR_MULT_HIDDEN = (0.25, 32.0)


def balanced_space(base: Base) -> dict[str, Dimension]:
    """Dotted key → range of the five hyperparameters that decide how a base is balanced.

    >>> from mupgpt.resolve import get_preset
    >>> space = balanced_space(Base.of(get_preset("proxy-64").shape))
    >>> space["hparams.init_std"].low, space["hparams.init_std"].high
    (0.0625, 0.25)
    """
    unit = 1 / math.sqrt(base.d_model)
    ranges = {
        "lr": LR,
        "init_std": (STD[0] * unit, STD[1] * unit),
        "emb_mult": EMB_MULT,
        "output_mult": OUTPUT_MULT,
        "lr_mult_hidden": LR_MULT_HIDDEN,
    }
    return {
        f"hparams.{name}": Dimension(low=low, high=high, log=True)
        for name, (low, high) in ranges.items()
    }
