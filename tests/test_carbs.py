"""CARBS: Gaussian processes, the front of cost and loss, the laws along it, and the search."""

import itertools
import logging
import math
import statistics

import numpy as np
import optuna
import pytest
from carbs_front import (
    BUDGET,
    PLANTED,
    SEEDS,
    SPACE,
    cost_of,
    exponents,
    planted,
    regret,
    searched,
)
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import GPSampler, RandomSampler
from scipy.integrate import quad
from scipy.optimize import approx_fprime
from scipy.stats import norm

from mupgpt.errors import ConfigError
from mupgpt.tuning.carbs import gp, sampler as carbs
from mupgpt.tuning.carbs.front import front, front_laws
from mupgpt.tuning.carbs.gp import GP, fit_gp
from mupgpt.tuning.carbs.sampler import CarbsSampler
from mupgpt.tuning.samplers import make_sampler
from mupgpt.tuning.spec import StudyConfig

optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---------------------------------------------------------------- Gaussian processes


def kernel_by_hand(a, b, theta):
    signal, linear, _ = np.exp(2 * theta[:3])
    length = np.exp(theta[3:])
    out = np.empty((len(a), len(b)))
    for i, j in itertools.product(range(len(a)), range(len(b))):
        r = math.sqrt(5 * sum(((a[i] - b[j]) / length) ** 2))
        out[i, j] = signal * (1 + r + r**2 / 3) * math.exp(-r)
        out[i, j] += linear * (1 + sum((a[i] - 0.5) * (b[j] - 0.5)))
    return out


THETA = np.array([0.2, -0.7, -1.5, -0.3, 0.1, 0.6])


def test_the_posterior_is_the_closed_form():
    rng = np.random.default_rng(0)
    x, new, y = rng.random((15, 3)), rng.random((7, 3)), rng.normal(3, 2, 15)
    mean, deviation = GP(x, y, THETA, mean=2.5, scale=1.7).predict(new)
    signal, linear, noise = np.exp(2 * THETA[:3])
    inverse = np.linalg.inv(
        kernel_by_hand(x, x, THETA) + (noise + gp.JITTER * (signal + linear)) * np.eye(15)
    )
    cross = kernel_by_hand(new, x, THETA)
    variance = np.diag(kernel_by_hand(new, new, THETA) - cross @ inverse @ cross.T)
    assert np.allclose(mean, 2.5 + cross @ inverse @ (y - 2.5), rtol=0, atol=1e-8)
    assert np.allclose(deviation, 1.7 * np.sqrt(variance), rtol=0, atol=1e-8)


def test_the_likelihood_is_that_of_a_normal_and_its_gradient_is_exact():
    rng = np.random.default_rng(1)
    x, y = rng.random((12, 3)), rng.normal(size=12)
    value, slope = gp._misfit(THETA, x, y)
    covariance = kernel_by_hand(x, x, THETA) + gp._noise(THETA) * np.eye(12)
    quadratic = y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * math.pi * covariance)[1]
    assert value == pytest.approx(quadratic / 2, abs=1e-8)
    assert slope == pytest.approx(
        approx_fprime(THETA, lambda t: gp._misfit(t, x, y)[0], 1e-7), abs=1e-4
    )


def test_a_fit_recovers_a_known_function_and_knows_how_well():
    rng = np.random.default_rng(2)
    truth = lambda x: np.sin(5 * x[:, 0]) + 2 * x[:, 1]  # noqa: E731
    x, new = rng.random((80, 3)), rng.random((300, 3))
    fit = fit_gp(x, truth(x) + 0.05 * rng.normal(size=80))
    mean, deviation = fit.predict(new)
    z = (mean - truth(new)) / deviation
    assert np.sqrt(np.mean((mean - truth(new)) ** 2)) < 0.05
    assert 0.4 < z.std() < 1.5
    assert np.exp(fit.theta[2]) * fit.scale == pytest.approx(0.05, rel=0.5)
    assert fit.theta[5] > fit.theta[3] + 1  # the input without effect has a long scale


def test_what_is_still_to_come_moves_no_mean_and_takes_its_uncertainty():
    rng = np.random.default_rng(3)
    x, y, new = rng.random((10, 2)), rng.normal(size=10), rng.random((3, 2))
    before = GP(x, y, THETA[:5], mean=0.0, scale=1.0)
    after = before.given(new)
    grid = rng.random((50, 2))
    assert after.predict(grid)[0] == pytest.approx(before.predict(grid)[0], abs=1e-8)
    assert (after.predict(grid)[1] <= before.predict(grid)[1] + 1e-9).all()
    assert (after.predict(new)[1] < np.exp(THETA[2])).all()  # as well known as by one measurement
    assert before.given([]).predict(grid)[1] == pytest.approx(before.predict(grid)[1], abs=1e-12)


