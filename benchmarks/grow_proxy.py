"""A proxy that grows: as good hyperparameters for less, since the optimum stays put?

    python benchmarks/grow_proxy.py     # about ten minutes on two cores

Two searches of the joint space for the width-128 model under `mup`, repeated with other seeds of
the sampler. One searches at width 128 itself: 48 trials with successive halving over steps. The
other does that at width 32, takes the best 8 to width 64 and the best 2 of those to 128. Each
winner trains at width 128 on five seeds that no search has seen; FLOPs are those really trained
(`palm`). Both begin from untuned values: the presets' own are tuned, and would win either search.
"""

import dataclasses
import os
import tempfile
from statistics import fmean
from typing import Any

import numpy as np
from measure import goal, machine, write
from optuna import Study

REPEATS = 3
TARGET, START = 128, 32
STAGES = ((64, 8), (128, 2))  # width, trials taken there
TRIALS = 48
FRESH = range(2000, 2005)
UNTUNED = {"lr": 1e-3, "init_std": 0.05, "emb_mult": 1.0, "attn_mult": 1.0, "output_mult": 1.0,
           "lr_mult_hidden": 1.0}  # fmt: skip
THIRD = 1 / 3


def main() -> None:
    where, rows = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for seed in range(REPEATS):
            rows.append({"sampler_seed": seed, **compare(seed)})
            for side in ("direct", "grown"):
                found = rows[-1][side]
                print(f"seed {seed}, {side}: {fmean(found['losses']):.4f} nats, "
                      f"{found['flops']:.3g} FLOPs", flush=True)  # fmt: skip
    # One difference a repetition: of the means over the same five seeds.
    worse = [fmean(r["grown"]["losses"]) / fmean(r["direct"]["losses"]) - 1 for r in rows]
    cost = fmean(r["grown"]["flops"] / r["direct"]["flops"] for r in rows)
    write("grow_proxy", {
        "machine": where,
        "rows": rows,
        "worse": worse,
        "worse_mean": fmean(worse),
        "worse_ci95": interval(worse),
        "goals": [goal("cost of the grown search over the direct one, FLOPs", cost, most=THIRD)],
    })  # fmt: skip
    print(f"relative loss, grown over direct: {fmean(worse):+.2%} ± {interval(worse):.2%}")


def interval(values: list[float]) -> float:
    from mupgpt.tuning.curves import half_width

    return half_width(values)


def compare(seed: int) -> dict[str, Any]:
    """Both searches and what their winners reach."""
    direct = search(f"direct-{seed}", TARGET, seed, trials=TRIALS, rungs=1)
    stages = [search(f"grown-{seed}-{START}", START, seed, trials=TRIALS, rungs=1)]
    for width, count in STAGES:
        # One more: the run as it stands is always tried.
        stages.append(search(f"grown-{seed}-{width}", width, seed, trials=count + 1,
                             warm_start=stages[-1].study_name, warm_top=count))  # fmt: skip
    return {
        "direct": {"flops": flops(direct), **winner(direct)},
        "grown": {"flops": sum(map(flops, stages)), **winner(stages[-1])},
    }


def search(name: str, width: int, seed: int, **study: object) -> Study:
    """One sweep of the shipped `joint` at another width."""
    from mupgpt.tuning.run import run_sweep
    from mupgpt.tuning.spec import load_spec, parse_spec

    joint = load_spec("joint")
    raw = {
        "name": name,
        "study": {"seeds": [0], "reduction": 3, "sampler_seed": seed, **study},
        "train": {
            **joint.train,
            "model": f"proxy-{width}",
            "base": f"proxy-{START}",
            "hparams": UNTUNED,
        },
        "space": {key: dataclasses.asdict(d) for key, d in joint.space.items()},
    }
    found = run_sweep(parse_spec(raw, name))
    assert isinstance(found, Study)
    return found


def flops(study: Study) -> float:
    """Training FLOPs of a study, its stopped trials as far as they went."""
    from mupgpt.planning.flops import run_flops

    config = cell_of(study).config()
    steps = [
        config.steps if t.state.name == "COMPLETE" else max(t.intermediate_values)
        for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")
    ]  # fmt: skip
    return sum(run_flops(config, step) for step in steps)


def winner(study: Study) -> dict[str, Any]:
    """The best trial's values and its losses on fresh seeds."""
    from mupgpt.data.corpus import load_corpus
    from mupgpt.training.population import Population
    from mupgpt.tuning.best import best_hparams

    hparams = best_hparams(study, top=3, seeds=1).config.hparams
    config = dataclasses.replace(cell_of(study).config(), hparams=hparams)
    runs = [dataclasses.replace(config, seed=seed) for seed in FRESH]
    population = Population(runs, load_corpus(config.data))
    population.train()
    losses = list(population.evaluate().values())
    assert np.isfinite(losses).all()
    return {"losses": losses, "hparams": dataclasses.asdict(hparams)}


def cell_of(study: Study):  # the one cell of its spec
    from mupgpt.tuning.spec import parse_spec

    return parse_spec(study.user_attrs["spec"], study.study_name).cells[0]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
