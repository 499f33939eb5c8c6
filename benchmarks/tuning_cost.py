"""What tuning small saves: loss at the target against the cost of finding its hyperparameters.

    python benchmarks/tuning_cost.py                  # width 256: half an hour on two cores
    python benchmarks/tuning_cost.py --width 512 --budgets 1 2 --direct 6

All begin from the same untuned values of a two-layer byte model on the default corpus, 200 steps of
512 tokens, and search the same five hyperparameters. `mupgpt tune` at several budgets; one TPE
search at the narrowest width with the same FLOPs, whose winner is taken as it is; TPE at the target
itself, read off as it goes; and the presets' values, whose own cost nobody counted. Each is
repeated with other seeds of its sampler, and what it found trains at the target on fresh seeds.
Costs are shares of one target run in FLOPs (`palm`). Finished parts are kept in
``runs/tuning_cost`` and are not done again.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from measure import goal, machine, write

FRESH = (2000, 2001)
UNTUNED = {"lr": 3e-3, "init_std": 0.1, "emb_mult": 1.0, "output_mult": 1.0, "weight_decay": 0.0,
           "lr_mult_input": 1.0, "lr_mult_hidden": 1.0}  # fmt: skip
MEDIAN, WORST = 0.01, 0.02  # relative loss above the best that was found by anyone here
KEPT = Path("runs") / "tuning_cost"


def main() -> None:
    args = parsed()
    width = args.width
    kept = (KEPT / f"w{width}").resolve()
    kept.mkdir(parents=True, exist_ok=True)
    os.chdir(kept)
    rows: list[dict[str, Any]] = []
    for seed in range(args.repeats):
        for budget in args.budgets:
            rows += done(
                f"tune-{budget:g}-{seed}", lambda b=budget, s=seed: tuned(args.width, b, s)
            )
            rows += done(
                f"proxy-{budget:g}-{seed}", lambda b=budget, s=seed: proxy(args.width, b, s)
            )
        if args.direct:
            rows += done(f"direct-{seed}", partial(direct, width, args.direct, seed))
    rows += done("presets", partial(presets, width))
    best = min(fmean(row["losses"]) for row in rows)
    for row in rows:
        row["regret"] = fmean(row["losses"]) / best - 1
    summary = summarized(rows)
    for s in summary:
        print(f"{s['how']:>8} at {s['cost']:5.2f} target runs: {s['loss']:.4f} nats, "
              f"regret {s['regret']:.2%}, worst {s['worst']:.2%} of {s['count']}")  # fmt: skip
    os.chdir(Path(__file__).parent.parent)
    of_tune = [s for s in summary if s["how"] == "tune"]
    goals = [
        goal(f"{which} regret of tune at {s['cost']} target runs", s[key], most=most)
        for s in of_tune
        for which, key, most in (("median", "regret", MEDIAN), ("worst", "worst", WORST))
    ]
    write(f"tuning_cost_{width}", {
        "machine": machine(), "width": width, "best": best, "summary": summary, "rows": rows,
        "goals": goals,
    })  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--direct", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def done(name: str, work: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of one part: from its file, or from doing it."""
    path = Path(f"{name}.json")
    if not path.is_file():
        rows = work()
        path.write_text(json.dumps(rows), encoding="utf-8")
        for row in rows:
            print(f"{name}: {fmean(row['losses']):.4f} at {row['cost']:.2f}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def target(width: int) -> Any:
    import mupgpt as mg

    return mg.train_config({"model": {"preset": "proxy-32", "d_model": width}, "hparams": UNTUNED})


def tuned(width: int, budget: float, seed: int) -> list[dict[str, Any]]:
    """What `tune` finds within a budget."""
    from mupgpt.tuner.plan import plan_tune
    from mupgpt.tuner.search import tune

    plan = plan_tune(target(width), budget, name=f"tune-{budget:g}-{seed}", sampler_seed=2 * seed)
    found = tune(plan)
    facts = {"chance": found.chance, "ranks": found.fidelity.agreements[-1].ranks}
    return [row("tune", plan.share, width, found.tuned.config.hparams, facts)]


def search(name: str, width: int, trials: int, seed: int) -> tuple[Any, Any]:
    """One TPE search of the same space at one width: its study and its run as it stands."""
    import mupgpt as mg
    from mupgpt.config.plain import to_dict
    from mupgpt.tuning.spaces import balanced_space
    from mupgpt.tuning.spec import parse_spec

    run = target(width)
    spec = parse_spec({
        "name": name,
        "study": {"trials": trials, "sampler_seed": seed, "sampler": "tpe"},
        "train": {"model": {"preset": "proxy-32", "d_model": width}, "hparams": UNTUNED},
        "space": {key: to_dict(d) for key, d in balanced_space(run.base).items()},
    }, name)  # fmt: skip
    return mg.run_sweep(spec), run


def proxy(width: int, budget: float, seed: int) -> list[dict[str, Any]]:
    """One search at the narrowest width with the whole budget."""
    run, trials = target(32), int(budget / share(32, width))
    study, run = search(f"proxy-{budget:g}-{seed}", 32, trials, seed)
    return [row("proxy", trials * share(32, width), width, with_values(run, study.best_params))]


def direct(width: int, trials: int, seed: int) -> list[dict[str, Any]]:
    """A search at the target, read off as it goes."""
    study, run = search(f"direct-{seed}", width, trials, seed)
    finished = sorted(study.get_trials(), key=lambda t: t.number)
    rows, best = [], None
    for n, trial in enumerate(finished, 1):
        if best is None or trial.value < best.value:
            best = trial
            latest = row("direct", n, width, with_values(run, best.params))
        if n in (1, 2, 4, 8, 16, trials):
            rows.append({**latest, "cost": float(n)})
    return rows


def presets(width: int) -> list[dict[str, Any]]:
    """The values that ship with the byte proxies."""
    import mupgpt as mg

    return [row("presets", 0.0, width, mg.PRESETS["proxy-32"].hparams)]


def with_values(run: Any, values: Mapping[str, float]) -> Any:
    return replace(run.hparams, **{k.removeprefix("hparams."): v for k, v in values.items()})


def share(width: int, of: int) -> float:
    from mupgpt.planning.flops import run_flops

    a, b = target(width), target(of)
    return run_flops(a, a.steps) / run_flops(b, b.steps)


def row(how: str, cost: float, width: int, hparams: Any, facts: Any = None) -> dict[str, Any]:
    """What was found, and its losses at the target on fresh seeds."""
    from mupgpt.config.plain import to_dict
    from mupgpt.data.corpus import load_corpus
    from mupgpt.training.population import Population

    runs = [replace(target(width), hparams=hparams, seed=seed) for seed in FRESH]
    population = Population(runs, load_corpus(runs[0].data))
    population.train()
    losses = list(population.evaluate().values())
    return {
        "how": how,
        "cost": cost,
        "losses": losses,
        "hparams": to_dict(hparams),
        **(facts or {}),
    }


def summarized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and worst over the repetitions, by method and cost."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for found in rows:
        groups.setdefault((found["how"], round(found["cost"], 1)), []).append(found)
    return [
        {
            "how": how,
            "cost": cost,
            "loss": median(fmean(r["losses"]) for r in some),
            "regret": median(r["regret"] for r in some),
            "worst": max(r["regret"] for r in some),
            "count": len(some),
        }
        for (how, cost), some in sorted(groups.items())
    ]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
