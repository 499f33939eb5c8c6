"""How two runs differ along every axis, and what a transfer along it rests on."""

from dataclasses import dataclass
from typing import Literal

from mupgpt.config.schema import TrainConfig
from mupgpt.mutransfer.choices import Choice, chosen
from mupgpt.parametrization.axes import AXES, RULE_AXES, AxisName, AxisRow, RuleAxis
from mupgpt.parametrization.rules import Rule, get_rule

__all__ = ["Axis", "axes_between"]

Status = Literal["covered", "heuristic", "unsupported"]


@dataclass(frozen=True)
class Axis:
    """Where source and target stand on one axis, and what covers it."""

    name: AxisName
    source: float | str
    target: float | str
    status: Status
    by: str

    @property
    def differs(self) -> bool:
        """Whether source and target do differ."""
        return self.source != self.target

    @property
    def ratio(self) -> float | None:
        """Target over source, where that means something."""
        a, b = self.source, self.target
        return b / a if isinstance(a, int | float) and isinstance(b, int | float) else None


def axes_between(
    a: TrainConfig, b: TrainConfig, choices: tuple[Choice, ...] | None = None
) -> list[Axis]:
    """Every axis on which two runs may differ, with what the rule of ``a`` says of it.

    ``choices`` are those of a transfer; None: those that the rule comes with.
    """
    rule = get_rule(a.rule)
    choices = chosen(rule) if choices is None else choices
    return [
        Axis(row.name, row.value(a), row.value(b), *_covered(row, rule, choices))
        for row in AXES.values()
    ]


def _covered(row: AxisRow, rule: Rule, choices: tuple[Choice, ...]) -> tuple[Status, str]:
    """The status of an axis, and what that rests on."""
    for axis in RULE_AXES:
        if axis == row.name:
            return _by_rule(rule, axis)
    if not row.practice:
        return "unsupported", "no rule; the optimum may move"
    said = "; ".join(f"{c.says} ({c.source})" for c in choices if row.name in c.axes)
    return "heuristic", said + row.beside if said else row.practice.format(rule=rule.name)


def _by_rule(rule: Rule, axis: RuleAxis) -> tuple[Status, str]:
    """What ``rule`` says of an axis: its status, and what that rests on."""
    if axis in rule.covers:
        return "covered", rule.source
    if axis in rule.practice:
        return "heuristic", rule.practice[axis]
    says = "says nothing" if rule.covers else "is a control"
    return "unsupported", f"rule {rule.name} {says}"
