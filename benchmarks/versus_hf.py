"""Tokens per second of one run: our training step against Hugging Face's GPT-2, one thread each.

    python benchmarks/versus_hf.py             # writes sweeps/results/versus_hf.json

Ours is the Trainer's own step: batch, forward, backward, clipping, optimizer, check. The other side
is `GPT2LMHeadModel` of the same shape with the same activation, without dropout or cache, trained
by `torch.optim.AdamW` with its defaults and `clip_grad_norm_`, on the same batches. Each side lives
in a process of its own; they take turns of a few steps. Needs transformers.
"""

import sys
import tempfile
from collections.abc import Callable

from measure import Served, each_clock, goal, machine, serve, take_turns, times_faster, write

from mupgpt.config.schema import TrainConfig
from mupgpt.resolve import train_config

GOALS = {64: None, 128: 1.15, 256: 1.0}
ROUNDS, WARM, SECONDS = 15, 2, 1.0  # of one turn, about
SIDES = ("ours", "hf")


def main() -> None:
    where = machine()
    rows = [compare(width) for width in GOALS]
    goals = [
        goal(f"tokens per second against Hugging Face, d = {row['d_model']}",
             row["times_faster"]["cpu"]["median"], least=least)
        for row in rows if (least := GOALS[row["d_model"]])
    ]  # fmt: skip
    import transformers

    where["transformers"] = transformers.__version__
    write("versus_hf", {"machine": where, "rounds": ROUNDS, "rows": rows, "goals": goals})
    for row in rows:
        faster = {c: row["times_faster"][c] for c in ("cpu", "wall")}
        shown = ", ".join(f"{c} {v['median']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
                          for c, v in faster.items())  # fmt: skip
        print(f"d = {row['d_model']}: times faster on both clocks, median and quartiles: {shown}")


def config(width: int) -> TrainConfig:
    """A proxy of that width in steps of 512 tokens."""
    return train_config({"model": f"proxy-{width}", "steps": 10**6})


def compare(width: int) -> dict:
    sides = {side: Served(__file__, side, width) for side in SIDES}
    steps = max(2, round(SECONDS / sides["hf"](2).cpu * 2))
    costs = take_turns({s: lambda s=s: sides[s](steps) for s in SIDES}, ROUNDS, WARM)
    for side in sides.values():
        side.end()
    tokens = steps * config(width).tokens_per_step
    return {
        "d_model": width,
        "steps_a_turn": steps,
        "tokens_per_second": {side: each_clock(costs[side], tokens) for side in SIDES},
        "times_faster": times_faster(costs["hf"], costs["ours"]),
    }


def ours(c: TrainConfig) -> Callable[[], object]:
    from mupgpt.trainer import Trainer
    from mupgpt.training.device import settle_cpu

    settle_cpu()  # as `python -m mupgpt.trainer` begins
    trainer = Trainer(c, tempfile.mkdtemp())
    trainer._build()
    return trainer._train_one


def hugging_face(c: TrainConfig) -> Callable[[], object]:
    import itertools

    import torch
    from plain_gpt import plain_step
    from transformers import GPT2Config, GPT2LMHeadModel

    from mupgpt.data.batches import Batches
    from mupgpt.data.corpus import load_corpus

    torch.set_num_threads(1)
    m = c.model
    shape = GPT2Config(
        vocab_size=m.vocab_size, n_positions=m.seq_len, n_embd=m.d_model, n_layer=m.n_layer,
        n_head=m.n_head, n_inner=m.d_ffn, activation_function="gelu", use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=m.vocab_size - 1, eos_token_id=m.vocab_size - 1,
    )  # fmt: skip
    model = GPT2LMHeadModel(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches, count = Batches(load_corpus(c.data), c.course, c.seed), itertools.count()

    def step() -> float:
        tokens, _ = batches(next(count))
        return plain_step(model, optimizer, model(input_ids=tokens, labels=tokens).loss, 1e-3)

    return step


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        serve({"ours": ours, "hf": hugging_face}[sys.argv[1]](config(int(sys.argv[2]))))
