"""Does the learning rate of the blocks' matrices stay put from 2 to 16 layers? Sweep `depth`."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mupgpt.data.corpus import load_corpus
from mupgpt.evidence.verdict import judge, load_verdict
from mupgpt.training.population import Population
from mupgpt.tuning.curves import Curve
from mupgpt.tuning.spec import load_spec

KEY = "hparams.lr_mult_hidden"
COMMITTED = Path(__file__).parent.parent / "sweeps" / "results" / "depth.json"


def paired(verdict):
    """Shift under completep less that under mup, octaves per doubling of the depth: 95 %, seeds."""
    shifts = (np.array(verdict.drifts[KEY][rule].shifts) for rule in ("completep", "mup"))
    less = np.subtract(*shifts)
    return stats.t.interval(0.95, len(less) - 1, loc=less.mean(), scale=stats.sem(less))


def curve(cell, log2, seeds):
    """Losses of one rule at one depth, all learning rates and seeds as one population."""
    configs = [cell.config({KEY: 2.0**x}, seed) for x in log2 for seed in seeds]
    population = Population(configs, load_corpus(configs[0].data))
    population.train()
    losses = population.evaluate()
    return Curve(log2, np.array([losses[i] for i in range(len(configs))]).reshape(len(log2), -1))


@pytest.mark.slow
def test_completep_holds_the_optimum_over_depth_where_mup_does_not():
    """Three seeds at the two ends of the sweep; paired, they tell the two rules apart.

    Under mup the steps of all layers add up, so that deeper models want smaller ones; the initial
    1/√(2L) does not help.
    """
    spec = load_spec("depth")
    cells = {(c.values["rule"], c.values["model.n_layer"]): c for c in spec.cells}
    log2 = np.arange(-1.0, 5.0)
    curves = {
        rule: {depth: curve(cells[rule, depth], log2, (0, 1, 2)) for depth in (2, 16)}
        for rule in ("completep", "mup")
    }
    verdict = judge({KEY: curves}, {"name": "stdlib", "sha256": ""}, axis="depth")
    completep, mup = (verdict.drifts[KEY][rule] for rule in ("completep", "mup"))
    assert verdict.rule == "completep" and not completep.open_sizes and not mup.open_sizes
    assert max(map(abs, completep.shifts)) < 0.35 < 0.45 < min(-s for s in mup.shifts)
    assert paired(verdict)[0] > 0.3
    assert completep.regret < 0.01 < mup.regret


def test_the_committed_verdict_over_depth():
    """What sweeps/README.md says of it: mup fails; completep drifts less, within the noise."""
    verdict = load_verdict(COMMITTED)
    completep, mup = (verdict.drifts[KEY][rule] for rule in ("completep", "mup"))
    assert (verdict.rule, verdict.axis, verdict.tolerance) == ("completep", "depth", 0.2)
    assert completep.sizes == mup.sizes == (2, 4, 8, 16) and len(mup.shifts) == 6
    assert (completep.verdict, mup.verdict) == ("INCONCLUSIVE", "FAIL")
    assert completep.shift == pytest.approx(-0.14, abs=0.01)
    assert mup.shift == pytest.approx(-0.62, abs=0.01)
    assert paired(verdict) == pytest.approx((0.18, 0.78), abs=0.01)
    assert (completep.regret, mup.regret) == pytest.approx((0.0035, 0.0175), abs=2e-4)
    stored = json.loads(COMMITTED.read_text())["rules"]["mup"]
    assert stored["shift_ci95"] == pytest.approx(mup.ci95)
