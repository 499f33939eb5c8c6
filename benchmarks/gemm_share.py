"""How much of the machine's matrix rate a training step reaches, and where the rest goes.

    python benchmarks/gemm_share.py            # writes sweeps/results/gemm_share.json

The peak is the best square product of one thread in the same run. A step's FLOPs are those of its
matrix products and attention (6N + 12 L d T a token, with the weights that are multiplied). Two
kinds of step: one run, and a sweep's population of eight. The profile is torch.profiler's own time
of each operation, on the wall clock; what lies between operations is Python and autograd. Last, the
same steps with and without the memory settings of `mupgpt.training.device`, in processes that take
turns.
"""

import dataclasses
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable

import torch
from measure import (
    Served,
    goal,
    machine,
    serve,
    spread,
    take_turns,
    timed,
    times_faster,
    write,
)
from torch.profiler import ProfilerActivity, profile

from mupgpt.config.schema import TrainConfig
from mupgpt.data.corpus import load_corpus
from mupgpt.parametrization.layout import count_block_weights
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.training.device import settle_cpu
from mupgpt.training.population import Population

SHAPES = ((64, 1), (128, 1), (256, 1), (64, 8))  # width, members
SIZES, GOAL = (256, 512, 1024), 0.65
SECONDS, PROFILED = 4.0, 8
TURNS, TURN_S = 15, 0.4
CLASSES = {  # the first that fits an operation's name
    "attention": ("scaled_dot_product",),
    "matrix products": ("mm", "matmul", "linear"),
    "activation": ("gelu", "silu", "relu"),
    "norm": ("layer_norm", "rms_norm", "addcmul"),
    "loss": ("softmax", "nll", "cross_entropy", "logsumexp"),
    "optimizer and clipping": ("adam", "Optimizer", "foreach", "linalg_vector_norm"),
    "embedding": ("embedding", "index"),
    "sums, products, copies": ("aten::add", "aten::mul", "aten::sum", "aten::copy", "aten::fill",
                               "aten::zero", "aten::div", "aten::mean", "aten::cat", "aten::clone"),
}  # fmt: skip
BETWEEN = "Python, autograd, views"


def main() -> None:
    settle_cpu()
    where = machine()
    peak = best_rate()
    rows = [measure(width, members, peak) for width, members in SHAPES]
    goals = [goal("share of the GEMM peak, d = 256", rows[2]["share"], least=GOAL)]
    kept = [kept_memory(width, members) for width, members in ((256, 1), (64, 8))]
    record = {"machine": where, "peak_gflops": peak / 1e9, "rows": rows, "kept_memory": kept}
    write("gemm_share", record | {"goals": goals})
    print(f"peak {peak / 1e9:.1f} GFLOP/s")
    for row in rows:
        parts = ", ".join(f"{name} {100 * part:.0f} %" for name, part in row["profile"].items())
        print(
            f"d = {row['d_model']}, {row['members']} at once: {100 * row['share']:.0f} %; {parts}"
        )


def best_rate() -> float:
    """FLOPs per CPU second of the best of some square products."""
    rates = []
    for n in SIZES:
        a, b = torch.randn(n, n), torch.randn(n, n)
        costs = [timed(lambda a=a, b=b: a @ b).cpu for _ in range(max(5, int(4e10 / n**3)))]
        rates.append(2 * n**3 / min(costs))
    return max(rates)


def measure(width: int, members: int, peak: float) -> dict:
    config = train_config({"model": f"proxy-{width}", "steps": 10**6})
    step = stepper(width, members)
    for _ in range(3):
        step()
    seconds, spent = [], 0.0
    while spent < SECONDS:
        seconds.append(timed(step).cpu)
        spent += seconds[-1]
    flops = members * config.tokens_per_step * matrix_flops(config)
    # As with the peak, the best: what else runs on the machine only makes both slower.
    return {
        "d_model": width,
        "members": members,
        "cpu_seconds_a_step": spread(seconds) | {"best": min(seconds)},
        "gflops": flops / min(seconds) / 1e9,
        "share": flops / min(seconds) / peak,
        "profile": shares(step),
    }


def kept_memory(width: int, members: int) -> dict:
    """How many times faster a step is when freed memory stays with the process."""
    sides = {kept: Served(__file__, kept, width, members) for kept in ("kept", "returned")}
    steps = max(1, round(TURN_S / (sides["kept"](5).cpu / 5)))
    costs = take_turns({k: lambda k=k: sides[k](steps) for k in sides}, TURNS, warm=1)
    for side in sides.values():
        side.end()
    faster = times_faster(costs["returned"], costs["kept"])
    return {"d_model": width, "members": members, "times_faster": faster}


def stepper(width: int, members: int) -> Callable[[], object]:
    """A training step of one run, or of a population."""
    config = train_config({"model": f"proxy-{width}", "steps": 10**6})
    return one_run(config) if members == 1 else population(config, members)


def one_run(config: TrainConfig) -> Callable[[], object]:
    trainer = Trainer(config, tempfile.mkdtemp())
    trainer._build()
    return trainer._train_one


def population(config: TrainConfig, members: int) -> Callable[[], object]:
    configs = [dataclasses.replace(config, seed=seed) for seed in range(members)]
    columns = Population(configs, load_corpus(config.data))
    return lambda: columns.train(columns.step + 1)


def matrix_flops(config: TrainConfig) -> float:
    """FLOPs per token of a step's matrix products and attention scores, forward and backward."""
    m = config.model
    matrices = m.n_layer * count_block_weights(m) + m.vocab_size * m.d_model
    return 6.0 * matrices + 12.0 * m.n_layer * m.d_attn * m.seq_len


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Share of a step's wall time by class of operation, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        whole = timed(lambda: [step() for _ in range(PROFILED)]).wall
    parts: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        if (name := class_of(event.key)) != BETWEEN:
            parts[name] += event.self_cpu_time_total / 1e6 / whole
    parts[BETWEEN] = 1 - sum(parts.values())
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def class_of(operation: str) -> str:
    """The class of an operation by its name.

    >>> class_of("aten::baddbmm"), class_of("aten::view")
    ('matrix products', 'Python, autograd, views')
    """
    if not operation.startswith(("aten::", "Optimizer")):
        return BETWEEN
    return next((c for c, parts in CLASSES.items() if any(p in operation for p in parts)), BETWEEN)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        kept, width, members = sys.argv[1:]
        settle_cpu() if kept == "kept" else torch.set_num_threads(1)
        serve(stepper(int(width), int(members)))
