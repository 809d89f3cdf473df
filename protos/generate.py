"""Writes focusllava/v1/*_pb2* from the .proto files; with --check, only compares, and fails where they differ."""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

import grpc_tools
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = pathlib.Path("focusllava/v1")


def generate(destination: pathlib.Path) -> None:
    """Writes the generated package below `destination`."""
    sources = sorted(str(path) for path in (ROOT / "protos" / PACKAGE).glob("*.proto"))
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{ROOT / 'protos'}", f"-I{well_known}"]
    arguments += [f"--{kind}_out={destination}" for kind in ("python", "grpc_python", "pyi")]
    if protoc.main([*arguments, *sources]) != 0:
        sys.exit(1)  # protoc has said why


def differences() -> list[str]:
    """Generated files that are missing, stale, or have no .proto any more."""
    with tempfile.TemporaryDirectory() as folder:
        generate(pathlib.Path(folder))
        fresh = {path.name: path.read_bytes() for path in (pathlib.Path(folder) / PACKAGE).iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / PACKAGE).glob("*_pb2*.py*")}
    return sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(ROOT)
    elif stale := differences():
        sys.exit(f"{PACKAGE}: {', '.join(stale)} not as protos/ says: run `make protos` and commit the result")


if __name__ == "__main__":
    main()