def test_log_expected_improvement_is_its_integral():
    for z in (-30.0, -3.0, -0.5, 0.0, 2.0, 25.0):
        start = max(-z, -12.0)
        gain, _ = quad(lambda t, z=z: (t + z) * norm.pdf(t), start, start + 24, epsabs=0, limit=200)
        value = float(carbs._log_improvement(np.array(z)))
        assert value == pytest.approx(math.log(gain), abs=1e-6), z
    far = carbs._log_improvement(np.array([-100.5, -99.5, -1e4]))
    assert far[1] - far[0] == pytest.approx(100, abs=0.1) and np.isfinite(far).all()


# ---------------------------------------------------------------- the front and its laws


def told(study, params, loss, cost, distributions=None, **constraints):
    space = distributions or {k: FloatDistribution(1e-9, 1e9, log=True) for k in params}
    study.enqueue_trial(params)
    trial = study.ask(space)
    trial.set_user_attr("flops", cost)
    for name, value in constraints.items():
        trial.set_constraint(name, value)
    study.tell(trial, loss)


def test_the_front_is_exactly_what_nothing_dominates():
    rng = np.random.default_rng(4)
    study = optuna.create_study()
    # Few levels of each, so that ties and equals occur.
    dots = [(float(c), float(v)) for c, v in rng.integers(1, 30, (60, 2)) if c * v > 60]
    for i, (cost, loss) in enumerate(dots):
        told(study, {"x": 1.0 + i}, loss, cost)
    expected = {
        (c, v)
        for c, v in dots
        if not any((b <= c and w <= v) and (b, w) != (c, v) for b, w in dots)
    }
    found = [(p.cost, p.loss) for p in front(study, "flops")]
    assert set(found) == expected and found == sorted(expected) and len(found) > 3


def test_repeats_are_one_point_and_what_diverged_is_none():
    study = optuna.create_study()
    told(study, {"x": 1.0}, 1.0, 10.0)
    told(study, {"x": 1.0}, 3.0, 14.0)
    told(study, {"x": 2.0}, 2.5, 5.0)
    told(study, {"x": 3.0}, 0.5, 1.0, diverged=1.0)
    points = front(study, "flops")
    assert [(p.params["x"], p.cost, p.loss, p.trials) for p in points] == [
        (2.0, 5.0, 2.5, 1),
        (1.0, 12.0, 2.0, 2),
    ]


def test_laws_along_a_front_and_their_standard_errors():
    rng = np.random.default_rng(5)
    study = optuna.create_study()
    cost = np.geomspace(1, 1e4, 12)
    lr = 0.1 * cost**-0.3 * np.exp(0.05 * rng.normal(size=12))
    for c, v in zip(cost, lr, strict=True):
        told(study, {"lr": v, "size": c**0.5}, 1.5 + 2 * c**-0.2, c)
    laws = front_laws(study, "flops", irreducible=True)
    (slope, _), covariance = np.polyfit(np.log(cost), np.log(lr), 1, cov=True)
    exponents = laws.exponents
    assert exponents["lr"] == pytest.approx((slope, math.sqrt(covariance[0, 0])), rel=1e-6)
    assert exponents["size"] == pytest.approx((0.5, 0.0), abs=1e-6)
    assert exponents["loss"][0] == pytest.approx(-0.2, abs=1e-5)
    assert laws.loss.c == pytest.approx(1.5, abs=1e-4)
    assert "size ∝ cost^0.500" in str(laws) and "loss − 1.5 ∝ cost^-0.200" in str(laws)


def test_a_front_of_two_points_has_no_law():
    study = optuna.create_study()
    told(study, {"x": 1.0}, 2.0, 1.0)
    told(study, {"x": 2.0}, 1.0, 2.0)
    with pytest.raises(ConfigError, match="front = 2: must have at least 3 points"):
        front_laws(study, "flops")


# ---------------------------------------------------------------- the planted problem


def test_the_search_recovers_the_planted_exponents():
    studies = [searched("carbs", 1.0, s) for s in range(2)]
    found = [exponents(s) for s in studies]
    for name in ("params", "tokens", "lr"):
        mean = statistics.fmean(f[name][0] for f in found)
        assert mean == pytest.approx(PLANTED[name], abs=0.06), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "tpe", "tpe on both"])
def test_at_equal_cost_the_front_is_better_than(name):
    """By ≥ 3 standard errors over seeds; "on both" is TPE's own search for a front."""
    own = np.log([regret(searched("carbs", BUDGET, s)) for s in SEEDS])
    gain = np.log([regret(searched(name, BUDGET, s)) for s in SEEDS]) - own
    assert gain.mean() > 3 * gain.std(ddof=1) / math.sqrt(len(gain)), (own, gain)


