"""Choices beside the rule: what a transfer may do about axes that no parametrization covers.

Each is a literal with its name, its source, and how far the evidence for it reaches. A transfer
prints those that it made; ``decay-time`` is made wherever the rule keeps lr·λ over width, the
others only where they are asked for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.parametrization.axes import AxisName
from mupgpt.parametrization.rules import Rule, get_rule

__all__ = ["CHOICES", "Choice", "chosen"]

Move = Callable[[TrainConfig, TrainConfig], TrainConfig]
"""(source, target) → the target with its hyperparameters or its schedule moved."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One practice, named as in ``transfer(..., choose=[name])`` and ``--choose NAME``."""

    name: str
    settles: str
    """What it decides; two choices cannot decide the same."""
    axes: tuple[AxisName, ...]
    """Axes of a transfer that it answers, as far as it does."""
    says: str
    """What it does."""
    source: str
    """Where it is from."""
    reach: str
    """How far the evidence reaches, and where it stops."""
    move: Move

    def __str__(self) -> str:
        return f"{self.name}: {self.says} ({self.source}). {self.reach}"


def _keep_decay_time(source: TrainConfig, target: TrainConfig) -> TrainConfig:
    """λ' = λ·(lr·S)/(lr'·S'), rounded as λ·S/S' where lr is kept."""
    before, after = source.hparams, target.hparams
    moved = before.weight_decay * source.steps / target.steps
    if after.lr != before.lr:
        moved *= before.lr / after.lr
    return replace(target, hparams=replace(after, weight_decay=moved))


def _batch_ratio(source: TrainConfig, target: TrainConfig) -> float:
    """κ, the ratio of tokens a step."""
    return target.tokens_per_step / source.tokens_per_step


def _needs_adam(target: TrainConfig, name: str) -> None:
    has = get_rule(target.rule).optimizer == "adamw"
    remedy = f"be left out: it is Adam's, and rule {target.rule} has another optimizer"
    require(has, "choose", name, remedy)


def _square_root(source: TrainConfig, target: TrainConfig) -> TrainConfig:
    """lr·√κ, 1 − κ(1 − β) for both β, ε/√κ."""
    _needs_adam(target, "batch-sqrt")
    ratio, hp = _batch_ratio(source, target), target.hparams
    forget = {beta: ratio * (1 - getattr(hp, beta)) for beta in ("beta1", "beta2")}
    for beta, value in forget.items():
        if value >= 1:
            raise ConfigError(
                f"choose = 'batch-sqrt': {ratio:g} times the tokens a step would take "
                f"1 − hparams.{beta} from {1 - getattr(hp, beta):g} to {value:g}; it must stay "
                "under 1: sweep at a batch nearer to the target's, or choose batch-half-life"
            )
    betas = {beta: 1 - value for beta, value in forget.items()} if ratio != 1 else {}
    hp = replace(hp, lr=hp.lr * ratio**0.5, eps=hp.eps / ratio**0.5, **betas)
    return replace(target, hparams=hp)


def _half_life(source: TrainConfig, target: TrainConfig) -> TrainConfig:
    """β₂^κ: as many tokens until a squared gradient counts half."""
    _needs_adam(target, "batch-half-life")
    ratio, old = _batch_ratio(source, target), target.hparams.beta2
    beta2 = old**ratio
    if beta2 < 0.5 <= old:
        raise ConfigError(
            f"choose = 'batch-half-life': {ratio:g} times the tokens a step would take "
            f"hparams.beta2 from {old:g} to {beta2:.2g}, an average over less than one step: "
            "sweep at a batch nearer to the target's"
        )
    return replace(target, hparams=replace(target.hparams, beta2=beta2))


def _to_zero(source: TrainConfig, target: TrainConfig) -> TrainConfig:
    return replace(target, schedule=replace(target.schedule, shape="linear", end=0.0))


CHOICES: dict[str, Choice] = {
    choice.name: choice
    for choice in (
        Choice(
            name="batch-sqrt",
            settles="batch",
            axes=("batch",),
            says="κ times the tokens a step: lr × √κ, 1 − β × κ for both β, ε ÷ √κ",
            source="Malladi et al. 2022, arXiv 2205.10287",
            reach="Derived for steps that are mostly gradient noise and for small κ(1 − β): not"
            " beyond the critical batch, nor for the first steps of a run. In our own sweep, at"
            " equal steps and with both β kept, the best lr grew as κ to 0.29 ± 0.06.",
            move=_square_root,
        ),
        Choice(
            name="batch-half-life",
            settles="batch",
            axes=("batch",),
            says="κ times the tokens a step: β₂ to the power κ, so that it forgets as many tokens;"
            " lr kept",
            source="Marek et al. 2025, arXiv 2507.07101",
            reach="Found going down to batches of one sequence, with lr tuned at each batch: it"
            " moves β₂ alone and leaves the optimum of lr where it may have moved.",
            move=_half_life,
        ),
        Choice(
            name="decay-to-zero",
            settles="schedule",
            axes=(),
            says="the learning rate falls linearly to 0",
            source="Bergsma et al. 2025, arXiv 2502.15938",
            reach="0.77 % less loss than a fall to a tenth at 610M parameters and 20 tokens a"
            " parameter, at the best peak of each; more for longer runs. Sweep under it, too: the"
            " proxy's optimum was found under the proxy's schedule.",
            move=_to_zero,
        ),
        Choice(
            name="decay-time",
            settles="weight decay",
            axes=("steps",),
            says="λ moved to keep lr·λ·steps",
            source="arXiv 2405.13698",
            reach="Where the rule keeps lr·λ over width (`mup`), AdamW's averaging time stays the"
            " same share of the run; where it does not (`cerebras`), that of the blocks' matrices"
            " moves against their lr. The best share itself"
            " falls with tokens per parameter, about as their power −0.53 (arXiv 2505.13738): that"
            " is not moved.",
            move=_keep_decay_time,
        ),
    )
}  # fmt: skip
"""Every choice by name, in the order in which a transfer makes them: λ follows lr."""


def chosen(rule: Rule, names: Iterable[str] = ()) -> tuple[Choice, ...]:
    """The choices of these names, and ``decay-time`` where the rule keeps lr·λ over width.

    Raises `ConfigError` for an unknown name, and where two settle the same.

    >>> [choice.name for choice in chosen(get_rule("mup"), ["decay-to-zero"])]
    ['decay-to-zero', 'decay-time']
    >>> chosen(get_rule("cerebras"))
    ()
    """
    names = {*names, *(["decay-time"] if rule.keeps_decay_time else [])}
    for name in names:
        if name not in CHOICES:
            raise unknown("choice", name, CHOICES)
    choices = tuple(choice for name, choice in CHOICES.items() if name in names)
    for choice in choices:
        rivals = [other.name for other in choices if other.settles == choice.settles]
        require(len(rivals) == 1, "choose", rivals, f"be one: both settle the {choice.settles}")
    return choices
