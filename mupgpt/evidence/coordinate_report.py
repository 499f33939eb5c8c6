"""What a coordinate check found: every slope against its rule, and which part is likely broken."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mupgpt.config.plain import finite
from mupgpt.evidence.slopes import ALLOWANCE, Slope, is_zero
from mupgpt.parametrization.axes import SizeAxis
from mupgpt.parametrization.words import Role

__all__ = ["CoordCheck", "find_suspects"]

AGREEMENT = 1e-3
"""Nats by which a token's loss may differ between training and generation."""


@dataclass(frozen=True)
class Witness:
    """Where a broken part of a rule shows first, apart from errors that reach it from elsewhere."""

    part: str
    """Field and key of the `Rule`."""
    says: str
    probe: tuple[str, str]
    less: tuple[tuple[str, str], ...] = ()
    """Measures whose deviations reach this one and are subtracted."""


ROLES: dict[Role, str] = {
    "input": "embeddings",
    "hidden": "hidden matrices",
    "output": "readout's weight",
    "bias": "biases",
    "norm": "norms",
}
WITNESSES = (
    *(
        Witness(f"init_std.{role}", f"initial std of the {ROLES[role]}", ("weights", role))
        for role in ("input", "hidden", "output")
    ),
    Witness(
        "residual_out_std",
        "initial std of matrices that write into the residual stream",
        ("weights", "residual_out"),
        (("weights", "hidden"),),
    ),
    Witness("forward.emb", "embedding multiplier", ("init", "emb"), (("weights", "input"),)),
    Witness(
        "forward.attn",
        "attention multiplier: scores go as 1/d_head, not as 1/√d_head",
        ("init", "scores"),
        (("init", "q"), ("init", "k")),
    ),
    Witness("forward.residual", "residual multipliers", ("init", "branch"), (("init", "down"),)),
    Witness("forward.readout", "readout multiplier", ("init", "logits"), (("weights", "head"),)),
    *(
        Witness(f"lr.{role}", f"learning rate of the {says}", (measured, role), less)
        for role, says in ROLES.items()
        for measured, less in (("step", (("damping", role),)), ("rate", ()))
    ),
    *(
        Witness("eps", "Adam's ε, which must move as gradients do", ("damping", kind))
        for kind in (*ROLES, "qk")
    ),
)


@dataclass(frozen=True, kw_only=True)
class CoordCheck:
    """Whether a model scales as its rule promises, and else which part is most likely broken."""

    rule: str
    axis: SizeAxis
    sizes: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    slopes: tuple[Slope, ...]
    generation_gap: float
    """Nats by which generation's loss of a token differs from training's, at most."""
    suspects: Mapping[str, str]
    """Part that is broken → what it is, the likeliest first."""

    @property
    def passed(self) -> bool:
        """Whether every slope agrees with the rule, and generation with training."""
        return self.generation_gap <= AGREEMENT and all(slope.ok for slope in self.slopes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "passed": self.passed,
            "rule": self.rule,
            "suspects": list(self.suspects),
            "suspects_are": dict(self.suspects),
            "axis": self.axis,
            "sizes": list(self.sizes),
            "seeds": list(self.seeds),
            "steps": self.steps,
            "allowance": ALLOWANCE,
            "generation_gap": finite(self.generation_gap),
            "probes": [slope.to_dict() for slope in self.slopes],
        }

    def __str__(self) -> str:
        settings = dict.fromkeys(slope.setting for slope in self.slopes)
        rows: dict[str, dict[str, Slope]] = {}
        for slope in self.slopes:
            rows.setdefault(f"{slope.measure:<10}{slope.probe:<14}", {})[slope.setting] = slope
        lines = [
            f"{self.rule}: slopes of log2 RMS over log2 {self.axis} "
            f"({', '.join(f'{s:g}' for s in self.sizes)}), {len(self.seeds)} seeds, "
            f"{self.steps} steps",
            f"{'':24}" + "".join(f"{setting:<32}" for setting in settings),
            f"{'measure':<10}{'probe':<14}" + f"{'slope ± se':<15}{'expected':<17}" * len(settings),
        ]
        for name, cells in rows.items():
            lines.append((name + "".join(_cell(cells[setting]) for setting in settings)).rstrip())
        lines.append(f"generation differs from training by {self.generation_gap:.1g} nats a token")
        lines += [f"likely broken: {part} ({says})" for part, says in self.suspects.items()]
        lines.append(f"{self.rule}: {'PASSED' if self.passed else 'FAILED'}")
        return "\n".join(lines)


def _cell(slope: Slope) -> str:
    low = f"{slope.lowest:+.1f} … " if slope.lowest < slope.expected else ""
    expected = f"{low}{slope.expected:+z.1f}"
    mark = "" if slope.ok else "off"
    return f"{slope.slope:+.2f} ± {slope.se:<7.3f}{expected:<12}{mark:<5}"


def find_suspects(slopes: Sequence[Slope], gap: float) -> dict[str, str]:
    """Parts whose witness is off, the one that is off by most first; if none is, where it shows."""
    off: dict[Witness, float] = {}
    for setting in dict.fromkeys(slope.setting for slope in slopes):
        found = {(s.measure, s.probe): s.deviation for s in slopes if s.setting == setting}
        found["weights", "head"] = found.get(("weights", "output"), found["weights", "input"])
        for witness in WITNESSES:
            if witness.probe in found:
                excess = found[witness.probe] - sum(found.get(probe, 0.0) for probe in witness.less)
                if not is_zero(excess):
                    off[witness] = max(off.get(witness, 0.0), abs(float(excess.mean())))
    named = {w.part: w.says for w in sorted(off, key=lambda w: -off[w])}
    if gap > AGREEMENT:
        named = {"generation": "it does not apply the multipliers that training applies", **named}
    shown = [s for s in slopes if not s.ok]
    if shown and not named:
        named[f"{shown[0].measure} {shown[0].probe}"] = "no single part of the rule explains it"
    return named