@pytest.mark.slow
def test_the_planted_exponents_are_recovered():
    """The mean over seeds to ± 0.03, and most single searches to ± 4 of their standard errors."""
    studies = [searched("carbs", BUDGET, s) for s in SEEDS]
    found = [exponents(s) for s in studies]
    fitted = np.array([[f[name] for f in found] for name in PLANTED])
    error = fitted[:, :, 0] - np.array([[value] for value in PLANTED.values()])
    assert np.abs(error.mean(1)).max() < 0.03
    assert np.mean(np.abs(error) < 4 * fitted[:, :, 1]) > 0.8
    assert fitted[:, :, 1].max() < 0.025


# ---------------------------------------------------------------- the sampler in Optuna

WIDE = {
    "log": FloatDistribution(1e-3, 1.0, log=True),
    "linear": FloatDistribution(-1.0, 2.0),
    "step": FloatDistribution(0.0, 1.0, step=0.25),
    "int": IntDistribution(1, 40, step=3),
    "logint": IntDistribution(1, 500, log=True),
    "name": CategoricalDistribution(("a", "b")),
}


def bowl(params):
    place = math.log10(params["log"]) + 1.5, params["linear"] - 0.5, params["step"] - 0.25
    return 1 + sum(x * x for x in place) + (params["int"] - 10) ** 2 / 400


