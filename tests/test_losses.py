"""The chunked loss is the plain one: in float64 to 1e-12, in bf16 with an fp32 loss."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mupgpt.model.gpt as model_module
from mupgpt.config.schema import Base, GPTConfig, HParams
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.model.losses import IGNORED, chunked_loss, token_loss
from mupgpt.parametrization.table import parametrize

SHAPE = GPTConfig(n_layer=1, d_model=16, n_head=2, vocab_size=37, seq_len=8)


def draw(dtype, n=23, d=16, vocab=50):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, d, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (n,), generator=generator)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)  # of tokens, all different
    return h, weight, targets, weights


@pytest.mark.parametrize("size", [1, 50, 7 * 50, 10**6])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_losses_and_gradients_are_the_plain_ones(size, factor):
    h, weight, targets, weights = draw(torch.float64)
    targets[[0, 5, 6, 22]] = IGNORED
    results = []
    for loss in (
        token_loss(F.linear(h * factor, weight), targets),
        chunked_loss(h, weight, targets, factor, size),
    ):
        grads = torch.autograd.grad((loss * weights).sum(), (h, weight))
        results.append((loss, *grads))
    assert (results[0][0] == 0).nonzero().flatten().tolist() == [0, 5, 6, 22]
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_bf16_weights_have_an_fp32_loss():
    """A loss added up in bf16 would be off by 1e-2; this one is as exact as its logits."""
    h, weight, targets, _ = draw(torch.bfloat16, n=2048, d=64, vocab=4096)
    loss = chunked_loss(h * 0.1, weight, targets, 1.0, size=100 * 4096)
    assert loss.dtype == torch.float32
    exact = token_loss((h * 0.1).double() @ weight.double().T, targets)
    assert abs(loss.double().mean() - exact.mean()) < 1e-3
    plain = token_loss((h * 0.1) @ weight.T, targets)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)


def test_the_weights_gradient_adds_up_in_fp32():
    """Equal tokens, one a chunk: in bf16 their sum would stop growing after 256 of them."""
    n = 1000
    h = torch.ones(n, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    chunked_loss(h, weight, torch.zeros(n, dtype=torch.long), 1.0, size=8).sum().backward()
    expected = torch.full((8, 4), n / 8, dtype=torch.bfloat16)
    expected[0] -= n
    torch.testing.assert_close(weight.grad, expected, rtol=2**-8, atol=0)


def test_autocast_is_respected():
    h, weight, targets, weights = draw(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = token_loss(F.linear(h, weight), targets)
        ours = chunked_loss(h, weight, targets, 1.0, size=200)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad((plain * weights).sum(), (h, weight))
    grads = torch.autograd.grad((ours * weights).sum(), (h, weight))
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


class Shapes(TorchDispatchMode):
    """Shapes of all new tensors."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.seen.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_takes_chunks_beyond_the_limit(tied, training, monkeypatch):
    """The readout's multiplier included; all logits never exist."""
    shape = dataclasses.replace(SHAPE, tied=tied)
    base = dataclasses.replace(Base.of(shape), d_model=4.0)
    table = parametrize(shape, base, HParams(output_mult=3.0), "mup")
    assert table.multipliers["readout"].value == 0.75
    model = GPT(shape).double()
    init_weights(model, table, 0)
    tokens = torch.randint(37, (4, 9), generator=torch.Generator().manual_seed(0))

    def run():
        model.zero_grad()
        with torch.set_grad_enabled(training), Shapes() as shapes:
            loss = model(tokens[:, :-1], tokens[:, 1:])
            if training:
                (loss * torch.arange(8)).mean().backward()
        logits = {s for s in shapes.seen if s[-1:] == (37,) and len(s) > 1}
        grads = [p.grad.clone() for p in model.parameters()] if training else []
        return loss.detach(), grads, max(s[0] * s[1] if len(s) == 3 else s[0] for s in logits)

    loss, grads, rows = run()
    monkeypatch.setattr(model_module, "CHUNK", 5 * 37 + 3)
    chunked, others, fewer = run()
    assert (rows, fewer) == (32, 5)
    torch.testing.assert_close(chunked, loss, rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(others, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_members_keep_the_plain_loss(monkeypatch):
    monkeypatch.setattr(model_module, "CHUNK", 1)
    model = GPT(SHAPE, members=2)
    init_weights(model, parametrize(SHAPE, Base.of(SHAPE), HParams(), "mup"), [0, 1])
    tokens = torch.zeros(2, 1, 8, dtype=torch.long)
    torch.testing.assert_close(
        model(tokens, tokens), token_loss(model(tokens), tokens), rtol=0, atol=0
    )
