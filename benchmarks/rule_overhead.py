"""What µP costs: the time of a training step under `mup` over that under `sp`.

    python benchmarks/rule_overhead.py         # writes sweeps/results/rule_overhead.json

Every searched multiplier is 1, so that `sp` multiplies nothing: what `mup` adds is then largest. It
divides the logits by the width ratio, and its table makes more optimizer groups.
"""

import math
import statistics
import tempfile

from measure import Cost, goal, machine, spread, take_turns, timed, write

from mupgpt.config.plain import to_dict
from mupgpt.config.schema import HParams
from mupgpt.resolve import train_config
from mupgpt.trainer import Trainer
from mupgpt.training.device import settle_cpu

WIDTHS, GOAL = (64, 128, 256), 1.01
ROUNDS, WARM, SECONDS = 60, 4, 0.15  # of one turn, about


def main() -> None:
    settle_cpu()
    where = machine()
    rows = [compare(width) for width in WIDTHS]
    goals = [
        goal(f"step time of mup over sp, d = {row['d_model']}", row["ratio"]["median"], most=GOAL)
        for row in rows
    ]
    write("rule_overhead", {"machine": where, "rounds": ROUNDS, "rows": rows, "goals": goals})
    for row in rows:
        print(f"d = {row['d_model']}: {row['ratio']['median']:.4f} ± {row['error']:.4f}")


def compare(width: int) -> dict:
    """CPU seconds of ``mup`` over ``sp``, one ratio a round, and the median's standard error."""
    trainers = {rule: built(rule, width) for rule in ("mup", "sp")}
    once = max(timed(trainers["sp"]._train_one).cpu for _ in range(3))
    steps = max(1, round(SECONDS / once))

    def turn(rule: str) -> Cost:
        return timed(lambda: [trainers[rule]._train_one() for _ in range(steps)])

    costs = take_turns({r: lambda r=r: turn(r) for r in trainers}, ROUNDS, WARM)
    ratios = [m.cpu / s.cpu for m, s in zip(costs["mup"], costs["sp"], strict=True)]
    seconds = {rule: spread([c.cpu / steps for c in costs[rule]]) for rule in costs}
    # A median scatters 1.25 times as much as a mean.
    error = 1.2533 * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return {"d_model": width, "steps_a_turn": steps, "seconds_a_step": seconds,
            "ratio": spread(ratios), "error": error}  # fmt: skip


def built(rule: str, width: int) -> Trainer:
    """A Trainer ready to step; base width 32, every multiplier 1."""
    table = {"model": f"proxy-{width}", "rule": rule, "steps": 10**6}
    trainer = Trainer(
        train_config({**table, "hparams": to_dict(HParams(emb_mult=1.0))}), tempfile.mkdtemp()
    )
    trainer._build()
    return trainer


if __name__ == "__main__":
    main()