def run(sampler, n_trials=25, batch=1):
    study = optuna.create_study(sampler=sampler)
    for _ in range(n_trials // batch):
        for trial in [study.ask(WIDE) for _ in range(batch)]:
            trial.set_user_attr("seconds", float(trial.params["logint"]))
            study.tell(trial, bowl(trial.params) + 1 / trial.params["logint"])
    return study


def test_every_kind_of_value_is_searched_and_a_category_is_drawn_at_random(caplog):
    with caplog.at_level(logging.WARNING, "mupgpt.carbs"):
        study = run(CarbsSampler(seed=0))
    said = [r.getMessage() for r in caplog.records]
    assert said == ["name is categorical: CARBS searches numbers, it is drawn at random"]
    values = {k: [t.params[k] for t in study.trials] for k in WIDE}
    assert set(values["step"]) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(isinstance(v, int) and v % 3 == 1 for v in values["int"])
    assert all(isinstance(v, int) and 1 <= v <= 500 for v in values["logint"])
    assert set(values["name"]) == {"a", "b"}
    late, early = ([bowl(t.params) for t in part] for part in (study.trials[13:], study.trials[:4]))
    assert statistics.median(late) < statistics.median(early)


def test_the_same_seed_gives_the_same_search_in_batches_too():
    one, two, other = (
        [t.params for t in run(CarbsSampler(seed=s), 16, batch=4).trials] for s in (1, 1, 2)
    )
    assert one == two
    assert one[:4] != other[:4] and one[-4:] != other[-4:]


def test_it_works_in_optimize_where_values_are_suggested_one_by_one():
    def objective(trial):
        params = {k: trial._suggest(k, d) for k, d in SPACE.items()}
        trial.set_user_attr("flops", cost_of(params))
        return planted(params)

    study = optuna.create_study(sampler=CarbsSampler(cost_key="flops", seed=3))
    study.optimize(objective, n_trials=12)
    assert "lr" in front_laws(study, "flops", irreducible=False).exponents


def test_every_running_trial_stands_in_with_its_prediction(monkeypatch):
    stood_in, given = [], GP.given
    monkeypatch.setattr(GP, "given", lambda self, x: stood_in.append(x) or given(self, x))
    study = search_numbers(CarbsSampler(seed=4, resample_every=0), 6)
    stood_in.clear()
    space = study.trials[0].distributions
    asked = [study.ask(space) for _ in range(4)]
    assert [len(x) for x in stood_in] == [0, 1, 2, 3]
    assert stood_in[3][:, 1] == pytest.approx([t.params["y"] for t in asked[:3]], abs=1e-12)
    assert len({tuple(t.params.values()) for t in asked}) == 4


def test_every_fifth_suggestion_repeats_a_point_of_the_front():
    for every, repeats in ((5, 3), (0, 0)):
        study = search_numbers(CarbsSampler(seed=5, resample_every=every), 20)
        assert 20 - len({tuple(t.params.values()) for t in study.trials}) == repeats


def search_numbers(sampler, n_trials, broken=lambda p: False):
    """x is what a run costs; y has its best value at 0.3."""
    space = {"x": FloatDistribution(1.0, 1e3, log=True), "y": FloatDistribution(0.0, 1.0)}
    study = optuna.create_study(sampler=sampler)
    for _ in range(n_trials):
        trial = study.ask(space)
        x, y = trial.params.values()
        trial.set_user_attr("seconds", x)
        trial.set_constraint("diverged", float(broken(trial.params)))
        study.tell(trial, 6.5 if broken(trial.params) else 2 + x**-0.2 + (y - 0.3) ** 2)
    return study


def test_the_cap_on_cost_holds():
    sampler = CarbsSampler(seed=6, max_cost=30.0, center={"x": 3.0, "y": 0.5})
    costs = [t.params["x"] for t in search_numbers(sampler, 30).trials]
    assert 15 < max(costs[6:]) < 32
    assert max(costs[:4]) < 30  # near the center, which uniform values would not be


def test_what_diverges_is_avoided():
    edge = lambda p: p["y"] < 0.32  # noqa: E731  the best is on the other side of the cliff
    sampler = CarbsSampler(seed=7, resample_every=0)
    trials = search_numbers(sampler, 40, edge).trials
    fell = [edge(t.params) for t in trials[10:]]
    assert sum(fell) < 9
    assert min(abs(t.params["y"] - 0.32) for t in trials if not edge(t.params)) < 0.02


def test_at_equal_cost_of_all_trials_it_still_finds_the_best():
    """Shapes and steps alike: seconds differ by chance alone."""
    space = {k: FloatDistribution(1e-3, 1.0, log=True) for k in "abc"}

    def lowest(sampler, seed):
        rng = np.random.default_rng(seed)
        study = optuna.create_study(sampler=sampler)
        for _ in range(25):
            trial = study.ask(space)
            trial.set_user_attr("seconds", float(np.exp(0.05 * rng.normal())))
            loss = 2 + 0.1 * sum(math.log10(v * 30) ** 2 for v in trial.params.values())
            study.tell(trial, loss)
        return study.best_value - 2

    random = [lowest(RandomSampler(seed=s), s) for s in range(3)]
    for key in ("seconds", None):
        kept = [lowest(CarbsSampler(cost_key=key, seed=s, resample_every=0), s) for s in range(3)]
        assert max(kept) < min(random) / 3, key


def test_a_bound_where_the_best_lies_is_tried_once():
    study = optuna.create_study(sampler=CarbsSampler(cost_key=None, seed=0, resample_every=0))
    study.optimize(lambda trial: 2 - trial.suggest_float("x", 0.0, 1.0), n_trials=15)
    values = [t.params["x"] for t in study.trials]
    assert values.count(1.0) == 1 and len(set(values)) == 15


@pytest.mark.parametrize(
    ("message", "sampler", "attribute", "loss", "direction"),
    [
        ("cost_key = 'seconds': must be a user attribute", {}, {"flops": 1.0}, 1.0, "minimize"),
        (r"seconds of trial \d = 0", {}, {"seconds": 0}, 1.0, "minimize"),
        (r"loss of trial \d = -1.0: must be > 0", {}, {"seconds": 1}, -1.0, "minimize"),
        ("directions = .'maximize'.: must be one loss to minimize", {}, {}, 1.0, "maximize"),
        ("radius = 0: must be > 0", {"radius": 0}, {}, 1.0, "minimize"),
        ("center.x = 0: must be > 0", {"center": {"x": 0}}, {}, 1.0, "minimize"),
    ],
)
def test_what_cannot_be_searched_is_said(message, sampler, attribute, loss, direction):
    with pytest.raises(ConfigError, match=message):
        study = optuna.create_study(sampler=CarbsSampler(**sampler), direction=direction)
        for _ in range(6):
            trial = study.ask({"x": FloatDistribution(1.0, 2.0, log=True)})
            for name, value in attribute.items():
                trial.set_user_attr(name, value)
            study.tell(trial, loss)


@pytest.mark.parametrize(("name", "kind"), [("carbs", CarbsSampler), ("gp", GPSampler)])
def test_a_sweep_can_ask_for_it_by_name(name, kind):
    """As a worker does: queued trials, asked for in batches, told with constraint and seconds."""
    config = StudyConfig(sampler=name, sampler_seed=3)
    space = {"hparams.lr": FloatDistribution(1e-4, 1e-1, log=True)}

    def sweep(salt):
        study = optuna.create_study(sampler=make_sampler(config, salt))
        assert isinstance(study.sampler, kind)
        for i in range(12):
            study.enqueue_trial({"hparams.lr": 6e-3} if i == 0 else {})
        for _ in range(3):
            for trial in [study.ask(space) for _ in range(4)]:
                trial.set_constraint("diverged", 0.0)
                trial.set_user_attr("seconds", 1.0)
                study.tell(trial, 2 + math.log10(trial.params["hparams.lr"] / 2e-3) ** 2)
        return [t.params["hparams.lr"] for t in study.trials]

    values = sweep("a")
    assert values[0] == 6e-3 and len(set(values)) == 12
    assert values == sweep("a") and values[1:] != sweep("b")[1:]
