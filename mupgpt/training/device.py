"""The device that a process trains on, and what it asks there of torch and of the C library."""

import contextlib
import ctypes
import os
import sys
from contextlib import suppress
from typing import Any

import torch

from mupgpt.errors import ConfigError

__all__ = ["compute", "param_dtype", "pick_device", "settle_cpu", "visible_gpus"]

# Numbers of glibc's malloc.h; 32 MiB is the largest block that every version lets us keep.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BLOCK, NEVER = 32 * 2**20, -1


def settle_cpu() -> None:
    """Compute on one thread and keep freed memory, unless there is a GPU.

    Two threads in one process lose to two processes, on a busy machine by far. And glibc gives
    memory back to the system that the next training step asks for again: every page of it is then
    faulted in anew, for up to an eighth of a step's time (benchmarks/sweep_throughput.py measures
    the whole). Results stay what they are, bit for bit.
    """
    if torch.cuda.is_available():
        return
    torch.set_num_threads(1)
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc has no mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK)
            mallopt(M_TRIM_THRESHOLD, NEVER)


def compute(
    precision: str, device: torch.device, memory: str = "exact"
) -> contextlib.AbstractContextManager[Any]:
    """The autocast that ``precision`` asks for on ``device``; bf16 weights need none."""
    if precision == "bf16" and device.type == "cpu":
        raise ConfigError(
            "precision = 'bf16': on a CPU bf16 is many times slower than fp32; "
            "use precision = 'fp32' (or 'auto')"
        )
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    if half and memory == "exact":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def param_dtype(precision: str, memory: str = "exact") -> torch.dtype:
    """The dtype of the weights: fp32, fp64 where asked, bf16 where ``memory`` is not exact."""
    if memory != "exact":
        return torch.bfloat16
    return torch.float64 if precision == "fp64" else torch.float32


def pick_device() -> torch.device:
    """The GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says to a process that is to see one GPU alone, for each of ours.

    Where that variable is set already, its own entries (numbers or UUIDs).
    """
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return named[:count] if any(named) else [str(i) for i in range(count)]
