"""Does the optimum stay put? Numbers with intervals, from sweeps of one hyperparameter over a size.

For each rule and each hyperparameter there is one drift (`mupgpt.evidence.drift`); the verdict is
on the rule under test, its controls beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from mupgpt.config.plain import load_toml
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.evidence.drift import LR, Drift, find_drift, size_key
from mupgpt.parametrization.axes import AXES, AxisName, AxisRow, find_axis
from mupgpt.parametrization.rules import RULES
from mupgpt.tuning.curves import Curve
from mupgpt.tuning.study import DONE, Sweep

__all__ = ["TOLERANCE", "Verdict", "judge", "judge_sweep", "load_verdict"]

TOLERANCE = 0.2  # octaves of the hyperparameter per doubling of the size

Curves = Mapping[str, Mapping[str, Mapping[float, Curve]]]
"""Hyperparameter → rule → size → curve."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on the rule under test, its controls beside it."""

    rule: str
    axis: AxisName
    drifts: Mapping[str, Mapping[str, Drift]]
    """Hyperparameter → rule → drift."""
    curves: Curves
    corpus: Mapping[str, Any]
    tolerance: float

    @property
    def main(self) -> str:
        """The hyperparameter that comes first: the learning rate where it was searched."""
        return LR if LR in self.drifts else next(iter(self.drifts))

    @property
    def rules(self) -> Mapping[str, Drift]:
        """Rule → drift of the main hyperparameter."""
        return self.drifts[self.main]

    @property
    def tested(self) -> Mapping[str, Drift]:
        """Hyperparameter → drift under the rule under test."""
        return {key: by_rule[self.rule] for key, by_rule in self.drifts.items()}

    @property
    def verdict(self) -> str:
        """The worst of the rule's hyperparameters: FAIL, INCONCLUSIVE, or else PASS."""
        said = {drift.verdict for drift in self.tested.values()}
        return next((v for v in ("FAIL", "INCONCLUSIVE") if v in said), "PASS")

    @property
    def warnings(self) -> list[str]:
        """What a reader must not overlook."""
        return [
            *self._better_controls(),
            *(note for by_rule in self.drifts.values() for d in by_rule.values() for note in
              _unseen(d, self.axis)),
            *(note for drift in self.tested.values() for note in _undecided(drift)),
        ]  # fmt: skip

    def _better_controls(self) -> list[str]:
        tested = self.rules[self.rule]
        largest = tested.sizes[-1]
        mine = tested.best_loss[largest]
        return [
            f"{name} reaches a lower loss than {self.rule} at {self.axis} {largest:g} "
            f"({control.best_loss[largest]:.4f} against {mine:.4f}): "
            "the base is badly balanced; sweep its hyperparameters jointly"
            for name, control in self.rules.items()
            if control.best_loss.get(largest, math.inf) < mine
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what ``verdict.json`` holds."""
        return {
            "verdict": self.verdict,
            "rule": self.rule,
            "axis": self.axis,
            "tolerance": self.tolerance,
            "rules": {name: drift.to_dict() for name, drift in self.rules.items()},
            "hparams": {
                key: {name: drift.to_dict() for name, drift in by_rule.items()}
                for key, by_rule in self.drifts.items()
            },
            "warnings": self.warnings,
            "corpus": dict(self.corpus),
            "curves": {
                key: {
                    rule: {
                        size_key(size): {"log2": c.log2.tolist(), "loss": c.loss.tolist()}
                        for size, c in sizes.items()
                    }
                    for rule, sizes in by_rule.items()
                }
                for key, by_rule in self.curves.items()
            },
        }

    def __str__(self) -> str:
        sizes = self.rules[self.rule].sizes
        heads = [f"  {self.axis} {s:g}".rjust(11) for s in sizes]
        lines = []
        for key, by_rule in self.drifts.items():
            name = f"log2 {key.removeprefix('hparams.')}"
            lines.append(
                f"{name:<18}{''.join(heads)}{'shift per doubling, 95 %':>28}{'regret':>9}  verdict"
            )
            for rule, drift in by_rule.items():
                verdict = drift.verdict if rule == self.rule else f"(control: {drift.verdict})"
                lines.append(drift.line(verdict, heads))
        seeds = len(self.rules[self.rule].shifts)
        lines.append(
            f"{self.rule}: {self.verdict} at ±{self.tolerance} octaves per doubling, "
            f"{seeds} seeds, corpus {self.corpus['name']} ({str(self.corpus['sha256'])[:12]})"
        )
        losses = (f"{name} {d.best_loss[sizes[-1]]:.4f}" for name, d in self.rules.items())
        lines.append(f"best loss at {self.axis} {sizes[-1]:g}: {', '.join(losses)}")
        return "\n".join(lines + [f"warning: {note}" for note in self.warnings])


def _unseen(drift: Drift, axis: str) -> list[str]:
    return [
        f"{drift.rule} at {axis} {size:g}: the lowest loss is at the end of the grid, so its "
        f"optimum was not seen; widen the range of {drift.hparam}"
        for size in drift.open_sizes
    ]


def _undecided(drift: Drift) -> list[str]:
    if drift.verdict != "INCONCLUSIVE" or drift.open_sizes:
        return []
    needed = drift.seeds_needed
    more = f"about {needed} seeds" if needed else "more than 200 seeds"
    return [f"{drift.hparam}: the interval crosses the tolerance: {more} would decide"]


def judge(
    curves: Curves, corpus: Mapping[str, Any], tolerance: float = TOLERANCE, axis: str = "width"
) -> Verdict:
    """The verdict on curves by hyperparameter, rule and size.

    The rule under test is the first that is meant to transfer. Raises `ConfigError` for an unknown
    axis, and where a rule has curves at one size only.
    """
    row = find_axis(axis)
    require(tolerance > 0, "tolerance", tolerance, "be > 0")
    require(bool(curves) and all(curves.values()), "curves", curves, "hold at least one rule")
    drifts = {
        key: {
            name: find_drift(name, key, sizes, tolerance, row.judged == "down")
            for name, sizes in by_rule.items()
        }
        for key, by_rule in curves.items()
    }
    names = list(next(iter(drifts.values())))
    tested = [name for name in names if name not in RULES or row.name in RULES[name].covers]
    return Verdict(
        rule=(tested or names)[0],
        axis=row.name,
        drifts=drifts,
        curves=curves,
        corpus=corpus,
        tolerance=tolerance,
    )


def load_verdict(path: Path, tolerance: float | None = None) -> Verdict:
    """The verdict on the curves of a ``verdict.json``, at its own tolerance or another one."""
    data = load_toml(path)
    try:
        curves = {
            key: {
                rule: {
                    float(size): Curve(np.array(c["log2"]), np.array(c["loss"]))
                    for size, c in sizes.items()
                }
                for rule, sizes in by_rule.items()
            }
            for key, by_rule in data["curves"].items()
        }
        stated = data["tolerance"] if tolerance is None else tolerance
        return judge(curves, data["corpus"], stated, data["axis"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no verdict: {error}") from error


def judge_sweep(
    sweep: Sweep | str, tolerance: float = TOLERANCE, axis: str | None = None
) -> Verdict:
    """The verdict on a finished sweep of single hyperparameters over a size (and ``rule``).

    ``sweep`` is a `Sweep`, or the name or folder of one that was run here; ``axis`` is one of
    those of `mupgpt.parametrization.axes.AXES` that are judged (default: the one that the sweep
    varies). Where it varies several, the others are held at their first values.
    """
    sweep = Sweep.open(sweep) if isinstance(sweep, str) else sweep
    row = _axis(sweep, axis)
    held = {k: v[0] for k, v in sweep.spec.structure.items() if k not in (row.key, "rule")}
    curves: dict[str, dict[str, dict[float, Curve]]] = {}
    corpora = []
    for cell in sweep.spec.cells:
        if any(cell.values[k] != value for k, value in held.items()):
            continue
        study, config = sweep.study(cell), cell.config()
        key = next(iter(cell.search_space.dimensions))
        sizes = curves.setdefault(key, {}).setdefault(config.rule, {})
        sizes[float(cell.values[row.key])] = _curve(study, key)
        corpora.append(study.user_attrs["corpus"])
    assert all(corpus == corpora[0] for corpus in corpora), "one sweep has one corpus"
    return judge(curves, corpora[0], tolerance, row.name)


def _axis(sweep: Sweep, axis: str | None) -> AxisRow:
    """The axis to judge over, or an error that says what the sweep would need."""
    judged = {row.name: row for row in AXES.values() if row.judged}
    name = find_axis(axis).name if axis is not None else None
    if name is not None and name not in judged:
        raise unknown("axis of a verdict", name, judged)
    asked = list(judged.values()) if name is None else [judged[name]]
    varied = [row for row in asked if row.key in sweep.spec.structure]
    alone = all(len(cell.search_space.dimensions) == 1 for cell in sweep.spec.cells)
    if not alone or not varied:
        raise ConfigError(
            f"sweep {sweep.spec.name!r} searches {', '.join(sweep.spec.space)} over "
            f"{', '.join(sweep.spec.structure) or 'no structure'}; a verdict needs one "
            "hyperparameter at a time (study.each = true) over "
            f"{' or '.join(row.key for row in asked)}, as in: mupgpt cp lr my.toml"
        )
    return varied[0]


def _curve(study: optuna.Study, key: str) -> Curve:
    trials = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
    left = [t for t in trials if t.state not in DONE]
    if left or len(trials) < 3:
        raise ConfigError(
            f"study {study.study_name!r} has {len(trials) - len(left)} finished points and "
            f"{len(left)} to go; let the sweep end first: mupgpt sweep run"
        )
    if any(t.state == TrialState.PRUNED for t in trials):
        raise ConfigError(
            f"study {study.study_name!r} stopped trials early: a verdict needs every end; run it "
            "again with study.rungs = 0 under another name"
        )
    points = {t.params[key]: t.user_attrs["losses"] for t in trials}
    xs = sorted(points)
    return Curve(np.log2(xs), np.array([points[x] for x in xs]))
