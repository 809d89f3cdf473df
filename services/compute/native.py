"""Builds the C++ of `cpp/` with the machine's own compiler, once, and loads them: `torch.ops.focusllava.*`.

They are built for this machine's processor, or for $FOCUSLLAVA_MARCH, a name that the compiler's -march= takes, such as
x86-64-v3: a folder of built libraries then serves every machine that has at least that.

python -m services.compute.native      builds now what the first use would build, and says where it lies
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import torch

from services.common.logs import LOGGER

FOLDER = pathlib.Path(__file__).parent / "cpp"
SOURCES, HEADERS = (tuple(sorted(FOLDER.glob(pattern))) for pattern in ("*.cpp", "*.h"))
# Without errno and traps the compiler may vectorise; nothing here changes what a float operation gives.
FLAGS: tuple[str, ...] = (
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # compilers halve vectors for clock rates of older processors
TORCH_LIBRARIES = ("torch", "torch_cpu", "c10")
COMPILE_SECONDS = 600

log = logging.getLogger(LOGGER)


class CannotBuild(Exception):
    """There is no compiler that can make the library; says why."""


def cache_folder() -> pathlib.Path:
    """The folder where built libraries are kept: $FOCUSLLAVA_CACHE, or the user's cache folder."""
    own = os.environ.get("FOCUSLLAVA_CACHE")
    return (
        pathlib.Path(own)
        if own
        else pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "focusllava"
    )


def build(folder: pathlib.Path) -> pathlib.Path:
    """The library in `folder`, built if it is not there yet. Raises CannotBuild.

    Its name is a hash of the source, the flags, torch and the processor, so a change of any of them builds anew.
    """
    compiler, march = _compiler(), os.environ.get("FOCUSLLAVA_MARCH") or "native"
    flags = (*FLAGS, f"-march={march}")
    processor = _processor() if march == "native" else ""
    parts = (*(path.read_text() for path in (*SOURCES, *HEADERS)), *flags, *compiler, torch.__version__, processor)
    library = folder / f"native-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    from torch.utils.cpp_extension import include_paths  # with setuptools, which nobody else needs

    libraries = [f"-L{pathlib.Path(torch.__file__).parent / 'lib'}", *(f"-l{name}" for name in TORCH_LIBRARIES)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may be building the same: each writes files of its own, the last to end puts its in place.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = pathlib.Path(scratch) / library.name
            # All sources in one piece: torch's headers, most of the compiler's work, are read once.
            include = [f"-I{path}" for path in include_paths()]
            include += [word for source in SOURCES[:-1] for word in ("-include", str(source))]
            _run([*compiler, *flags, *include, SOURCES[-1], *libraries, "-o", made])
            made.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(str(error)) from error
    return library


def _compiler() -> list[str]:
    """The compiler and its first arguments: CXX may be "ccache g++" or carry options, as make reads it."""
    own = os.environ.get("CXX", "")
    try:
        words = shlex.split(own)
    except ValueError as error:
        raise CannotBuild(f"CXX: is {own!r}, expected words as a shell reads them: {error}") from error
    if not words:
        words = [path for name in ("g++", "clang++") if (path := shutil.which(name))][:1]
    if not words:
        raise CannotBuild("no C++ compiler: install g++ or set CXX")
    return words


def _run(command: Sequence[str | pathlib.Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    if done.returncode:
        raise CannotBuild(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")


@functools.cache
def load() -> bool:
    """Whether the operators are there; builds and loads them at the first call. Why not goes to the log, once."""
    try:
        torch.ops.load_library(str(build(cache_folder())))
    except (CannotBuild, OSError) as error:
        log.warning("no native CPU kernels, slower ones in plain torch instead: %s", error)
        return False
    return True


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


if __name__ == "__main__":
    print(build(cache_folder()))
