"""Visual tokens in a node's shared memory: the encoder leaves them there, and the LLM stage of the same node maps them.

24 MB are then copied once, where gRPC copies them a dozen times. The folder is its owner's alone, so what lies in it
was made by a stage of the same user: nobody need hash it. Oldest files go where there are too many bytes. Where
processes see different folders, on other nodes or in other containers, `identity` differs and bytes are sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import pathlib
import re
import secrets
import stat
import weakref
from dataclasses import dataclass

import torch

from services.common.logs import LOGGER

_log = logging.getLogger(LOGGER)

FOLDER_VARIABLE = "FOCUSLLAVA_SHELF"
"""The folder, where one cluster is to have its own; it is made where it is missing. Unset: the user's, on this node."""
_NAME = re.compile(r"[0-9a-f]{64}")
_ALIGNMENT = 64
_IDENTITY = "identity"
"""Name of the file that holds it."""


@dataclass(frozen=True, eq=False)
class Shelved:
    """What lies under a name; it stays as long as this object, whatever becomes of the file."""

    header: bytes
    data: memoryview
    """Writable, of this process alone: a change is never seen by others."""


class Shelf:
    """Headers and tensors by name. Threads and processes may use one folder at the same time."""

    def __init__(self, folder: pathlib.Path, identity: str):
        """identity: the same for all who see this folder, and known to nobody else."""
        self._folder, self.identity = folder, identity
        self._open: weakref.WeakValueDictionary[str, Shelved] = weakref.WeakValueDictionary()

    @classmethod
    def open(cls) -> Shelf | None:
        """This node's shelf; None where there is no shared memory, or somebody else has taken its place."""
        folder = pathlib.Path(os.environ.get(FOLDER_VARIABLE) or f"/dev/shm/focusllava-{os.getuid()}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            info = folder.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
                _log.warning("%s is not a private folder of this user: visual tokens go over gRPC", folder)
                return None
            return cls(folder, _identity(folder))
        except OSError as error:
            _log.warning("no shared memory (%s): visual tokens go over gRPC", error.strerror)
            return None

    def name(self, claims: object) -> str:
        """The name of what `claims` says; nobody can make one up who does not see the folder."""
        return hashlib.blake2b(repr(claims).encode(), digest_size=32, key=self.identity.encode()).hexdigest()

    def put(self, name: str, header: bytes, tensor: torch.Tensor, max_bytes: int) -> bool:
        """Leaves a contiguous CPU tensor there; False where it has no room, which costs nothing but the shorter way.

        max_bytes: most that all files may have together; the longest unused make room.
        """
        data = tensor.detach().view(-1).view(torch.uint8).numpy().data  # numpy has no bfloat16
        start = len(header).to_bytes(8, "little") + header
        start += b"\0" * (-len(start) % _ALIGNMENT)
        if len(start) + len(data) > max_bytes:
            return False
        unfinished = self._folder / f"{secrets.token_hex(8)}.new"
        try:
            self._make_room(max_bytes - len(start) - len(data))
            with open(unfinished, "xb", buffering=0, opener=_private) as file:
                for part in (memoryview(start), data):  # written, not mapped: a full disk is an error and no signal
                    while part:
                        part = part[file.write(part) :]
            unfinished.rename(self._folder / name)
            return True
        except OSError as error:
            _log.warning("visual tokens find no room in shared memory: %s", error.strerror)
            unfinished.unlink(missing_ok=True)
            return False

    def get(self, name: str) -> Shelved | None:
        """What lies under the name, if anything; it counts as used just now."""
        if not _NAME.fullmatch(name):
            return None
        with contextlib.suppress(OSError):
            os.utime(self._folder / name)
        found = self._open.get(name)
        if found is None:
            try:
                file = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                return None
            try:
                whole = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY))
            finally:
                os.close(file)
            end = 8 + int.from_bytes(whole[:8], "little")
            found = self._open[name] = Shelved(bytes(whole[8:end]), whole[end + -end % _ALIGNMENT :])
        return found

    def _make_room(self, left_bytes: int) -> None:
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):  # another process has removed it
                info = entry.stat(follow_symlinks=False)
                if entry.name != _IDENTITY:
                    found.append((info.st_mtime_ns, info.st_size, entry.path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= left_bytes:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            held -= size


def _identity(folder: pathlib.Path) -> str:
    """What the first process wrote."""
    file = folder / _IDENTITY
    with contextlib.suppress(FileExistsError):
        written = folder / f"{secrets.token_hex(8)}.new"
        with open(written, "x", opener=_private) as own:
            own.write(secrets.token_hex(32))
        try:
            os.link(written, file)  # whole, or not at all
        finally:
            written.unlink()
    return file.read_text("ascii")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
