"""abc-symmetry: one rule in two representations trains along the same trajectory.

(A, B, C, ε, λ) → (A t, B/t, C/t, ε t, λ t) for a weight with multiplier A, std B, Adam lr C
(Yang et al. 2022, Lemma J.1). ε and λ must move too; global clipping would break it.
"""

import dataclasses

import pytest
import torch

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.rules import RULES
from mupgpt.parametrization.table import parametrize
from mupgpt.training.step import train_step

CONFIG = GPTConfig(n_layer=2, d_model=64, n_head=2, d_ffn=96, vocab_size=16, seq_len=8, tied=False)
BASE = Base(d_model=8, d_ffn=12, n_head=1, d_head=8, n_kv_head=1, n_layer=1)
HP = HParams(lr=0.01, init_std=0.3, weight_decay=0.5, eps=1e-3)
M = 8.0


def table_3(rule="mup", eps=True, decay=True):
    """`mup` with the readout's 1/m in its weight instead of the forward (Tables 8 and 3)."""
    table = parametrize(CONFIG, BASE, HP, rule)
    rows = [
        row
        if row.name != "head.weight"
        else dataclasses.replace(
            row,
            init_std=row.init_std / M,
            lr=row.lr / M,
            eps=row.eps * (M if eps else 1),
            weight_decay=row.weight_decay * (M if decay else 1),
        )
        for row in table.params
    ]
    readout = dataclasses.replace(
        table.multipliers["readout"], value=table.multipliers["readout"].value * M
    )
    return dataclasses.replace(
        table, params=tuple(rows), multipliers={**table.multipliers, "readout": readout}
    )


def losses(table, clip=0.0):
    model = GPT(CONFIG).double()
    init_weights(model, table, 0)
    optimizer = make_optimizer(model, table)
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(20):
        batch = tuple(torch.randint(16, (2, 4, 8), generator=generator))
        loss, _ = train_step(model, optimizer, batch, lr_factor=1.0, grad_clip=clip)
        out.append(loss.item())
    return torch.tensor(out)


def test_two_representations_one_trajectory():
    rule = parametrize(CONFIG, BASE, HP, RULES["mup"])
    torch.testing.assert_close(losses(rule), losses(table_3()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("forgotten", [{"eps": False}, {"decay": False}])
def test_eps_and_decay_must_move_too(forgotten):
    rule = parametrize(CONFIG, BASE, HP, "mup")
    assert (losses(rule) - losses(table_3(**forgotten))).abs().max() > 1e-6


def test_clipping_breaks_it():
    rule = parametrize(CONFIG, BASE, HP, "mup")
    assert (losses(rule, clip=0.05) - losses(table_3(), clip=0.05)).abs().max() > 1e-4
