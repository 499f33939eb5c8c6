"""Sweeps on one GPU: populations against one run at a time, the verdict over 16×, Cerebras' search.

    python benchmarks/gpu_sweeps.py                     # all of it; writes results/gpu_sweeps.json
    python benchmarks/gpu_sweeps.py speed verdict       # some stages
    python benchmarks/gpu_sweeps.py --toy --out t.json  # every line of it, on any machine

``speed``: trials an hour of a population, as many columns as memory and a short timing choose,
against one eager run after the other (the same model without members, torch's fused AdamW, seed by
seed), and how far their held-out losses are apart; with a profile where a goal is missed.
``verdict``: the sweep `lr-16x` on the default corpus and on the sources of torch, judged.
``proxy``: the sweep `cerebras-proxy`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from gpu_13b import build, gpu, profile, wait
from measure import RESULTS, goal, machine

from mupgpt.config.schedules import lr_factor
from mupgpt.config.schema import TrainConfig
from mupgpt.data.batches import Batches, eval_batch
from mupgpt.data.corpus import load_corpus
from mupgpt.evidence.verdict import judge_sweep
from mupgpt.report.pictures import verdict_picture
from mupgpt.resolve import overlay, train_config
from mupgpt.training.device import compute, pick_device
from mupgpt.training.population import Population
from mupgpt.training.step import evaluate, train_step
from mupgpt.tuning.best import best_hparams
from mupgpt.tuning.group_size import Timing, best_count, fitting, time_step, usual
from mupgpt.tuning.run import run_sweep
from mupgpt.tuning.spec import load_spec, parse_spec
from mupgpt.tuning.study import Sweep

GOALS = {64: 20.0, 128: 20.0, 256: 5.0}  # width → times the trials an hour
APART = 1e-3  # nats between equal seeds
SOLO, STEPS, WORK = 3, 200, 1e6
TOY = {"n_layer": 1, "seq_len": 16, "n_head": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_sweeps.json")
    args = parser.parse_args()
    for odd in set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {odd!r}; known: {', '.join(STAGES)}")
    device = pick_device()
    if device.type == "cpu" and not args.toy:
        parser.error("no GPU is here; --toy runs every line at toy size")
    out = args.out.resolve()
    record = json.loads(out.read_text()) if out.is_file() else {}
    record["command"] = "python benchmarks/gpu_sweeps.py"
    where = {"toy": args.toy, "machine": machine() | gpu(device)}  # a stage may be run again
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for stage in args.stages or STAGES:
            start = time.perf_counter()
            found = STAGES[stage](args.toy, device, out)
            record[stage] = {"seconds": round(time.perf_counter() - start, 1), **where, **found}
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"{stage}: {record[stage]['seconds']} s", flush=True)


# speed


def stage_speed(toy: bool, device: torch.device, out: Path) -> dict:
    rows = []
    for width, least in GOALS.items():
        raw = {"model": f"proxy-{width}", "steps": STEPS}
        if toy:
            raw = overlay(raw, {"model": {"preset": "proxy-32", **TOY}, "steps": 12})
        config, work = train_config(raw), 2e3 if toy else WORK
        rows.append(against_each_other(config, width, least, work, device))
        print({k: v for k, v in rows[-1].items() if k != "profile"}, flush=True)
    return {"runs": rows}


def against_each_other(
    config: TrainConfig, width: int, least: float, work: float, device: torch.device
) -> dict:
    """One run after the other, then a population whose first members are the same runs."""
    runs = [replace(config, seed=seed) for seed in range(SOLO)]
    alone = [one_run(run, device) for run in runs]
    solo_s = statistics.median(seconds for seconds, _ in alone)
    corpus = load_corpus(config.data)

    def timing(count: int) -> Timing:
        return time_step([runs[i % SOLO] for i in range(count)])

    count = max(SOLO, best_count(timing, usual(config), work, fitting(config)))
    start = wait(device)
    population = Population([runs[i % SOLO] for i in range(count)], corpus)
    population.train()
    losses = population.evaluate()
    together_s = wait(device) - start
    times = count * solo_s / together_s
    row = {
        "d_model": width, "tokens_per_step": config.tokens_per_step, "steps": config.steps,
        "columns": count, "trials_per_hour": {"alone": 3600 / solo_s,
                                              "population": 3600 * count / together_s},
        "apart": max(abs(losses[i] - alone[i][1]) for i in range(SOLO)),
        "goals": [goal(f"trials an hour, times one at a time, d = {width}", times, least=least)],
    }  # fmt: skip
    row["goals"].append(goal("nats between equal seeds", row["apart"], most=APART))
    if times < least:
        fresh = Population([runs[i % SOLO] for i in range(count)], corpus)
        fresh.train(5)
        row["profile"] = profile(lambda: fresh.train(8), device)
    return row


def one_run(config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Seconds and held-out loss of one eager run, from its initialization on."""
    corpus, start = load_corpus(config.data), wait(device)
    model, optimizer, _ = build(replace(config, memory="exact"), device)  # as a population is
    batches = Batches(corpus, config.course, config.seed)
    for step in range(config.steps):
        batch = tuple(t.to(device) for t in batches(step))
        with compute(config.precision, device):
            train_step(model, optimizer, batch, lr_factor=lr_factor(config, step),
                       grad_clip=config.grad_clip)  # fmt: skip
    held_out = eval_batch(corpus, config.data.eval_tokens, config.model.seq_len)
    with compute(config.precision, device):
        loss = float(evaluate(model, tuple(t.to(device) for t in held_out)))
    return wait(device) - start, loss


# verdict and proxy


def stage_verdict(toy: bool, device: torch.device, out: Path) -> dict:
    shipped, found = load_spec("lr-16x").to_dict(), {}
    for source in ("stdlib", "package:torch"):
        name = "lr-16x-" + source.rpartition(":")[2]
        raw = overlay(shipped, {"name": name, "train": {"data": {"source": source}}})
        if toy:
            raw = overlay(raw, {
                "study": {"seeds": [0, 1], "trials": 8},
                "train": {"model": {"preset": "proxy-32", "n_layer": 1, "seq_len": 16},
                          "base": "proxy-32", "steps": 12,
                          "data": {"source": "package:optuna", "eval_tokens": 256}},
                "structure": {"rule": ["mup", "sp"], "model.d_model": [32, 64]},
            })  # fmt: skip
        run_sweep(parse_spec(raw, name))
        verdict = judge_sweep(Sweep.open(name), tolerance=0.05)
        verdict_picture(verdict, out.with_name(name))
        found[source] = verdict.to_dict()
    return found


def stage_proxy(toy: bool, device: torch.device, out: Path) -> dict:
    raw = load_spec("cerebras-proxy").to_dict()
    if toy:
        raw = overlay(raw, {
            "study": {"trials": 4},
            "train": {"model": {"preset": "proxy-32", **TOY}, "base": "proxy-32", "steps": 12,
                      "batch_size": 4, "data": {"eval_tokens": 256}},
        })  # fmt: skip
    study = run_sweep(parse_spec(raw, "cerebras-proxy"))
    best = best_hparams(study, top=3, seeds=2)
    trials = [{"params": t.params, "loss": t.value} for t in study.trials]
    return {"best": asdict(best.config.hparams), "loss": best.loss, "trials": trials}


STAGES = {"speed": stage_speed, "verdict": stage_verdict, "proxy": stage_proxy}

if __name__ == "__main__":
    main()
