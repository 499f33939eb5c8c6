"""The front of cost and loss that CARBS finds on a planted problem, against TPE's and random's.

    python benchmarks/carbs_front.py     # a few minutes on two cores

Parameters, tokens and a learning rate are searched; loss is E + A·cost^−a and a bowl around optima
that are powers of cost, with noise. Each search spends as much as `BUDGET` runs of the dearest
kind. ``regret`` is what the best trial of at most some cost loses against the optimum there, as a
mean over log cost; "tpe on both" is TPE's own search for a front.
"""

import functools
import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy reads it

import numpy as np
import optuna
from measure import goal, machine, write
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from mupgpt.tuning.carbs.front import front_laws
from mupgpt.tuning.carbs.sampler import CarbsSampler
from mupgpt.tuning.curves import half_width

SPACE = {
    "params": FloatDistribution(1e5, 1e7, log=True),
    "tokens": FloatDistribution(1e6, 1e8, log=True),
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
}
PLANTED = {"params": 0.5, "tokens": 0.5, "lr": -0.25, "loss": -0.12}
START = {"params": 3e5, "tokens": 3e6, "lr": 1e-2}
MOST = 6e15  # the cost of the dearest run
BUDGET, SEEDS = 3.0, range(6)
OTHERS = ("random", "tpe", "tpe on both")


def cost_of(params) -> float:
    return 6 * params["params"] * params["tokens"]


def least(cost: float) -> float:
    """E + A·cost^−a"""
    return 1.7 + 20 * cost ** PLANTED["loss"]


def planted(params) -> float:
    """The least loss at this cost, and a bowl around optima that are powers of cost."""
    cost = cost_of(params)
    scale = math.log(cost / 6e13)
    size = math.log(params["params"] / 1e6) - PLANTED["params"] * scale
    rate = math.log(params["lr"] / 3e-3) - PLANTED["lr"] * scale
    return least(cost) + 20 * cost ** PLANTED["loss"] * 0.2 * (size**2 + rate**2)


def search(sampler, budget: float, seed: int, objectives: int = 1) -> optuna.Study:
    """The study after runs worth ``budget`` times the dearest, with noise of 0.003."""
    rng = np.random.default_rng(seed + 999)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)
    study.enqueue_trial(START)
    spent = 0.0
    while True:
        trial = study.ask(SPACE)
        cost = cost_of(trial.params)
        spent += cost
        if spent > budget * MOST:
            study.tell(trial, state=TrialState.FAIL)
            return study
        trial.set_user_attr("flops", cost)
        loss = planted(trial.params) + 0.003 * rng.normal()
        study.tell(trial, [loss, math.log(cost)][:objectives])


def regret(study: optuna.Study) -> float:
    """Mean over log cost of what the best trial of at most that cost loses against the optimum.

    Beside a constant this is minus the hypervolume in (log cost, loss), without the noise.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pairs = [(cost_of(t.params), planted(t.params)) for t in done]
    costs = np.geomspace(6e12, MOST / 3, 40)  # START costs less than the first
    return statistics.fmean(min(v for c, v in pairs if c <= cost) - least(cost) for cost in costs)


@functools.cache
def searched(name: str, budget: float, seed: int) -> optuna.Study:
    """One search; the same arguments give the same study."""
    sampler = {
        "carbs": lambda: CarbsSampler(cost_key="flops", seed=seed, center=START),
        "random": lambda: RandomSampler(seed=seed),
        "tpe": lambda: TPESampler(seed=seed),
    }[name.removesuffix(" on both")]()
    return search(sampler, budget, seed, 2 if name.endswith("on both") else 1)


def exponents(study: optuna.Study) -> dict[str, tuple[float, float]]:
    """The powers of cost along the front, each with its standard error."""
    return front_laws(study, "flops", irreducible=True).exponents


def measured(name: str, seed: int) -> dict[str, Any]:
    """What is written of one search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = searched(name, BUDGET, seed)
    found = {"seed": seed, "trials": len(study.trials) - 1, "regret": regret(study)}
    return found | ({"exponents": exponents(study)} if name == "carbs" else {})


def main() -> None:
    where = machine()
    names = [name for name in ("carbs", *OTHERS) for _ in SEEDS]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(measured, names, [*SEEDS] * (1 + len(OTHERS))))
    by_name = {
        n: [r for r, m in zip(rows, names, strict=True) if m == n] for n in ("carbs", *OTHERS)
    }
    own = np.log([row["regret"] for row in by_name["carbs"]])
    goals = []
    for name in OTHERS:
        gains = (np.log([row["regret"] for row in by_name[name]]) - own).tolist()
        lowest = math.exp(statistics.fmean(gains) - half_width(gains))
        goals.append(goal(f"regret of {name}, times CARBS's, lower end of 95 %", lowest, least=1.0))
        print(f"{name}: {math.exp(statistics.fmean(gains)):.2f} times CARBS's regret")
    for name, true in PLANTED.items():
        found = [row["exponents"][name][0] for row in by_name["carbs"]]
        off = abs(statistics.fmean(found) - true)
        goals.append(goal(f"exponent of {name}, off from {true}", off, most=0.03))
    write("carbs_front", {"machine": where, "budget": BUDGET, "planted": PLANTED,
                          "searches": by_name, "goals": goals})  # fmt: skip


if __name__ == "__main__":
    main()
