"""From tuned hyperparameters to the config of another size, saying what covers each difference.

Width is covered by a µP rule. Depth, batch, context and horizon transfer in practice but not by
theory (Yang et al. 2022, arXiv 2203.03466, Table 1 marks them as empirical);
`mupgpt.mutransfer.choices` has what may be done about them. Vocabulary and corpus are covered by
nothing: they must be accepted aloud.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mupgpt.config.fields import differing
from mupgpt.config.plain import finite, to_dict
from mupgpt.config.schedules import least_warmup, warmup_steps
from mupgpt.config.schema import Prediction, TrainConfig
from mupgpt.errors import ConfigError
from mupgpt.mutransfer.axes import Axis, axes_between
from mupgpt.mutransfer.choices import Choice, chosen
from mupgpt.mutransfer.tuned import Tuned, Uncertainty
from mupgpt.parametrization.axes import find_axis
from mupgpt.parametrization.layout import count_params
from mupgpt.parametrization.rules import Rule, get_rule
from mupgpt.parametrization.table import ParamTable, parametrize
from mupgpt.presets import PRESETS
from mupgpt.resolve import overlay, train_config
from mupgpt.util.text import show

__all__ = ["Change", "TransferPlan", "decay_time", "transfer"]


@dataclass(frozen=True)
class Change:
    """A field of the config that the transfer set, and why."""

    field: str
    old: Any
    new: Any
    why: str


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """The target's config with an account of how it came about; `transfer` makes it.

    >>> plan = transfer("cerebras-gpt-40m", to="cerebras-gpt-13b")
    >>> [axis.name for axis in plan.axes]
    ['width', 'd_head', 'depth', 'batch', 'steps', 'tokens/parameter']
    """

    config: TrainConfig
    source: TrainConfig
    origin: Mapping[str, Any]
    axes: tuple[Axis, ...]
    changes: tuple[Change, ...]
    choices: tuple[Choice, ...]
    """What was done beside the rule."""

    @property
    def table(self) -> ParamTable:
        """The target's table."""
        c = self.config
        return parametrize(c.model, c.base, c.hparams, c.rule)

    @property
    def prediction(self) -> Prediction:
        """The loss expected of the target (falsy when none was made): part of its config."""
        return self.config.prediction

    def expecting(self, prediction: Prediction) -> "TransferPlan":
        """This plan with the target's loss said beforehand; its run is held against it."""
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, prediction=prediction)
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole record as plain data; ``config`` is what `train_config` accepts."""
        rows = [dataclasses.asdict(row) for row, _ in self.table.sites()]
        return {
            "origin": dict(self.origin),
            "axes": [{**dataclasses.asdict(a), "ratio": a.ratio} for a in self.axes],
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "choices": [
                {key: getattr(choice, key) for key in ("name", "says", "source", "reach")}
                for choice in self.choices
            ],
            "decay_time": {
                "source": finite(decay_time(self.source)),
                "target": finite(decay_time(self.config)),
            },
            "prediction": to_dict(self.prediction) if self.prediction else None,
            "source": to_dict(self.source),
            "config": to_dict(self.config),
            "sites": [{k: v for k, v in row.items() if k != "name"} for row in rows],
            "multipliers": {k: m.value for k, m in self.table.multipliers.items()},
        }

    def to_toml(self) -> str:
        """The target's config as a TOML file that ``mupgpt train`` executes."""
        import tomli_w

        head = [f"# From {self.origin.get('study', 'given hyperparameters')} under rule "]
        head[0] += self.config.rule
        head += [f"# {a.name}: {show(a.source)} → {show(a.target)}, {a.status}: {a.by}"
                 for a in self.axes]  # fmt: skip
        head += [f"# choice {choice}" for choice in self.choices]
        head += [f"# predicted loss: {self.prediction}"] if self.prediction else []
        return "\n".join(head) + "\n\n" + tomli_w.dumps(to_dict(self.config))

    def __str__(self) -> str:
        model = self.config.model
        lines = [
            f"rule {self.config.rule}; target {count_params(model):,} parameters, "
            f"{self.config.tokens:,} tokens in {self.config.steps:,} steps",
            "",
            f"{'axis':<18}{'source':>15}  {'target':>17}  {'ratio':>8}  covered by",
        ]
        for a in self.axes:
            ratio = f"×{a.ratio:.4g}" if a.ratio is not None else ""
            lines.append(
                f"{a.name:<18}{show(a.source):>15}  {show(a.target):>17}  {ratio:>8}"
                f"  {a.status}: {a.by}"
            )
        lines += ["", "what changed"]
        lines += [f"  {c.field}: {show(c.old)} → {show(c.new)}  ({c.why})" for c in self.changes]
        lines += ["", "choices beside the rule"] if self.choices else []
        lines += [f"  {choice}" for choice in self.choices]
        before, after = decay_time(self.source), decay_time(self.config)
        if math.isfinite(after):
            lines.append(
                f"  AdamW timescale of hidden matrices, 1/(lr·λ·steps): "
                f"{before:.3g} → {after:.3g} of the run"
            )
        lines += self._known()
        if self.prediction:
            lines.append(f"  predicted loss: {self.prediction}")
        return "\n".join(lines)

    def _known(self) -> list[str]:
        """How well the tuned values are known, and with them the target's hidden learning rate."""
        known = {k: Uncertainty(**u) for k, u in self.origin.get("uncertainty", {}).items()}
        if not known:
            return []
        hparams = to_dict(self.source)["hparams"]
        names = {key: key.removeprefix("hparams.") for key in known}
        lines = ["", "how well the tuned values are known"]
        lines += [f"  {names[key]} {hparams[names[key]]:.4g}: {u}" for key, u in known.items()]
        parts = [known[k] for k in ("hparams.lr", "hparams.lr_mult_hidden") if k in known]
        factors = [u.factor for u in parts if u.factor]
        if parts and len(factors) == len(parts):
            factor = math.exp(math.hypot(*map(math.log, factors)))
            rates = {r.lr for r in self.table.rows.values() if r.role == "hidden"}
            shown = ", ".join(f"{rate:.2e}" for rate in sorted(rates))
            lines.append(f"  so the target's hidden learning rate is {shown}, ×/÷ {factor:.2f}")
        return lines


