"""The memory that there is for a model on a GPU, or on this process' machine and in its container."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import torch

ROOT = pathlib.Path("/")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    total: int
    free: int
    """What could be taken now; file caches count, for the kernel gives them up."""


def device_memory(device: str | torch.device) -> Memory:
    """Memory of a GPU, or of what this process may use of the machine's."""
    device = torch.device(device)
    if device.type == "cuda":  # GPU only
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total=total, free=free)
    return host_memory()


def host_memory(root: pathlib.Path = ROOT) -> Memory:
    """Memory of the machine, or of the tightest control group around this process (cgroup v1 or v2)."""
    info = _numbers(root / "proc/meminfo", 1024)
    total, free = info["MemTotal"], info.get("MemAvailable", info["MemFree"])
    for limit, left in _group_limits(root):
        total, free = min(total, limit), min(free, left)
    return Memory(total=total, free=max(free, 0))


def _group_limits(root: pathlib.Path) -> list[tuple[int, int]]:
    """(limit, what is left of it) of each control group from this process' own up to the topmost that can be seen."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names, prefix = root / "sys/fs/cgroup", ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            prefix = "total_"
        else:
            continue
        own = base / path.strip("/")
        # In a container the path may be the host's, and the container's own group is what is mounted.
        groups = [own, *own.parents] if own.is_dir() else [base]
        for group in groups:
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                stat = _numbers(group / "memory.stat", 1)
                cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                found.append((limit, limit - used + cached))
            if group == base:
                break
    return found


def _number(path: pathlib.Path) -> int | None:
    """The number that a file holds; None for a file that is not there or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(path: pathlib.Path, unit: int) -> dict[str, int]:
    """The numbers of a file with lines "name value" or "name: value kB", by name; empty where there is no such file."""
    try:
        fields = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {field[0]: int(field[1]) * unit for field in fields if len(field) > 1 and field[1].isdigit()}
