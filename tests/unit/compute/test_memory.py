"""Memory of the machine and of the control groups around this process, on file trees as kernels show them."""

from __future__ import annotations

import pathlib

import pytest

from services.compute.memory import Memory, device_memory, host_memory

GIB = 2**30


def tree(root: pathlib.Path, files: dict[str, object]) -> pathlib.Path:
    for name, content in {"proc/meminfo": meminfo(32, 20), **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def meminfo(total: int, available: int) -> str:
    return f"MemTotal: {total * 2**20} kB\nMemFree: 1024 kB\nMemAvailable: {available * 2**20} kB\nHugePages_Total: 0"


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        pytest.param({}, 32, 20, id="no control groups"),
        pytest.param({"proc/self/cgroup": "0::/", f"{V2}/memory.stat": "anon 1"}, 32, 20, id="v2, no limit"),
        pytest.param(
            {"proc/self/cgroup": "0::/", f"{V2}/memory.max": 8 * GIB, f"{V2}/memory.current": 3 * GIB}, 8, 5,
            id="v2 container",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/", f"{V2}/memory.max": 8 * GIB, f"{V2}/memory.current": 7 * GIB,
             f"{V2}/memory.stat": f"anon {GIB}\nactive_file {2 * GIB}\ninactive_file {3 * GIB}"}, 8, 6,
            id="v2, file caches can be had",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/memory.max": "max", f"{V2}/a/b/memory.current": GIB,
             f"{V2}/a/memory.max": 6 * GIB, f"{V2}/a/memory.current": 2 * GIB}, 6, 4,
            id="v2, the limit is a parent's",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/host/only", f"{V2}/memory.max": 4 * GIB, f"{V2}/memory.current": GIB}, 4, 3,
            id="v2, the host's path",
        ),
        pytest.param(
            {"proc/self/cgroup": "7:cpu:/x\n5:memory,hugetlb:/x\n0::/", f"{V1}/x/memory.limit_in_bytes": 10 * GIB,
             f"{V1}/x/memory.usage_in_bytes": 4 * GIB, f"{V1}/x/memory.stat": f"total_inactive_file {GIB}"}, 10, 7,
            id="v1",
        ),
        pytest.param(
            {"proc/self/cgroup": "5:memory:/", f"{V1}/memory.limit_in_bytes": 9223372036854771712,
             f"{V1}/memory.usage_in_bytes": GIB}, 32, 20,
            id="v1, no limit",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/", f"{V2}/memory.max": GIB, f"{V2}/memory.current": 2 * GIB}, 1, 0,
            id="over its limit",
        ),
    ],
)  # fmt: skip
def test_the_tightest_group_counts(files: dict[str, object], total: int, free: int, tmp_path: pathlib.Path) -> None:
    assert host_memory(tree(tmp_path, files)) == Memory(total=total * GIB, free=free * GIB)


def test_this_machine_says_something_sensible() -> None:
    memory = device_memory("cpu")
    assert 2**28 < memory.free <= memory.total
