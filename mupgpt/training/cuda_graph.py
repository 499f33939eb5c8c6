"""A step of a population as a CUDA graph: recorded once, then launched as a whole.

A step of small models is thousands of small kernels, and launching them one by one takes longer
than they run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mupgpt.model.gpt import GPT
from mupgpt.optim.members import MemberAdamW
from mupgpt.training.step import Batch

__all__ = ["Captured", "capturable"]

WARM = 3  # steps before the first recording: libraries set themselves up in them


def capturable(model: GPT, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step reads nothing from the host while it runs.

    ALiBi's slopes come from there, and the learning rates of any optimizer but `MemberAdamW`.
    """
    return isinstance(optimizer, MemberAdamW) and model.config.positions != "alibi"


class Captured:
    """``step`` of a batch, from its fourth call on recorded and replayed.

    It must work in place on tensors that stay where they are, and read no others but the batch,
    whose shape is always the same.
    """

    def __init__(self, step: Callable[[Batch], Tensor]) -> None:
        self._step = step
        self._warm = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def forget(self) -> None:
        """Record anew at the next call: other tensors are to be worked on."""
        self._graph = None

    def __call__(self, batch: Batch) -> Tensor:
        if self._warm < WARM:
            self._warm += 1
            return self._aside(batch)
        if self._graph is None:
            self._held = tuple(t.clone() for t in batch)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._out = self._step((self._held[0], self._held[1]))
        for held, new in zip(self._held, batch, strict=True):
            held.copy_(new)
        self._graph.replay()
        return self._out.clone()

    def _aside(self, batch: Batch) -> Tensor:
        """On a stream of its own, as a recording needs it of what went before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss
