"""Does the optimum stay put? Numbers with intervals, from sweeps of one hyperparameter over a size.

For each seed and size the optimum of a hyperparameter is read off its curve (`curves`). The drift
is one slope of these optima against log2 of the size per seed; its interval is Student's t over the
seeds. The regret is what the smallest size's optimum costs at the largest (for density, the
largest's at the smallest).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from scipy import stats

from mupgpt.config.plain import load_toml
from mupgpt.errors import ConfigError, require, unknown
from mupgpt.parametrization.rules import RULES
from mupgpt.tuning.curves import Curve, half_width
from mupgpt.tuning.study import DONE, Sweep

__all__ = ["AXES", "TOLERANCE", "Drift", "Verdict", "judge", "judge_sweep", "load_verdict"]

TOLERANCE = 0.2  # octaves of the hyperparameter per doubling of the size
HARMLESS = 0.005  # regret up to which a drift costs next to nothing
LR = "hparams.lr"
AXES = {
    "width": "model.d_model",
    "depth": "model.n_layer",
    "density": "model.density",
    "context": "model.seq_len",
    "batch": "batch_size",
    "horizon": "steps",
}
"""What may grow → its key in a config."""

Curves = Mapping[str, Mapping[str, Mapping[float, Curve]]]
"""Hyperparameter → rule → size → curve."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the optimum of one hyperparameter moves with the size under one rule."""

    rule: str
    hparam: str
    sizes: tuple[float, ...]
    """From the proxy's to the target's: ascending, but masks are tuned dense."""
    optimum: Mapping[float, tuple[float, ...]]
    """Size → log2 of the optimum of each seed."""
    shifts: tuple[float, ...]
    """Slope of each seed, octaves per doubling of the size."""
    regrets: tuple[float, ...]
    """Relative excess loss at the last size of each seed, with the first one's optimum."""
    best_loss: Mapping[float, float]
    """Size → lowest loss, mean over seeds."""
    open_sizes: tuple[float, ...]
    """Sizes at which some seed's lowest point is the end of the grid: no optimum was seen."""
    tolerance: float

    @property
    def shift(self) -> float:
        """Mean slope."""
        return float(np.mean(self.shifts))

    @property
    def ci95(self) -> tuple[float, float]:
        """Student's 95 % interval of the slope over the seeds."""
        half = half_width(self.shifts)
        return self.shift - half, self.shift + half

    @property
    def regret(self) -> float:
        """Mean regret."""
        return float(np.mean(self.regrets))

    @property
    def most_regret(self) -> float:
        """Upper end of the 95 % interval of the mean regret over the seeds."""
        return self.regret + half_width(self.regrets)

    @property
    def verdict(self) -> str:
        """PASS when the interval lies inside ±tolerance, FAIL when outside, else INCONCLUSIVE.

        FLAT is an INCONCLUSIVE or FAIL that does not matter: of a hyperparameter other than the
        learning rate, whose optimum was seen everywhere, and whose regret is at most 0.5 %.
        """
        if self.open_sizes:
            return "INCONCLUSIVE"
        low, high = self.ci95
        if -self.tolerance <= low and high <= self.tolerance:
            return "PASS"
        if self.hparam != LR and self.most_regret <= HARMLESS:
            return "FLAT"
        return "FAIL" if low > self.tolerance or high < -self.tolerance else "INCONCLUSIVE"

    @property
    def seeds_needed(self) -> int | None:
        """Seeds that would decide, if mean and spread of the slopes stayed; None: over 200."""
        if len(self.shifts) < 2:
            return 2
        room = abs(self.tolerance - abs(self.shift))
        spread = float(np.std(self.shifts, ddof=1))
        for n in range(max(3, len(self.shifts)), 200):
            if stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) <= room:
                return n
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        name = self.hparam.removeprefix("hparams.")
        return {
            f"optimum_log2_{name}": {_key(s): float(np.mean(o)) for s, o in self.optimum.items()},
            f"optimum_log2_{name}_by_seed": {_key(s): list(o) for s, o in self.optimum.items()},
            "shift_per_doubling": self.shift,
            "shift_ci95": [_finite(x) for x in self.ci95],
            "shift_by_seed": list(self.shifts),
            "regret_at_largest": self.regret,
            "regret_at_widest": self.regret,
            "regret_upper95": _finite(self.most_regret),
            "regret_by_seed": list(self.regrets),
            "best_loss": {_key(s): loss for s, loss in self.best_loss.items()},
            "seeds": len(self.shifts),
            "verdict": self.verdict,
        }

    def line(self, judged: str, heads: Sequence[str]) -> str:
        """One row of the printed table, below the ``heads`` of its sizes."""
        optima = "".join(
            f"{np.mean(self.optimum[s]):>{len(head)}.2f}"
            for s, head in zip(self.sizes, heads, strict=True)
        )
        shift = f"{self.shift:+.2f} ± {half_width(self.shifts):.2f}"
        regret = f"{100 * self.regret:.2f} %"
        return f"{self.rule:<18}{optima}{shift:>28}{regret:>9}  {judged}"


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _key(size: float) -> str:
    return f"{size:g}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on the rule under test, its controls beside it."""

    rule: str
    axis: str
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
                        _key(size): {"log2": c.log2.tolist(), "loss": c.loss.tolist()}
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

    The rule under test is the first that is meant to transfer; tolerance: octaves per doubling.

    >>> curve = Curve(np.arange(3.0), np.array([[2.1, 2.2], [2.0, 2.1], [2.1, 2.2]]))
    >>> judge({"hparams.lr": {"mup": {32: curve, 64: curve, 128: curve}}}, corpus={}).verdict
    'PASS'
    """
    require(tolerance > 0, "tolerance", tolerance, "be > 0")
    require(bool(curves) and all(curves.values()), "curves", curves, "hold at least one rule")
    drifts = {
        key: {
            name: _drift(name, key, sizes, tolerance, axis == "density")
            for name, sizes in by_rule.items()
        }
        for key, by_rule in curves.items()
    }
    names = list(next(iter(drifts.values())))
    tested = [name for name in names if name not in RULES or axis in RULES[name].covers]
    return Verdict(
        rule=(tested or names)[0],
        axis=axis,
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
            key: {rule: {float(size): Curve(np.array(c["log2"]), np.array(c["loss"]))
                         for size, c in sizes.items()} for rule, sizes in by_rule.items()}
            for key, by_rule in data["curves"].items()}  # fmt: skip
        stated = data["tolerance"] if tolerance is None else tolerance
        return judge(curves, data["corpus"], stated, data["axis"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no verdict: {error}") from error


def _drift(
    rule: str, hparam: str, curves: Mapping[float, Curve], tolerance: float, falls: bool
) -> Drift:
    sizes = tuple(sorted(curves, reverse=falls))
    if len(sizes) < 2:
        raise ConfigError(f"rule {rule}: one size only ({sizes}); a drift needs at least two")
    optima = {s: curves[s].optima() for s in sizes}
    x = np.log2(sizes)
    slopes = np.polyfit(x, np.stack([optima[s] for s in sizes]), 1)[0]
    return Drift(
        rule=rule,
        hparam=hparam,
        sizes=sizes,
        optimum={s: tuple(o.tolist()) for s, o in optima.items()},
        shifts=tuple(slopes.tolist()),
        regrets=tuple(curves[sizes[-1]].regret(optima[sizes[0]]).tolist()),
        best_loss={s: float(curves[s].loss.min(axis=0).mean()) for s in sizes},
        open_sizes=tuple(s for s in sizes if not curves[s].inside().all()),
        tolerance=tolerance,
    )


def judge_sweep(
    sweep: Sweep | str, tolerance: float = TOLERANCE, axis: str | None = None
) -> Verdict:
    """The verdict on a finished sweep of single hyperparameters over a size (and ``rule``).

    ``sweep`` is a `Sweep`, or the name or folder of one that was run here; ``axis`` is one of
    `AXES` (default: the one that the sweep varies). Where it varies several, the others are held
    at their first values.

    >>> judge_sweep("nowhere")
    Traceback (most recent call last):
    mupgpt.errors.ConfigError: no sweep 'nowhere' here; start it with: mupgpt sweep run nowhere
    """
    sweep = Sweep.open(sweep) if isinstance(sweep, str) else sweep
    axis = _axis(sweep, axis)
    held = {k: v[0] for k, v in sweep.spec.structure.items() if k not in (AXES[axis], "rule")}
    curves: dict[str, dict[str, dict[float, Curve]]] = {}
    corpora = []
    for cell in sweep.spec.cells:
        if any(cell.values[k] != value for k, value in held.items()):
            continue
        study, config = sweep.study(cell), cell.config()
        key = next(iter(cell.search_space.dimensions))
        sizes = curves.setdefault(key, {}).setdefault(config.rule, {})
        sizes[float(cell.values[AXES[axis]])] = _curve(study, key)
        corpora.append(study.user_attrs["corpus"])
    assert all(corpus == corpora[0] for corpus in corpora), "one sweep has one corpus"
    return judge(curves, corpora[0], tolerance, axis)


def _axis(sweep: Sweep, axis: str | None) -> str:
    """The axis to judge over, or an error that says what the sweep would need."""
    if axis is not None and axis not in AXES:
        raise unknown("axis", axis, AXES)
    varied = [name for name, key in AXES.items() if key in sweep.spec.structure]
    alone = all(len(cell.search_space.dimensions) == 1 for cell in sweep.spec.cells)
    if not alone or not varied or axis not in (None, *varied):
        keys = AXES[axis] if axis else " or ".join(AXES.values())
        raise ConfigError(
            f"sweep {sweep.spec.name!r} searches {', '.join(sweep.spec.space)} over "
            f"{', '.join(sweep.spec.structure) or 'no structure'}; a verdict needs one "
            f"hyperparameter at a time (study.each = true) over {keys}, as in: "
            "mupgpt cp lr my.toml"
        )
    return axis or varied[0]


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
