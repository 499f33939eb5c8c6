"""Coordinate check of your own modules: does every layer learn as much at every width?

A module of several widths is trained for a few steps from several seeds. How far the output of each
layer moves is a power of the width, and under a rule that scales that power is 0 for all of them:
they learn, and do not blow up. Multipliers that a layer's weights carry are divided out.

The scores of torch's ``scaled_dot_product_attention`` are a layer too. Their level at the start
times √d_head shows what their change shows late: that heads have grown under 1/√d_head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mupgpt.errors import require
from mupgpt.evidence.coordinates import SEEDS
from mupgpt.evidence.probes import Measures
from mupgpt.evidence.slopes import Slope, fit_slopes
from mupgpt.interop.adopt import Adopted
from mupgpt.util.text import align

__all__ = ["ModuleCheck", "coord_check_module"]

Loss = Callable[[nn.Module, int], Tensor]
"""(model, seed) → the loss of that seed's batch, a scalar."""
Outputs = dict[str, list[Tensor]]
"""Layer, the index in its stack as ``*`` → outputs of all that are alike, in order."""
SCORES = "attention scores"


@dataclass(frozen=True, kw_only=True)
class ModuleCheck:
    """Whether each layer's output moves by as much at every width."""

    rule: str
    widths: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    slopes: tuple[Slope, ...]
    """One a layer, in the order of the forward."""

    @property
    def passed(self) -> bool:
        """Whether every slope is 0."""
        return all(slope.ok for slope in self.slopes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "passed": self.passed,
            "rule": self.rule,
            "widths": list(self.widths),
            "seeds": list(self.seeds),
            "steps": self.steps,
            "probes": [slope.to_dict() for slope in self.slopes],
        }

    def __str__(self) -> str:
        widths = ", ".join(f"{width:g}" for width in self.widths)
        rows = [("measure", "layer", "slope", "se", "")]
        for s in self.slopes:
            mark = "" if s.ok else "off"
            rows.append((s.measure, s.probe, f"{s.slope:+.2f}", f"{s.se:.2f}", mark))
        return "\n".join([
            f"{self.rule}: slopes of log2 RMS over log2 width ({widths}), {len(self.seeds)} seeds, "
            f"{self.steps} steps; all should be 0",
            *align(rows, {2, 3}),
            f"{self.rule}: {'PASSED' if self.passed else 'FAILED'}",
        ])  # fmt: skip


def coord_check_module(
    adopted: Adopted,
    loss: Loss,
    widths: Sequence[int] | Mapping[int, Any],
    *,
    seeds: Sequence[int] = SEEDS[:4],
    steps: int = 10,
) -> ModuleCheck:
    """How the change of each layer's output over ``steps`` depends on width, against 0.

    ``loss(model, seed)`` is the loss of one batch that depends on the seed alone. Take few tokens:
    theory speaks of widths beyond the number of tokens. ``widths`` are what ``model_fn`` takes, or
    map a width to it. Gradients are not clipped. Raises `ConfigError` for fewer than three widths
    or seeds, or fewer than 10 steps.
    """
    sizes = dict(widths) if isinstance(widths, Mapping) else {width: width for width in widths}
    order, seeds = tuple(sorted(sizes)), tuple(dict.fromkeys(seeds))
    require(len(order) >= 3, "widths", order, "be at least three")
    require(len(seeds) >= 3, "seeds", seeds, "be at least three")
    require(steps >= 10, "steps", steps, "be at least 10: early steps are not typical")
    runs: list[Measures] = []
    for width in order:
        columns = [_measure(adopted, sizes[width], loss, seed, steps) for seed in seeds]
        runs.append({key: torch.stack([column[key] for column in columns]) for key in columns[0]})
    expected = {
        measured: dict.fromkeys((p for m, p in runs[0] if m == measured), 0.0)
        for measured in ("init", "change")
    }
    return ModuleCheck(
        rule=adopted.rule.name,
        widths=order,
        seeds=seeds,
        steps=steps,
        slopes=tuple(fit_slopes("width", order, runs, expected)),
    )


def _measure(adopted: Adopted, size: Any, loss: Loss, seed: int, steps: int) -> Measures:
    """RMS of the change of every layer's output on the batch that it was trained on."""
    model = adopted.build(size, seed)
    optimizer, carried = adopted.optimizer(model), _carried(adopted, model)
    start, d_head = _outputs(adopted, model, loss, seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, seed).backward()
        optimizer.step()
    end, _ = _outputs(adopted, model, loss, seed)
    measures: Measures = {}
    if d_head:
        measures["init", f"{SCORES} × √d_head"] = _rms(start[SCORES]) * d_head**0.5
    for layer, before in start.items():
        moved = [b - a for a, b in zip(before, end[layer], strict=True)]
        measures["change", layer] = _rms(moved) / carried.get(layer, 1.0)
    return measures


def _rms(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values]).square().mean().sqrt()


def _carried(adopted: Adopted, model: nn.Module) -> dict[str, float]:
    """Layer → the multiplier in its output that theory has behind it."""
    inside = {}
    for name, factor in adopted.carried(model).items():
        part = adopted.reading.parts[adopted.reading.locate(name)[0]]
        if part.role in ("hidden", "norm"):
            inside[part.module] = factor
    return inside


@torch.no_grad()
def _outputs(adopted: Adopted, model: nn.Module, loss: Loss, seed: int) -> tuple[Outputs, int]:
    """Outputs of all modules that own parameters, and attention scores; the width of a head."""
    seen: Outputs = {}

    def keep(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                seen.setdefault(layer, []).append(out.clone())

        return hook

    handles = [
        module.register_forward_hook(keep(adopted.reading.locate(name)[0]))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        with _Scores(seen) as scores:
            loss(model, seed)
    finally:
        for handle in handles:
            handle.remove()
    return seen, scores.d_head


class _Scores(TorchFunctionMode):
    """Keeps the scores of every fused attention, masked ones too, and how wide a head is."""

    def __init__(self, seen: Outputs) -> None:
        super().__init__()
        self.seen = seen
        self.d_head = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]  # (…, H, T, E)
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
            self.d_head = q.shape[-1]
            scale = kwargs.get("scale") or self.d_head**-0.5
            self.seen.setdefault(SCORES, []).append(q @ k.mT * scale)
        return func(*args, **kwargs)