def decay_time(config: TrainConfig) -> float:
    """AdamW's averaging time of the hidden matrices as a fraction of the run, 1/(lr·λ·steps).

    Wang & Aitchison, arXiv 2405.13698; infinite without weight decay.

    >>> config = train_config({"model": "cerebras-gpt-40m"})
    >>> round(decay_time(config), 3)
    1.093
    """
    table = parametrize(config.model, config.base, config.hparams, config.rule)
    row = next(row for row in table.params if row.role == "hidden")
    return 1.0 / (row.lr_wd * config.steps) if row.lr_wd else math.inf


def transfer(
    source: Tuned | TrainConfig | str,
    to: str | Mapping[str, Any],
    accept: Iterable[str] = (),
    choose: Iterable[str] = (),
) -> TransferPlan:
    """The plan that takes tuned hyperparameters to another size.

    ``source`` is what a sweep found (`best_hparams`), a run, or a preset's name, for its published
    values. ``to`` is a preset's name or plain config data (its ``steps``, ``batch_size`` and
    ``data`` are the target's recipe; rule, base and hyperparameters come from the source). An axis
    that differs and that nothing covers must be named in ``accept``; ``choose`` names what to do
    beside the rule (`mupgpt.mutransfer.choices.CHOICES`). Raises `ConfigError` for an axis that was
    not accepted, and for a name that is no preset's.

    >>> plan = transfer("cerebras-gpt-40m", to="cerebras-gpt-13b")
    >>> f"{plan.table.site('blocks.*.attn.q.weight').lr:.1e}"
    '3.0e-04'
    """
    source = _published(source) if isinstance(source, str) else source
    tuned = source if isinstance(source, Tuned) else None
    config = source.config if isinstance(source, Tuned) else source
    rule = get_rule(config.rule)
    target = _target(config, to)
    choices = chosen(rule, choose)
    axes = tuple(axis for axis in axes_between(config, target, choices) if axis.differs)
    _refuse(axes, tuple(accept), rule)
    target, changes = _move(config, target, choices)
    return TransferPlan(
        config=target, source=config, origin=_origin(tuned), axes=axes, changes=tuple(changes),
        choices=choices,
    )  # fmt: skip


