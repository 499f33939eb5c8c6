"""The processes that run one job: their group, their grid, and what they agree on.

``torchrun`` starts N of them; without it there is one, and everything here is the identity. What
is written, printed or logged once is done by the first process, rank 0.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed as dist

from mupgpt.config.schema import TrainConfig
from mupgpt.errors import ConfigError, require

__all__ = [
    "Grid",
    "agree",
    "any_rank",
    "gather",
    "global_mean",
    "is_main",
    "join_group",
    "leave_group",
    "on_main",
    "rank",
    "say",
    "together",
    "world_size",
]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # a process that hangs longer ends the job


def join_group() -> None:
    """Make one group of the processes that torchrun started; one process needs none.

    A group that exists already (another launcher's) is used as it is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # tensors by nccl, small agreements by gloo
    dist.init_process_group(backend, timeout=TIMEOUT)


def leave_group() -> None:
    """End the group when all is done. After an error nobody calls this: it would wait for others
    that wait for this process, while torchrun waits for its exit to end them.

    A thread of gloo's that lets go of a collective's tensors while the interpreter is ending aborts
    the process; the barrier gives it a round trip's time to have done so.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process does what is done once."""
    return rank() == 0


def say(text: str) -> None:
    """Print a line on stderr, once for all processes."""
    if is_main():
        print(text, file=sys.stderr)


def gather(value: T, group: Any = None) -> list[T]:
    """Every process's ``value``, by rank; a barrier, too."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def together(action: Callable[[], T], group: Any = None) -> T:
    """What ``action`` returns here, when all have done it; an error on one is raised on all."""
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    for failed in gather(failure, group):
        if failed is not None:
            raise failed
    return result


def on_main(action: Callable[[], Any], group: Any = None) -> None:
    """Rank 0 acts and the others wait for it; its error is raised on all."""
    together(lambda: action() if is_main() else None, group)


def agree(name: str, value: Any) -> None:
    """Raise ConfigError on every process unless all have the same ``value``."""
    values = gather(value)
    for other, theirs in enumerate(values):
        if theirs != values[0]:
            raise ConfigError(
                f"{name} differs between processes: {values[0]!r} on rank 0, {theirs!r} on rank "
                f"{other}; give all of them the same files"
            )


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any process."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def global_mean(values: Tensor) -> Tensor:
    """The mean over the elements of all processes, (); their numbers may differ."""
    if not dist.is_initialized():
        return values.mean()
    total = torch.stack([values.sum(), values.new_tensor(values.numel())]).double()
    dist.all_reduce(total)
    return (total[0] / total[1]).to(values.dtype)


@dataclass(frozen=True)
class Grid:
    """Processes as rows that see different data by columns that share the work of one model."""

    data: int = 1
    """Number of rows: each takes its slice of a batch."""
    data_rank: int = 0
    """This process's row."""
    mesh: Any = None
    """torch's DeviceMesh with axes ``data`` and ``tensor``; None where there is one process."""
    line: Any = None
    """The same processes on one axis, ``all``."""

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> "Grid":
        """The grid that ``config`` asks for among this job's processes, or a ConfigError."""
        world, tensor = world_size(), config.parallel.tensor
        processes = f"divide the number of processes, {world}: torchrun --nproc-per-node=N"
        require(world % tensor == 0, "parallel.tensor", tensor, processes)
        data = world // tensor
        parts = data * config.accumulate
        for phase in config.course:
            require(phase.batch_size % parts == 0, "batch_size", phase.batch_size, "be a multiple "
                    f"of {data} data-parallel processes × accumulate = {parts}")  # fmt: skip
        if not dist.is_initialized():
            return cls()
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device.type, (data, tensor), mesh_dim_names=("data", "tensor"))
        line = init_device_mesh(device.type, (world,), mesh_dim_names=("all",))
        return cls(data, mesh.get_local_rank("data"), mesh, line)

    def share(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """This row's sequences of a batch (B, T) whose B the number of rows divides."""
        tokens, targets = (t.chunk(self.data)[self.data_rank] for t in batch)
        return tokens, targets

    def spread(self, count: int) -> tuple[Tensor, int]:
        """Which of ``count`` things this row takes, as many as any other row, and how many count.

        What is beyond that number is filled up from the front, since all rows must take part in
        every forward.

        >>> Grid(data=2, data_rank=1).spread(3)
        (tensor([1, 0]), 1)
        """
        places = torch.arange(self.data_rank, self.data_rank + self.data * -(-count // self.data),
                              self.data)  # fmt: skip
        return places % count, int((places < count).sum())
