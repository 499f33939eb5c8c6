"""The learning rates of a step: derived from the table, never read back, and checked."""

from collections.abc import Sequence

import torch

from mupgpt.model.gpt import GPT
from mupgpt.optim.members import MemberAdamW
from mupgpt.parametrization.table import ParamTable

__all__ = ["assert_rates", "effective_lrs", "set_lr"]


def set_lr(optimizer: torch.optim.Optimizer, factor: float | Sequence[float]) -> None:
    """Derive every group's ``lr`` as factor × the table's: never read back, never accumulated.

    For members the factor may be one for all, or one each.
    """
    groups = optimizer.param_groups
    if not isinstance(groups[0]["table_lr"], tuple):
        assert not isinstance(factor, Sequence), "one model has one factor"
        for group in groups:
            group["lr"] = group["table_lr"] * factor
        return
    members = len(groups[0]["table_lr"])
    factors = factor if isinstance(factor, Sequence) else [factor] * members
    if isinstance(optimizer, MemberAdamW) and optimizer.vectors:
        optimizer.load(factors)
        return
    for group in groups:
        group["lr"] = tuple(lr * f for lr, f in zip(group["table_lr"], factors, strict=True))


def effective_lrs(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate that each parameter has at this moment, by name (one model)."""
    groups = optimizer.param_groups
    return {name: group["lr"] for group in groups for name in group["names"]}


def assert_rates(
    model: GPT, optimizer: torch.optim.Optimizer, table: ParamTable, factor: float
) -> None:
    """Our promise: each parameter of ``model`` is stepped once, at ``factor`` × the table's rate.

    Whatever replaces parameters or rates without an optimizer's knowledge breaks µP without a word.
    """
    groups = optimizer.param_groups
    stepped = [pair for g in groups for pair in zip(g["names"], map(id, g["params"]), strict=True)]
    present = [(name, id(p)) for name, p in model.named_parameters()]
    assert sorted(stepped) == sorted(present), "the optimizer's parameters are not the model's"
    for name, lr in effective_lrs(optimizer).items():
        expected = table.rows[name].lr * factor
        assert lr == expected, f"lr of {name} is {lr}, the table says {expected}"
