"""Initialization: the right standard deviation, keyed, and independent of everything else."""

import hashlib

import numpy as np
import pytest
import torch

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.model.gpt import GPT
from mupgpt.model.init import BLOCK_ROWS, fill, init_weights, keyed_normal
from mupgpt.parametrization.table import parametrize

CONFIG = GPTConfig(
    n_layer=2, d_model=96, n_head=3, d_ffn=400, vocab_size=300, seq_len=64, tied=False
)
BASE = Base(d_model=32, d_ffn=100, n_head=1, d_head=32, n_kv_head=1, n_layer=1)
TRUNCATED = 0.8796256610342398  # std of a unit normal cut at ±2


def table(rule="mup", **hparams):
    return parametrize(CONFIG, BASE, HParams(**hparams), rule)


@pytest.mark.parametrize("rule", ["mup", "cerebras", "sp"])
def test_empirical_std_of_every_row(rule):
    model, rows = GPT(CONFIG), table(rule)
    init_weights(model, rows, seed_of(rule))
    for name, p in model.named_parameters():
        row = rows.rows[name]
        if row.init in ("zeros", "ones"):
            assert bool((p == (1.0 if row.init == "ones" else 0.0)).all()), name
            continue
        expected = row.init_std * (TRUNCATED if row.init == "truncated" else 1.0)
        # The std of n normals has relative standard error 1/√(2n).
        assert p.std().item() == pytest.approx(expected, rel=4 / (2 * p.numel()) ** 0.5), name
        assert abs(p.mean().item()) < 4 * expected / p.numel() ** 0.5, name
        if row.init == "truncated":
            assert p.abs().max().item() <= 2 * row.init_std * (1 + 1e-6)


def seed_of(rule):
    return len(rule)


def test_golden_bits():
    """NumPy does not promise its streams across versions: this says when they changed."""
    bits = keyed_normal(3, "blocks.1.attn.q.weight", 2, (128, 64)).tobytes()
    digest = hashlib.sha256(bits + keyed_normal(0, "wte.weight", 0, (5, 7), True).tobytes())
    assert digest.hexdigest() == "85ee2ba090c13ffc5d81c0c71347be86f324d8a5e23365a3c3b45e539a45adf1"


def test_rows_do_not_depend_on_the_rest():
    """A longer table starts with the shorter one's rows: blocks are keyed, not drawn in turn."""
    short, tall = (keyed_normal(0, "w", 0, (rows, 16)) for rows in (50, BLOCK_ROWS))
    assert np.array_equal(short, tall[:50])
    assert not np.array_equal(tall, keyed_normal(0, "w", 1, (BLOCK_ROWS, 16)))
    assert not np.array_equal(tall, keyed_normal(1, "w", 0, (BLOCK_ROWS, 16)))


def test_members_share_normals_and_equal_solo():
    tables = [table(init_std=0.1), table(init_std=0.1, lr=1.0), table("cerebras", init_std=0.4)]
    together = GPT(CONFIG, members=3)
    init_weights(together, tables, [5, 5, 6])
    for k, seed in enumerate([5, 5, 6]):
        solo = GPT(CONFIG)
        init_weights(solo, tables[k], seed)
        for (name, p), q in zip(together.named_parameters(), solo.parameters(), strict=True):
            assert torch.equal(p[k], q), name


def test_the_dtype_changes_rounding_only():
    one, two = GPT(CONFIG), GPT(CONFIG).double()
    for model in (one, two):
        init_weights(model, table(), 1)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=0)


def test_threads_change_nothing(monkeypatch):
    row = table().rows["wte.weight"]
    serial, parallel = torch.empty(1, 300, 96), torch.empty(1, 300, 96)
    fill(serial, [row], [0])
    monkeypatch.setattr("mupgpt.model.init.PARALLEL_FROM", 1)
    fill(parallel, [row], [0])
    assert torch.equal(serial, parallel)
