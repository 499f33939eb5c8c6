"""A training step counted tensor by tensor, without memory or GPU.

`mupgpt.planning.plan` is held to it.

The real model, optimizer and sharding run on fake tensors, which have shapes and no elements, while
PyTorch's memory trackers follow every allocation. What they do not see is what no tensor is: gaps
between allocations, the libraries' own workspaces and the driver.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from mupgpt.config.schema import TrainConfig
from mupgpt.distributed.parallel import materialize, parallelize
from mupgpt.distributed.processes import Grid
from mupgpt.model.gpt import GPT
from mupgpt.optim.make import make_optimizer
from mupgpt.parametrization.table import parametrize
from mupgpt.training.device import param_dtype
from mupgpt.training.step import sum_in_fp32

__all__ = ["trace_peak"]


def trace_peak(config: TrainConfig, gpus: int = 1) -> dict[str, int]:
    """Bytes on one of ``gpus`` devices at the peak of a step, by PyTorch's kind; ``Total`` is all.

    ``config`` must say how it is stored and recomputed (`mupgpt.planning.plan.decide_storage`).
    Of micro-batches no more than two are counted: the others are as the second.
    """
    assert "auto" not in (config.memory, config.parallel.checkpointing), "resolve the config first"
    table = parametrize(config.model, config.base, config.hparams, config.rule)
    half = config.precision in ("auto", "bf16")
    with _grid(config, gpus) as grid, contextlib.ExitStack() as stack:
        with torch.device("meta"):
            model = GPT(config.model).to(param_dtype(config.precision, config.memory))
        parallelize(model, config.parallel, grid, half)  # DeviceMesh needs numbers
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        materialize(model, torch.device("cpu"))
        model.apply_table(table)
        optimizer = make_optimizer(model, table, config.memory)
        phase = max(config.course, key=lambda phase: phase.tokens_per_step)
        rows = phase.batch_size // grid.data // config.accumulate
        batches = [torch.zeros(rows, phase.seq_len, dtype=torch.long)] * min(2, config.accumulate)
        _first_step(model, optimizer)
        tracker = _tracker(model, optimizer, gpus)
        autocast = half and config.memory == "exact"
        with tracker, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _step(model, optimizer, batches, tracker)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): size for kind, size in peak.items() if size}


def _first_step(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """The step that makes the optimizer's state, which all later ones find there."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _step(
    model: GPT, optimizer: torch.optim.Optimizer, batches: list[Tensor], tracker: Any
) -> None:
    """`train_step` without what needs numbers: clipping."""
    if len(batches) > 1:
        sum_in_fp32(model)
    for tokens in batches:
        tracker.reset_mod_stats()  # it follows one forward at a time
        (model(tokens, tokens).mean() / len(batches)).backward()
    tracker.reset_mod_stats()  # it goes through all modules at each of many operations
    optimizer.step()


def _tracker(model: GPT, optimizer: torch.optim.Optimizer, gpus: int) -> Any:
    if gpus > 1:
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

        return FSDPMemTracker(model, optimizer)
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    return tracker


@contextlib.contextmanager
def _grid(config: TrainConfig, gpus: int) -> Iterator[Grid]:
    """The grid of so many processes, of which only this one exists."""
    if gpus == 1:
        yield Grid()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        yield Grid.of(config, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
