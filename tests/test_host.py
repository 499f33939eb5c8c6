"""What a process may use: the least of the machine, its affinity and all control groups above."""

import os

import pytest

from mupgpt.util import host
from mupgpt.util.host import cores, free_memory, memory

GIB = 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files below a root of its own, on a machine of eight cores."""
    monkeypatch.setattr(host, "_affinity", lambda: 8)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "350000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        # A limit of the slice above holds below it too.
        ({"proc/self/cgroup": "0::/a.slice/b", "sys/fs/cgroup/a.slice/cpu.max": "200000 100000",
          "sys/fs/cgroup/a.slice/b/cpu.max": "max 100000"}, 2),
        ({"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/7",
          "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",  # the path is one outside the container
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"proc/self/cgroup": "3:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_cores_by_quota(system, files, found):
    assert cores(system(files)) == found


def test_cores_by_affinity():
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(own)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, own)


V2 = {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.current": f"{3 * GIB // 4}",
      "sys/fs/cgroup/job/memory.stat": f"anon 7\ninactive_file {GIB // 4}"}  # fmt: skip
V1 = {"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 2}"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        (V2, "sys/fs/cgroup/job/memory.max"),
        (V1, "sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ],
)
def test_memory_by_control_group(system, files, limit):
    """Of 1 GiB half is used, beside a cache that would be dropped."""
    root = system({**files, limit: f"{GIB}", "proc/meminfo": f"MemAvailable: {2**22} kB"})
    assert memory(root) == GIB
    assert free_memory(root) == GIB // 2


def test_memory_without_a_limit(system):
    root = system({**V2, "sys/fs/cgroup/job/memory.max": "max"})
    assert memory(root) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free_memory(root) == float("inf")
    root = system({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB"})
    assert free_memory(root) == 5 * 1024


def test_here():
    assert 1 <= cores() <= os.cpu_count() and 0 < free_memory() <= 1.01 * memory()