def _published(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise ConfigError(
            f"source = {name!r}: no preset of that name; the result of a sweep is taken as "
            f"transfer(best_hparams({name!r}), …)"
        )
    return train_config({"model": name})


def _origin(tuned: Tuned | None) -> dict[str, Any]:
    if tuned is None:
        return {"study": "given hyperparameters"}
    facts = to_dict(tuned)
    return {k: v for k, v in facts.items() if k != "config"}


def _target(source: TrainConfig, to: str | Mapping[str, Any]) -> TrainConfig:
    """The target's shape and recipe with the source's rule, base and hyperparameters."""
    raw: Mapping[str, Any] = {"model": to} if isinstance(to, str) else to
    moved = {
        "rule": source.rule,
        "base": to_dict(source.base),
        "hparams": to_dict(source.hparams),
    }
    target = train_config(overlay(raw, moved))
    same_text = target.model.vocab_size == source.model.vocab_size and "data" not in raw
    return dataclasses.replace(target, data=source.data) if same_text else target


def _phases(c: TrainConfig) -> str:
    """The run's phases in words."""
    return ", ".join(f"{p.steps} steps of {p.batch_size} × {p.seq_len}" for p in c.course)


def _refuse(axes: tuple[Axis, ...], accept: tuple[str, ...], rule: Rule) -> None:
    accepted = {find_axis(name, "axis to accept").name for name in accept}
    open_axes = [a for a in axes if a.status == "unsupported" and a.name not in accepted]
    if open_axes:
        listed = "; ".join(f"{a.name} {show(a.source)} → {show(a.target)}" for a in open_axes)
        flags = " ".join(f"--accept '{a.name}'" if " " in a.name else f"--accept {a.name}"
                         for a in open_axes)  # fmt: skip
        raise ConfigError(
            f"rule {rule.name} does not cover: {listed}. "
            f"Tune nearer to the target, or take the risk aloud: {flags}"
        )


def _move(
    source: TrainConfig, target: TrainConfig, choices: tuple[Choice, ...]
) -> tuple[TrainConfig, list[Change]]:
    """The target with what was chosen and its warm-up moved, and the list of what differs."""
    changes = [
        Change(f"model.{name}", old, new, "the target's shape")
        for name, old, new in _differences(source.model, target.model)
    ]
    recipe = differing(source, target, "result", "measure", "execution", apart=TOLD)
    for name, old, new in recipe:
        if name == "phases":
            old, new = _phases(source), _phases(target)
        changes.append(Change(name, old, new, "the target's recipe"))
    whys: dict[str, str] = {}
    steps = [(f"choice {choice.name}", choice.move) for choice in choices]
    for why, step in (*steps, ("at least 2/(1 − β₂) steps", _warm)):
        moved = step(source, target)
        whys |= {field: why for field, _, _ in _settings(target, moved)}
        target = moved
    changes += [
        Change(field, old, new, whys.get(field, "the target's recipe"))
        for field, old, new in _settings(source, target)
    ]
    return target, changes


def _settings(a: TrainConfig, b: TrainConfig) -> list[tuple[str, Any, Any]]:
    """What differs in hyperparameters and schedule: field, old, new."""
    return [
        (f"{part}.{name}", old, new)
        for part in ("hparams", "schedule")
        for name, old, new in _differences(getattr(a, part), getattr(b, part))
    ]


TOLD = ("model", "rule", "base", "hparams", "schedule")
"""What a transfer tells of by itself: the shape, the tuned values, and what choices move."""


def _differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return [(name, old, new) for name, old, new in pairs if old != new]


def _warm(source: TrainConfig, target: TrainConfig) -> TrainConfig:
    """The target with a warm-up of at least 2/(1 − β₂) steps (but at most half the run)."""
    s, least = target.schedule, least_warmup(target.hparams.beta2)
    if warmup_steps(s, target.steps, target.tokens_per_step) >= least:
        return target
    warmed = dataclasses.replace(s, warmup=min(0.5, least / target.steps), warmup_tokens=0)
    return dataclasses.replace(target, schedule=warmed)
