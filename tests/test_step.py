"""A step's loss is the mean over the targets that are counted, however the batch is cut."""

import pytest
import torch
from ranks import launch
from torch.nn import functional as F

import mupgpt.model.gpt as model_module
from mupgpt.config.schema import Base, GPTConfig, HParams, ParallelConfig, TrainConfig
from mupgpt.distributed.parallel import materialize, parallelize
from mupgpt.distributed.processes import Grid, global_mean
from mupgpt.model.gpt import GPT
from mupgpt.model.init import init_weights
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.table import parametrize
from mupgpt.training.step import evaluate, train_step

SHAPE = GPTConfig(n_layer=1, d_model=16, n_head=2, vocab_size=37, seq_len=8)
TABLE = parametrize(SHAPE, Base.of(SHAPE), HParams(), "mup")


def batch(n=4, ignored=()):
    """Tokens and targets; ``ignored`` are (sequence, how many of its first targets)."""
    tokens = torch.randint(37, (n, 9), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    for row, count in ignored:
        targets[row, :count] = -100
    return tokens[:, :-1], targets


UNEVEN = ((0, 8), (1, 5), (2, 1))


def built(members=None):
    model = GPT(SHAPE, members=members).double()
    tables = TABLE if members is None else [TABLE] * members
    init_weights(model, tables, 0 if members is None else list(range(members)))
    return model, make_optimizer(model, tables)


def plain(model, data):
    """PyTorch's mean loss, and the gradients of it."""
    logits = model(data[0])
    loss = F.cross_entropy(logits.flatten(0, 1), data[1].flatten())
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("chunk", [0, 10**9])
def test_ignored_targets_are_not_counted(accumulate, chunk, monkeypatch):
    """Over micro-batches too, one of which counts nothing; with the plain and the chunked loss."""
    monkeypatch.setattr(model_module, "CHUNK", chunk)
    model, optimizer = built()
    data = batch(ignored=UNEVEN)
    expected, grads = plain(model, data)
    torch.testing.assert_close(evaluate(model, data), expected, rtol=1e-12, atol=0)
    loss, _ = train_step(
        model, optimizer, data, lr_factor=0.0, grad_clip=0.0, accumulate=accumulate
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-14)


def test_each_member_counts_its_own():
    model, optimizer = built(members=2)
    both = [batch(ignored=UNEVEN), batch()]
    data = tuple(torch.stack(t) for t in zip(*both, strict=True))
    found = evaluate(model, data)
    losses, _ = train_step(model, optimizer, data, lr_factor=0.0, grad_clip=0.0)
    for k in range(2):
        alone = GPT(SHAPE).double()
        init_weights(alone, TABLE, k)
        expected, grads = plain(alone, both[k])
        torch.testing.assert_close(losses[k], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=0)
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad[k], grad, rtol=1e-9, atol=1e-14)


def test_a_batch_of_ignored_targets_teaches_nothing():
    model, optimizer = built()
    data = batch(ignored=[(row, 8) for row in range(4)])
    loss, norm = train_step(model, optimizer, data, lr_factor=0.0, grad_clip=1.0)
    assert (float(loss), float(norm), float(evaluate(model, data))) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_processes_count_together():
    launch(2, step_on_two)


def step_on_two():
    """The first process counts 3 of its 16 targets, the second 15."""
    whole, _ = built()
    data = batch(ignored=UNEVEN)
    expected, grads = plain(whole, data)
    device = torch.device("cpu")
    grid = Grid.of(TrainConfig(model=SHAPE, base=Base.of(SHAPE), batch_size=4), device)
    with torch.device("meta"):
        model = GPT(SHAPE).double()
    parallelize(model, ParallelConfig(), grid, half=False)
    materialize(model, device)
    init_weights(model, TABLE, 0)
    optimizer = make_optimizer(model, TABLE)
    loss, _ = train_step(model, optimizer, grid.share(data), lr_factor=0.0, grad_clip=0.0)
    torch.testing.assert_close(global_mean(loss), expected, rtol=1e-12, atol=0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), grad, rtol=1e-9, atol=1e-14)
