"""Recomputation changes no gradient; each mode repeats what it says and nothing else."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.model.recompute import recomputed
from mupgpt.parametrization.table import parametrize

SHAPE = GPTConfig(n_layer=3, d_model=32, n_head=2, vocab_size=17, seq_len=12)
AC = ("none", "selective", "full")


class Calls(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] = self.count.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def backward(mode):
    """Gradients under ``mode``, and how often operations ran in the backward."""
    model = GPT(SHAPE).double()
    init_weights(model, parametrize(SHAPE, Base.of(SHAPE), HParams(), "mup"), 0)
    for block in model.blocks:
        block.forward = partial(recomputed, mode, block.forward)
    tokens = torch.randint(17, (2, 13), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
    with Calls() as calls:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, calls.count


@pytest.fixture(scope="module")
def runs():
    return {mode: backward(mode) for mode in AC}


@pytest.mark.parametrize("mode", AC[1:])
def test_gradients_are_the_same_bits(runs, mode):
    for name, grad in runs["none"][0].items():
        assert torch.equal(runs[mode][0][name], grad), name


def test_each_mode_repeats_what_it_says(runs):
    aten = torch.ops.aten
    counts = {mode: calls for mode, (_, calls) in runs.items()}
    layers, attention = SHAPE.n_layer, aten._scaled_dot_product_flash_attention_for_cpu.default

    def more(operation, mode):
        return counts[mode].get(operation, 0) - counts["none"].get(operation, 0)

    assert (more(aten.gelu.default, "selective"), more(aten.gelu.default, "full")) == (layers,) * 2
    assert (more(aten.addmm.default, "selective"), more(attention, "selective")) == (0, 0)
    # The last product of a block is its result, which the backward has no use for.
    assert (more(aten.addmm.default, "full"), more(attention, "full")) == (5 * layers, layers)


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert recomputed("full", torch.ones_like, torch.zeros(2)).sum() == 2
