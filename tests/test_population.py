"""K members trained together are K runs trained alone, whatever happens to the others."""

import dataclasses
import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mupgpt.training.population as population_module
from mupgpt.config.schema import Base, HParams, Schedule
from mupgpt.data.corpus import Corpus
from mupgpt.errors import ConfigError
from mupgpt.model.gpt import GPT
from mupgpt.optim.groups import param_groups
from mupgpt.optim.members import MemberAdamW
from mupgpt.optim.rates import set_lr
from mupgpt.parametrization.table import parametrize
from mupgpt.resolve import train_config
from mupgpt.training.cuda_graph import WARM, Captured, capturable
from mupgpt.training.population import Population
from mupgpt.training.step import update

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


SHAPE = {"n_layer": 2, "d_model": 16, "n_head": 2, "vocab_size": 30, "seq_len": 8}


def config(k=0, seed=None, **changes):
    raw = {
        "model": SHAPE,
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


def radam(groups):
    return torch.optim.RAdam(groups, decoupled_weight_decay=True)


def test_a_schedule_and_an_optimizer_of_ones_own_are_those_of_solo_runs():
    """Each member at its own step: also one that comes later; the step is torch's, bit for bit."""
    own = {"schedule": lambda step: 1 / (1 + step), "optimizers": {"adamw": radam}}
    configs = [config(k, rule="mup") for k in range(3)]
    together = Population(configs[:2], CORPUS, **own)
    together.train(5)
    together.replace([0], [configs[2]])
    together.train()
    found = together.evaluate()
    together.keep([2])
    together.train()
    found |= together.evaluate()
    for member, k in ((1, 1), (2, 2)):
        alone = Population([configs[k]], CORPUS, **own)
        alone.train()
        assert found[member] == pytest.approx(alone.evaluate()[0], abs=1e-10)
        assert found[member] != pytest.approx(trained([configs[k]]).evaluate()[0], abs=1e-3)


def test_members_follow_no_schedule_that_is_not_known_here():
    unknown = Schedule(shape="own", digest="0123456789abcdef")
    with pytest.raises(ConfigError, match=r"schedule\.shape = 'own'"):
        Population([dataclasses.replace(config(0), schedule=unknown)], CORPUS)


def test_a_place_is_taken_by_what_fits_alone():
    two = Population([config(0, rule="mup"), config(1, rule="mup")], CORPUS)
    with pytest.raises(ConfigError, match=r"rule: a new member takes another optimizer"):
        two.replace([0], [config(0, rule="mup-lion")])
    with pytest.raises(ConfigError, match=r"steps differs"):
        two.replace([0], [config(0, rule="mup", steps=21)])


def vectors(model, tables, optimizers=None):
    return MemberAdamW(param_groups(model, tables), vectors=True)


def test_vectors_of_values_are_fused_steps(monkeypatch):
    """The update of a GPU, on whole parameters, is that of a CPU, member by member."""
    configs = [config(k) for k in range(4)]
    views = Population(configs, CORPUS)
    monkeypatch.setattr(population_module, "make_optimizer", vectors)
    whole = Population(configs, CORPUS)
    for population in (whole, views):
        population.train(10)
        population.keep([1, 2, 3])
        population.replace([2], [config(0)])
        population.train()
    assert whole.evaluate() == pytest.approx(views.evaluate(), abs=1e-12)
    for a, b in zip(whole.model.parameters(), views.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_populations_end_with_their_last_name():
    """Nothing of them refers to itself: memory is free for the next one at once."""
    population = Population([config(0)], CORPUS)
    population.train(2)
    gone = weakref.ref(population.model)
    gc.disable()
    try:
        del population
        assert gone() is None
    finally:
        gc.enable()


class HostTensors(TorchDispatchMode):
    """Notes every operation on a tensor that is not on the device ``meta``."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type != "meta" for t in tensors):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("block", [{}, {"norm": "rmsnorm", "activation": "swiglu", "bias": False}])
def test_a_step_that_is_recorded_touches_nothing_on_the_host(positions, block, monkeypatch):
    """What a CUDA graph cannot do; on a device without values any such operation shows."""
    model = dataclasses.replace(config(0).model, positions=positions, **block)
    tables = [parametrize(model, Base.of(model), hparams, "mup") for hparams in HPS[:2]]
    with torch.device("meta"):
        net = GPT(model, members=2)
        batch = torch.zeros(2, 2, 4, 8, dtype=torch.long)
    net.apply_table(tables)
    optimizer = vectors(net, tables)
    assert capturable(net, optimizer)
    set_lr(optimizer, [0.5, 1.0])
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.is_meta))
    with HostTensors() as host:
        update(net, optimizer, (batch[0], batch[1]), 1.0, accumulate=2)
    assert host.seen == []


def test_what_reads_from_the_host_is_not_recorded():
    """ALiBi's slopes and other optimizers' learning rates; and the test before can fail."""
    alibi = Population([config(0, model={**SHAPE, "positions": "alibi"})], CORPUS)
    muon = Population([config(0, rule="mup-muon")], CORPUS)
    plain = Population([config(0)], CORPUS)
    for population, expected in ((alibi, False), (muon, False), (plain, True)):
        assert capturable(population.model, population.optimizer) == expected
    with HostTensors() as host:
        torch.zeros(()) + torch.zeros((), device="meta")
    assert host.seen


class Graphs:
    """In the place of ``torch.cuda``: a graph is what ran while it was recorded, and runs again."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.CUDAGraph, self.Stream = (lambda: self), (lambda: self)
        self.current_stream = lambda: self
        self.stream = lambda stream: nullcontext()

    def wait_stream(self, stream):
        pass

    def graph(self, graph):
        self.recorded += 1
        return nullcontext()

    def replay(self):
        self.replayed += 1


def test_a_step_is_recorded_once_and_again_for_other_members(monkeypatch):
    cuda, seen = Graphs(), []
    monkeypatch.setattr(torch, "cuda", cuda)
    captured = Captured(lambda batch: seen.append(batch) or batch[0].sum())
    for i in range(WARM + 3):
        captured((torch.full((2,), i), torch.full((2,), -i)))
    assert len(seen) == WARM + 1 and (cuda.recorded, cuda.replayed) == (1, 3)
    held = seen[-1]
    assert held[0].tolist() == [WARM + 2] * 2 and held[1].tolist() == [-WARM - 2] * 2
    captured.forget()
    captured((torch.zeros(2), torch.zeros(2)))
    assert (cuda.recorded, cuda.replayed) == (2, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_are_launched_ones(monkeypatch):
    """Through `keep` and `replace`, on a GPU."""
    configs = [config(k, rule="mup", precision="fp32") for k in range(4)]
    recorded = Population(configs, CORPUS)
    monkeypatch.setattr(population_module, "capturable", lambda *_: False)
    launched = Population(configs, CORPUS)
    assert isinstance(recorded._update, Captured) and not isinstance(launched._update, Captured)
    for population in (recorded, launched):
        population.train(8)
        population.keep([1, 2, 3])
        population.replace([2], [configs[0]])
        population.train()
    assert recorded.evaluate() == pytest.approx(launched.evaluate(), abs=1e-3)


def test_accumulation_is_one_batch():
    one, two = trained([config(0)]), trained([config(0, accumulate=4)])
    for a, b in zip(weights(one, 0), weights(two, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_shapes_do_not_mix():
    with pytest.raises(ConfigError, match=r"steps differs.*\(20, 21\).*\[structure\]"):
        Population([config(0), config(1, steps=21)], CORPUS)
