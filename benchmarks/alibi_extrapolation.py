"""Train small ALiBi models, read longer contexts with and without position interpolation.

    python benchmarks/alibi_extrapolation.py   # writes sweeps/results/alibi_extrapolation.json

κ divides all distances (arXiv 2310.13017). Each context predicts the same held-out tokens, cut into
windows of that length; differences are paired over seeds.
"""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import torch
from scipy.stats import t as student

from mupgpt.config.schema import TrainConfig
from mupgpt.data.batches import eval_batch
from mupgpt.data.corpus import Corpus, load_corpus
from mupgpt.resolve import train_config
from mupgpt.training.population import Population

RESULT = Path(__file__).parent.parent / "sweeps" / "results" / "alibi_extrapolation.json"
# Four heads that reach as far as they are trained; and eight, a third layer and a context so short
# that reading four times as much does harm: where interpolation would have something to mend.
MODELS = {
    "btlm-proxy-96 at 64": {"preset": "btlm-proxy-96", "seq_len": 64},
    "btlm-proxy-96 at 16, 8 heads, 3 layers": {
        "preset": "btlm-proxy-96", "seq_len": 16, "n_head": 8, "d_head": 12, "n_layer": 3,
    },
}  # fmt: skip
STEPS, TOKENS_PER_STEP, SEEDS = 600, 512, (0, 1, 2)
STRETCHES, SCALINGS = (1, 2, 4), (1.0, 1.25, 1.5, 2.0, 4.0)
HELD_OUT = 2**14  # tokens


def main() -> None:
    torch.set_num_threads(1)
    record = {
        "command": "python benchmarks/alibi_extrapolation.py",
        "machine": "2-core CPU, one thread",
        "corpus": load_corpus(config(next(iter(MODELS.values())), 0).data).fingerprint,
        "steps": STEPS,
        "seeds": SEEDS,
        "models": {name: trained(model) for name, model in MODELS.items()},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, rows in record["models"].items():
        print(name)
        for row in rows:
            losses = {s: round(statistics.fmean(each), 4) for s, each in row["losses"].items()}
            print(f"  context {row['context']}: {losses}; best κ > 1 less κ = 1: {row['gain']}")


def config(model: dict, seed: int) -> TrainConfig:
    batch = TOKENS_PER_STEP // model["seq_len"]
    schedule = {"warmup": 0.05, "end": 0.0}
    raw = {"model": model, "batch_size": batch, "steps": STEPS, "schedule": schedule}
    return train_config({**raw, "seed": seed})


def trained(model: dict) -> list[dict]:
    """One row a context for one model, trained once a seed."""
    configs = [config(model, seed) for seed in SEEDS]
    corpus: Corpus = load_corpus(configs[0].data)
    population = Population(configs, corpus)
    population.train()
    longest = eval_batch(corpus, HELD_OUT, model["seq_len"] * max(STRETCHES))
    return [measured(population, longest, model["seq_len"] * s) for s in STRETCHES]


def measured(population: Population, longest: tuple, context: int) -> dict:
    """Held-out losses at one context: κ → nats per byte, one a seed."""
    batch = tuple(t.reshape(-1, context) for t in longest)
    losses = {f"{scaling:g}": losses_at(population, batch, scaling) for scaling in SCALINGS}
    return {"context": context, "losses": losses, "gain": gain(losses)}


@torch.no_grad()
def losses_at(population: Population, batch: tuple, scaling: float) -> list[float]:
    """Mean held-out loss of each seed with distances divided by ``scaling``."""
    model, members = population.model, len(population.members)
    model.config = dataclasses.replace(model.config, alibi_scaling=scaling)
    pieces = zip(*(t.split(max(1, 4096 // t.shape[1])) for t in batch), strict=True)
    each = [model(*(t.expand(members, -1, -1) for t in piece)) for piece in pieces]
    return torch.cat(each, dim=1).double().mean((1, 2)).tolist()


def gain(losses: dict[str, list[float]]) -> dict:
    """The best κ > 1 less κ = 1, nats per byte, with a 95 % interval over seeds."""
    means = {scaling: statistics.fmean(each) for scaling, each in losses.items() if scaling != "1"}
    best = min(means, key=means.__getitem__)
    each = [a - b for a, b in zip(losses[best], losses["1"], strict=True)]
    half = float(student.ppf(0.975, len(each) - 1)) * statistics.stdev(each) / math.sqrt(len(each))
    mean = statistics.fmean(each)
    return {"scaling": float(best), "difference": mean, "interval": [mean - half, mean + half]}


if __name__ == "__main__":
    main()
