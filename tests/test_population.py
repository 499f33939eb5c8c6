"""K members trained together are K runs trained alone, whatever happens to the others."""

import dataclasses

import numpy as np
import pytest
import torch

from mupgpt.config import HParams
from mupgpt.data import Corpus
from mupgpt.plain import ConfigError
from mupgpt.population import Population
from mupgpt.presets import train_config

RNG = np.random.default_rng(0)
CORPUS = Corpus(
    name="planted",
    train=RNG.integers(0, 30, 4000).astype(np.uint16),
    val=RNG.integers(0, 30, 800).astype(np.uint16),
    tokenizer="bytes",
    sha256="0" * 64,
    bytes=4800,
    bytes_per_token=1.0,
)
HPS = [
    HParams(lr=3e-3, init_std=0.2, emb_mult=2.0, output_mult=1.0, weight_decay=0.1),
    HParams(lr=1e-2, init_std=0.1, emb_mult=5.0, output_mult=3.0, attn_mult=0.5, beta2=0.99),
    HParams(lr=1e-3, init_std=0.4, emb_mult=1.0, output_mult=0.3, lr_mult_hidden=4.0, eps=1e-5),
    HParams(lr=2e-2, init_std=0.3, emb_mult=3.0, output_mult=2.0, beta1=0.8, weight_decay=0.5),
]


def config(k=0, seed=None, **changes):
    raw = {
        "model": {
            "n_layer": 2, "d_model": 16, "n_head": 2, "vocab_size": 30, "seq_len": 8,
        },
        "base": {
            "d_model": 8, "d_ffn": 32, "n_head": 1, "d_head": 8, "n_kv_head": 1, "n_layer": 2,
        },
        "rule": ["mup", "sp", "cerebras", "mup-package"][k],
        "hparams": dataclasses.asdict(HPS[k]),
        "batch_size": 4,
        "steps": 20,
        "precision": "fp64",
        "grad_clip": 0.5,
        "data": {"eval_tokens": 64},
        "seed": k // 2 if seed is None else seed,
    }  # fmt: skip
    return train_config({**raw, **changes})


def trained(configs):
    population = Population(configs, CORPUS)
    population.train()
    return population


def weights(population, k):
    return [p[k] for p in population.model.parameters()]


def test_members_are_solo_runs_after_twenty_steps():
    """Every hyperparameter, the rule, and the seed differ between members."""
    together = trained([config(k) for k in range(4)])
    losses = together.evaluate()
    for k in range(4):
        alone = trained([config(k)])
        assert losses[k] == pytest.approx(alone.evaluate()[0], abs=1e-10)
        for a, b in zip(weights(together, k), weights(alone, 0), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", ["mup-sgd", "mup-lion", "mup-muon", "completep", "supar"])
def test_members_are_solo_runs_under_every_optimizer(rule):
    """Beside members of AdamW, and after one of them has gone."""
    configs = [config(0, rule="mup"), config(1, rule=rule), config(2, rule=rule)]
    together = Population(configs, CORPUS)
    together.train(10)
    together.keep([1, 2])
    together.train()
    losses = together.evaluate()
    for k in (1, 2):
        alone = trained([configs[k]])
        assert losses[k] == pytest.approx(alone.evaluate()[0], abs=1e-10)
        for a, b in zip(weights(together, k - 1), weights(alone, 0), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_diverged_member_changes_nothing_for_the_rest():
    clean = trained([config(0), config(1), config(3)])
    broken = Population([config(0), config(1), config(3)], CORPUS)
    with torch.no_grad():
        broken.model.blocks[1].attn.v.weight[1] = torch.nan
    broken.train()
    assert np.isnan(broken.evaluate()[1])
    for k in (0, 2):
        for a, b in zip(weights(clean, k), weights(broken, k), strict=True):
            assert torch.equal(a, b)


def test_keep_is_never_having_had_the_others():
    cut = Population([config(k) for k in range(4)], CORPUS)
    cut.train(10)
    cut.keep([3, 1])
    cut.train()
    assert cut.members == [3, 1]
    losses = cut.evaluate()
    for k in (1, 3):
        assert losses[k] == pytest.approx(trained([config(k)]).evaluate()[0], abs=1e-10)


@pytest.mark.parametrize("rule", ["mup", "mup-sgd", "mup-muon"])
def test_who_comes_later_is_a_solo_run_too(rule):
    """In the places of others, at clocks of their own, with other hyperparameters and seeds."""
    configs = [config(k, rule=rule) for k in range(4)]
    together = Population(configs[:3], CORPUS)
    together.train(7)
    assert together.replace([0, 2], [configs[3], configs[0]]) == [3, 4]
    assert together.members == [3, 1, 4] and together.clocks == {3: 0, 1: 7, 4: 0}
    together.train()
    assert together.evaluate([4, 1, 3]) == pytest.approx(together.evaluate(), abs=1e-12)
    found = together.evaluate([1])
    together.keep([4, 3])
    together.train()
    found |= together.evaluate()
    for member, k in ((1, 1), (3, 3), (4, 0)):
        alone = trained([configs[k]])
        assert found[member] == pytest.approx(alone.evaluate()[0], abs=1e-10)
    for a, b in zip(weights(together, 1), weights(trained([configs[3]]), 0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_place_is_taken_by_what_fits_alone():
    two = Population([config(0, rule="mup"), config(1, rule="mup")], CORPUS)
    with pytest.raises(ConfigError, match=r"rule: a new member takes another optimizer"):
        two.replace([0], [config(0, rule="mup-lion")])
    with pytest.raises(ConfigError, match=r"steps differs"):
        two.replace([0], [config(0, rule="mup", steps=21)])


def test_vectors_of_values_are_fused_steps():
    """The update of a GPU, on whole parameters, is that of a CPU, member by member."""
    configs = [config(k) for k in range(4)]
    whole, views = Population(configs, CORPUS), Population(configs, CORPUS)
    whole.optimizer.vectors = True
    for population in (whole, views):
        population.train(10)
        population.keep([1, 2, 3])
        population.replace([2], [config(0)])
        population.train()
    assert whole.evaluate() == pytest.approx(views.evaluate(), abs=1e-12)
    for a, b in zip(whole.model.parameters(), views.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_accumulation_is_one_batch():
    one, two = trained([config(0)]), trained([config(0, accumulate=4)])
    for a, b in zip(weights(one, 0), weights(two, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_shapes_do_not_mix():
    with pytest.raises(ConfigError, match=r"steps differs.*\(20, 21\).*\[structure\]"):
        Population([config(0), config(1, steps=21)], CORPUS)
