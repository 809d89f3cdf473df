"""The package as it would be published: built, checked, and asking a server where it alone is installed.

`make wheel` runs this.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator

import pytest

from cluster.checks import REPOSITORY
from cluster.local import LocalCluster
from services.checkpoint.finding import find_checkpoint

SAMPLE = REPOSITORY / "docs" / "assets" / "sample.png"
QUESTION = "What number is on the red card?"
TOOLS = ("build>=1.2,<2", "twine>=6,<8")


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command outside of the source tree, whose modules must not be found."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(list(map(str, command)), env=clean, text=True, capture_output=True, timeout=900, **options)


def made(folder: pathlib.Path, *packages: object) -> pathlib.Path:
    """The programs of a fresh environment with these packages."""
    venv.create(folder, with_pip=True)
    done = run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--progress-bar", "off", *packages)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """The wheel and the source distribution, which `twine check` has passed."""
    folder = tmp_path_factory.mktemp("package")
    tools, tree = made(folder / "tools", *TOOLS), folder / "tree"
    # What git has, for a build in the tree would leave its files there.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, files.decode().split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((REPOSITORY / name).read_bytes())
    done = run(tools / "python", "-m", "build", "--outdir", folder / "dist", tree)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((folder / "dist").iterdir())
    checked = run(tools / "twine", "check", "--strict", *files)
    assert checked.returncode == 0 and checked.stdout.count("PASSED") == 2, checked.stdout
    return files


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if address := os.environ.get("SERVER"):  # one that runs already, such as 127.0.0.1:9000
        yield address
        return
    with LocalCluster(checkpoint=find_checkpoint(None), grpc_port=0, timeout_s=400) as cluster:
        cluster.start()
        yield cluster.grpc_address


def test_a_wheel_in_a_clean_environment_asks_a_server(
    built: list[pathlib.Path], server: str, tmp_path: pathlib.Path
) -> None:
    (wheel,) = (file for file in built if file.suffix == ".whl")
    programs = made(tmp_path / "clean", wheel)
    listed = run(programs / "python", "-m", "pip", "list", "--format", "freeze").stdout
    assert (
        "focusllava==" in listed
        and "grpcio==" in listed
        and not any(heavy in listed for heavy in ("torch==", "ray==", "numpy=="))
    ), listed
    asked = run(programs / "focusllava", "ask", SAMPLE, QUESTION, "--address", server, cwd=tmp_path)
    assert (asked.returncode, asked.stdout.strip()) == (0, "60"), asked.stderr
    assert "visual tokens" in asked.stderr
    mapped = run(
        programs / "focusllava", "ask", SAMPLE, QUESTION, "--map", "map.png", "--address", server, cwd=tmp_path
    )
    assert mapped.returncode == 2 and "pip install 'focusllava[serve]'" in mapped.stderr, mapped.stderr
    print(f"\n{wheel.name}: {wheel.stat().st_size} bytes; {asked.stdout.strip()}; Python {sys.version.split()[0]}")


def test_the_wheel_holds_what_the_extras_need(built: list[pathlib.Path]) -> None:
    (wheel,) = (file for file in built if file.suffix == ".whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"focusllava/py.typed", "services/compute/cpp/" + _a_source(), "cluster/serve.yaml"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "scripts/", "checkpoints/")) for name in names)


def _a_source() -> str:
    return next((REPOSITORY / "services" / "compute" / "cpp").glob("*.cpp")).name
