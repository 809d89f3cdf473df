"""What processes of this machine listen on, as the kernel says: the TCP sockets of their file descriptors."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pathlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

_LISTEN = "0A"


@dataclass(frozen=True, kw_only=True)
class Listener:
    """One listening socket; `process` is its process's title."""

    address: str
    port: int
    pid: int
    process: str

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return ipaddress.ip_address(self.address).is_loopback


def listeners(pids: Iterable[int]) -> list[Listener]:
    """Listening TCP sockets of these processes, IPv4 and IPv6, by port."""
    by_inode = {inode: place for table in ("tcp", "tcp6") for inode, place in _listening(table)}
    found = []
    for pid in pids:
        for inode in _sockets(pid) & by_inode.keys():
            address, port = by_inode[inode]
            found.append(Listener(address=address, port=port, pid=pid, process=_title(pid)))
    return sorted(found, key=lambda each: (each.port, each.address, each.pid))


def _listening(table: str) -> Iterable[tuple[str, tuple[str, int]]]:
    file = pathlib.Path("/proc/net") / table
    for line in file.read_text().splitlines()[1:] if file.exists() else ():
        fields = line.split()
        if fields[3] == _LISTEN:
            address, _, port = fields[1].partition(":")
            yield fields[9], (_unpacked(address), int(port, 16))


def _unpacked(hexadecimal: str) -> str:
    """An address that the kernel wrote as words of 32 bits in its own byte order."""
    words = [int(hexadecimal[i : i + 8], 16) for i in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets. A descriptor that is closed meanwhile hides no other."""
    found = set()
    with contextlib.suppress(OSError):  # the process ended meanwhile
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.startswith("socket:["):
                    found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found


def _title(pid: int) -> str:
    try:
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    return pathlib.PurePath(words[0]).name if words[0].startswith("/") else words[0].strip()
