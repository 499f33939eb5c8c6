"""What this process may use of its machine: cores and memory, as the container allows them.

The kernel's own counts (``os.cpu_count``, physical pages) are those of the whole machine; a cpuset
and a control group leave a process less. Either version of control groups limits at every level of
its tree, so that the least limit from a process's own group upwards counts.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cores", "free_memory", "memory"]

SYSTEM = Path("/")


def cores(system: Path = SYSTEM) -> int:
    """Cores that this process may keep busy, at least 1: by its affinity and its CPU quota.

    ``system`` is where ``proc`` and ``sys`` lie. Half a core of a quota does not count.
    """
    quotas = [*_quotas_v2(system), *_quotas_v1(system)]
    return max(1, int(min([_affinity(), *quotas])))


def memory(system: Path = SYSTEM) -> int:
    """Bytes of memory that this process may fill, used or not: the machine's, or its group's."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(limit for limit, _ in _memory_groups(system))])


def free_memory(system: Path = SYSTEM) -> float:
    """Bytes of memory that this process can still get; infinite where the system does not say."""
    free = _fields(system / "proc/meminfo").get("MemAvailable:", math.inf) * 1024
    return min([free, *(max(0, limit - used) for limit, used in _memory_groups(system))])


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas_v2(system: Path) -> Iterator[float]:
    for group in _groups(system, ""):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdigit():  # else "max"
            yield int(quota) / int(period)


def _quotas_v1(system: Path) -> Iterator[float]:
    for group in _groups(system, "cpu"):
        quota = _text(group / "cpu.cfs_quota_us")
        if quota.isdigit():  # else -1
            yield int(quota) / int(_text(group / "cpu.cfs_period_us"))


def _memory_groups(system: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every group that limits memory; the cache that can be dropped is no use."""
    names = {
        "": ("memory.max", "memory.current", "inactive_file"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for controller, (limit, used, cache) in names.items():
        for group in _groups(system, controller):
            if (most := _text(group / limit)).isdigit():
                dropped = _fields(group / "memory.stat").get(cache, 0)
                yield int(most), int(_text(group / used) or 0) - dropped


def _groups(system: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that hold this process, its own first; "" is version 2.

    In a container the path that the kernel tells may be one outside: then the root is its group.
    """
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = system / "sys/fs/cgroup" / controller
            own = root / path.lstrip("/")
            yield from (own, *(p for p in own.parents if p.is_relative_to(root)))


def _text(path: Path) -> str:
    """A file's text without its last newline; empty where there is none to read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """Name → number, of a file with a name and a number a line."""
    lines = [line.split() for line in _text(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines}
