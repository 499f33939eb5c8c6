"""One parameter count for runs whose count is not one number: sparse, pruned or growing."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid

from mupgpt.scaling.runs import FloatArray, as_columns, positive

__all__ = ["average_params", "average_params_along", "sparse_params"]


def sparse_params(hidden: float, rest: float, density: ArrayLike) -> FloatArray:
    """Return the parameters in use when a part of the hidden ones is kept: ρ·hidden + rest.

    `hidden` counts the masked matrices, `rest` what stays dense (embeddings, norms, biases).

    Raises ValueError for a density outside (0, 1].

    >>> sparse_params(hidden=8e7, rest=3e7, density=0.25).item()
    50000000.0
    """
    kept = np.asarray(density, float)
    if not np.all((kept > 0) & (kept <= 1)):
        raise ValueError(f"density = {density}: give the part of the weights kept, in (0, 1]")
    return kept * hidden + rest


def average_params(n_params: ArrayLike, tokens: ArrayLike) -> float:
    """Return N̄ = (1/D)·∫N dt of a run made of phases: Σ N_i·D_i / Σ D_i.

    The loss of a sparse or growing run follows Chinchilla's law at N̄ ("Journey Matters",
    arXiv 2501.12486): use it as `n_params` of `Runs`, and 6·N̄·D are the training FLOPs.
    `n_params` are the parameters in use in each phase, `tokens` the tokens of that phase.

    >>> average_params([1e8, 4e8], tokens=[3e9, 1e9])
    175000000.0
    """
    sizes, spent = as_columns(n_params=n_params, tokens=tokens).values()
    return float(sizes @ spent / spent.sum())


def average_params_along(n_params: ArrayLike, tokens_seen: ArrayLike) -> float:
    """Return N̄ of a run whose count changes gradually, from points along it (trapezoid rule).

    `tokens_seen` is the number of tokens seen when each count was noted, from 0 to the end.

    Raises ValueError unless `tokens_seen` starts at 0 and rises.

    >>> average_params_along([4e8, 4e8, 2e8], tokens_seen=[0, 1e9, 3e9])
    333333333.3333333
    """
    sizes, seen = positive("n_params", n_params), np.asarray(tokens_seen, float)
    if len(sizes) != len(seen):
        raise ValueError(f"{len(sizes)} counts for {len(seen)} tokens_seen: give one count each")
    if len(seen) < 2 or seen[0] != 0 or not np.all(np.diff(seen) > 0):
        raise ValueError(f"tokens_seen = {tokens_seen}: start at 0 and rise to the run's tokens")
    return float(trapezoid(sizes, seen) / seen[-1])
